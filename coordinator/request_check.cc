#include "coordinator/request_check.h"

#include <algorithm>
#include <string>
#include <string_view>
#include <utility>

#include "coordinator/limits.h"
#include "fmt/format.h"

namespace stagecoach {
namespace {

template <typename... Args>
absl::Status Invalid(fmt::format_string<Args...> format, Args&&... args) {
  return absl::InvalidArgumentError(fmt::format(format, std::forward<Args>(args)...));
}

// ids: a vector or a repeated field.
template <typename Ids>
absl::Status CheckIds(std::string_view field, const Ids& ids, int vocab_size) {
  for (int i = 0; i < static_cast<int>(ids.size()); ++i) {
    if (ids[i] < 0 || ids[i] >= vocab_size) {
      return Invalid("{}[{}]: {} is outside the vocabulary [0, {})", field, i, ids[i], vocab_size);
    }
  }
  return absl::OkStatus();
}

absl::Status CheckText(std::string_view text) {
  if (text.size() <= kMaxTextBytes) return absl::OkStatus();
  return Invalid("text: {} bytes are more than the {} allowed", text.size(), kMaxTextBytes);
}

}  // namespace

absl::StatusOr<SamplingParams> CheckSampling(const v1::SamplingParams& message, int vocab_size) {
  // Written so that NaN, which fails every comparison, is refused.
  const float temperature = message.temperature();
  if (!(temperature >= 0 && temperature <= kMaxTemperature)) {
    return Invalid("sampling.temperature: {} is outside [0, {}]", temperature, kMaxTemperature);
  }
  if (!(message.top_p() >= 0 && message.top_p() <= 1)) {
    return Invalid("sampling.top_p: {} is outside [0, 1]", message.top_p());
  }
  if (!(message.min_p() >= 0 && message.min_p() < 1)) {
    return Invalid("sampling.min_p: {} is outside [0, 1)", message.min_p());
  }
  const float repetition = message.repetition_penalty();
  if (repetition != 0 &&
      !(repetition >= kMinRepetitionPenalty && repetition <= kMaxRepetitionPenalty)) {
    return Invalid("sampling.repetition_penalty: {} is neither 0 (off) nor in [{}, {}]", repetition,
                   kMinRepetitionPenalty, kMaxRepetitionPenalty);
  }
  if (!(message.presence_penalty() >= -kMaxPenalty && message.presence_penalty() <= kMaxPenalty)) {
    return Invalid("sampling.presence_penalty: {} is outside [-{}, {}]", message.presence_penalty(),
                   kMaxPenalty, kMaxPenalty);
  }
  if (!(message.frequency_penalty() >= -kMaxPenalty &&
        message.frequency_penalty() <= kMaxPenalty)) {
    return Invalid("sampling.frequency_penalty: {} is outside [-{}, {}]",
                   message.frequency_penalty(), kMaxPenalty, kMaxPenalty);
  }
  if (message.logprobs() > kMaxLogprobs) {
    return Invalid("sampling.logprobs: {} is more than {}", message.logprobs(), kMaxLogprobs);
  }
  if (message.logit_bias_size() > kMaxLogitBiases) {
    return Invalid("sampling.logit_bias: {} tokens are more than the {} allowed",
                   message.logit_bias_size(), kMaxLogitBiases);
  }
  SamplingParams params{.temperature = temperature,
                        .top_k = message.top_k(),
                        .top_p = message.top_p(),
                        .min_p = message.min_p(),
                        .repetition_penalty = repetition,
                        .presence_penalty = message.presence_penalty(),
                        .frequency_penalty = message.frequency_penalty(),
                        .seed = message.seed(),
                        .logprobs = message.logprobs()};
  for (const auto& [token, bias] : message.logit_bias()) {
    if (!(bias >= -kMaxLogitBias && bias <= kMaxLogitBias)) {
      return Invalid("sampling.logit_bias[{}]: {} is outside [-{}, {}]", token, bias, kMaxLogitBias,
                     kMaxLogitBias);
    }
    if (token < 0 || token >= vocab_size) {
      return Invalid("sampling.logit_bias[{}]: the token is outside the vocabulary [0, {})", token,
                     vocab_size);
    }
    params.logit_bias.push_back({token, bias});
  }
  std::sort(params.logit_bias.begin(), params.logit_bias.end(),
            [](const LogitBias& a, const LogitBias& b) { return a.token_id < b.token_id; });
  return params;
}

RequestCheck::RequestCheck(std::shared_ptr<const Tokenizer> tokenizer, int vocab_size,
                           int max_context)
    : tokenizer_(std::move(tokenizer)), vocab_size_(vocab_size), max_context_(max_context) {
  for (int32_t id = 0; id < std::min(tokenizer_->vocab_size(), vocab_size_); ++id) {
    if (tokenizer_->IsEndOfGeneration(id)) end_ids_.push_back(id);
  }
}

absl::StatusOr<std::vector<int32_t>> RequestCheck::Prompt(
    const v1::GenerateRequest& message) const {
  switch (message.input_case()) {
    case v1::GenerateRequest::kTokenIds: {
      const auto& ids = message.token_ids().ids();
      if (ids.empty()) return Invalid("token_ids: must hold at least one token");
      if (absl::Status status = CheckIds("token_ids", ids, vocab_size_); !status.ok()) {
        return status;
      }
      return std::vector<int32_t>(ids.begin(), ids.end());
    }
    case v1::GenerateRequest::kText: {
      if (message.text().empty()) return Invalid("text: must not be empty");
      if (absl::Status status = CheckText(message.text()); !status.ok()) return status;
      // A prompt is to be continued, so it gets the BOS but never an EOS.
      auto ids = tokenizer_->Encode(message.text(), {.parse_special = message.parse_special()});
      if (!ids.ok()) return ids.status();
      if (tokenizer_->adds_bos() && !message.omit_bos() && tokenizer_->bos_id() >= 0) {
        ids->insert(ids->begin(), tokenizer_->bos_id());
      }
      if (ids->empty()) return Invalid("text: holds no tokens");
      if (absl::Status status = CheckIds("text: token", *ids, vocab_size_); !status.ok()) {
        return status;
      }
      return ids;
    }
    case v1::GenerateRequest::INPUT_NOT_SET:
      break;
  }
  return Invalid("text or token_ids: one of them must be set");
}

absl::Status RequestCheck::CheckStops(const v1::GenerateRequest& message) const {
  if (message.stop_size() > kMaxStopStrings) {
    return Invalid("stop: {} strings are more than the {} allowed", message.stop_size(),
                   kMaxStopStrings);
  }
  for (int i = 0; i < message.stop_size(); ++i) {
    if (message.stop(i).empty()) return Invalid("stop[{}]: must not be empty", i);
    if (message.stop(i).size() > kMaxStopStringBytes) {
      return Invalid("stop[{}]: {} bytes are more than the {} allowed", i, message.stop(i).size(),
                     kMaxStopStringBytes);
    }
  }
  if (message.stop_token_ids_size() > kMaxStopTokenIds) {
    return Invalid("stop_token_ids: {} ids are more than the {} allowed",
                   message.stop_token_ids_size(), kMaxStopTokenIds);
  }
  return CheckIds("stop_token_ids", message.stop_token_ids(), vocab_size_);
}

absl::Status RequestCheck::CheckSchedule(const v1::GenerateRequest& message) const {
  if (message.n() > kMaxChoices) {
    return Invalid("n: {} is more than the {} allowed", message.n(), kMaxChoices);
  }
  if (message.priority() < -kMaxPriority || message.priority() > kMaxPriority) {
    return Invalid("priority: {} is outside [-{}, {}]", message.priority(), kMaxPriority,
                   kMaxPriority);
  }
  if (message.user().size() > kMaxUserBytes) {
    return Invalid("user: {} bytes are more than the {} allowed", message.user().size(),
                   kMaxUserBytes);
  }
  if (message.cache_salt().size() > kMaxCacheSaltBytes) {
    return Invalid("cache_salt: {} bytes are more than the {} allowed", message.cache_salt().size(),
                   kMaxCacheSaltBytes);
  }
  return absl::OkStatus();
}

absl::StatusOr<Request> RequestCheck::Generate(const v1::GenerateRequest& message) const {
  auto sampling = CheckSampling(message.sampling(), vocab_size_);
  if (!sampling.ok()) return sampling.status();
  if (absl::Status status = CheckSchedule(message); !status.ok()) return status;
  if (absl::Status status = CheckStops(message); !status.ok()) return status;
  auto prompt = Prompt(message);
  if (!prompt.ok()) return prompt.status();
  const size_t context = static_cast<size_t>(max_context_);
  if (prompt->size() >= context) {
    return absl::OutOfRangeError(
        fmt::format("prompt: {} tokens leave no room in the context of {} tokens", prompt->size(),
                    max_context_));
  }
  Request request;
  const size_t room = context - prompt->size();
  request.max_tokens = static_cast<int>(
      message.max_tokens() == 0 ? room : std::min<size_t>(message.max_tokens(), room));
  request.prompt = std::move(*prompt);
  request.sampling = *sampling;
  request.choices = std::max(1, static_cast<int>(message.n()));
  request.priority = message.priority();
  request.client = message.user();
  request.cache_salt = message.cache_salt();
  request.stop_token_ids.assign(message.stop_token_ids().begin(), message.stop_token_ids().end());
  if (!message.ignore_eos()) {
    request.stop_token_ids.insert(request.stop_token_ids.end(), end_ids_.begin(), end_ids_.end());
  }
  return request;
}

absl::StatusOr<Request> RequestCheck::Score(const v1::ScoreRequest& message) const {
  const auto& ids = message.token_ids().ids();
  if (ids.size() < 2) return Invalid("token_ids: scoring needs at least two tokens");
  if (absl::Status status = CheckIds("token_ids", ids, vocab_size_); !status.ok()) return status;
  if (ids.size() > max_context_) {
    return absl::OutOfRangeError(fmt::format(
        "token_ids: {} tokens are more than the context of {} tokens", ids.size(), max_context_));
  }
  const size_t logits_bytes = size_t{sizeof(float)} * ids.size() * vocab_size_;
  if (message.return_logits() && logits_bytes > kMaxScoreLogitsBytes) {
    return Invalid(
        "return_logits: {} bytes of logits are more than the {} allowed; send fewer "
        "tokens per request",
        logits_bytes, kMaxScoreLogitsBytes);
  }
  Request request;
  request.prompt.assign(ids.begin(), ids.end());
  request.max_tokens = 1;
  request.score = true;
  request.return_logits = message.return_logits();
  return request;
}

absl::StatusOr<std::vector<int32_t>> RequestCheck::Tokenize(
    const v1::TokenizeRequest& message) const {
  if (absl::Status status = CheckText(message.text()); !status.ok()) return status;
  return tokenizer_->Encode(message.text(), {.add_special = message.add_special(),
                                             .parse_special = message.parse_special()});
}

absl::Status RequestCheck::Detokenize(const v1::DetokenizeRequest& message) const {
  if (message.token_ids_size() > kMaxDetokenizeIds) {
    return Invalid("token_ids: {} ids are more than the {} allowed", message.token_ids_size(),
                   kMaxDetokenizeIds);
  }
  return CheckIds("token_ids", message.token_ids(), tokenizer_->vocab_size());
}

}  // namespace stagecoach
