#include "coordinator/step_frame.h"

#include <string>
#include <utility>

#include "absl/status/status.h"
#include "fmt/format.h"

namespace stagecoach {
namespace {

void SetSampling(const SamplingParams& params, v1::SamplingParams& message) {
  message.set_temperature(params.temperature);
  message.set_top_k(params.top_k);
  message.set_top_p(params.top_p);
  message.set_min_p(params.min_p);
  message.set_repetition_penalty(params.repetition_penalty);
  message.set_presence_penalty(params.presence_penalty);
  message.set_frequency_penalty(params.frequency_penalty);
  message.set_seed(params.seed);
  message.set_logprobs(params.logprobs);
  for (const LogitBias& entry : params.logit_bias) {
    (*message.mutable_logit_bias())[entry.token_id] = entry.bias;
  }
}

void SetOpen(const StepRows& rows, const SequenceInfo& info, v1::SequenceOpen& open) {
  open.set_slot(rows.slot);
  open.set_sequence_id(rows.sequence);
  open.set_prompt_tokens(info.prompt_tokens);
  SamplingParams sampling = *info.sampling;
  sampling.seed = ChoiceSeed(sampling.seed, rows.choice);
  SetSampling(sampling, *open.mutable_sampling());
  open.mutable_cached_blocks()->Add(rows.cached_blocks.begin(), rows.cached_blocks.end());
  open.mutable_cached_token_ids()->Add(rows.cached_tokens.begin(), rows.cached_tokens.end());
}

// What a stage says of a sequence that failed; a code that does not exist is DATA_LOSS too.
absl::Status FailureOf(const v1::SequenceResult& sequence) {
  const uint32_t code = sequence.status_code();
  const bool known = code <= static_cast<uint32_t>(absl::StatusCode::kUnauthenticated);
  return absl::Status(known ? static_cast<absl::StatusCode>(code) : absl::StatusCode::kDataLoss,
                      sequence.status_message());
}

// Whether `sequence` holds all that `rows` asked for and only what may be.
absl::Status CheckSequence(const v1::SequenceResult& sequence, const StepRows& rows,
                           int vocab_size) {
  if (sequence.status_code() != 0) return FailureOf(sequence);
  if (rows.sample &&
      (!sequence.sampled() || sequence.token_id() < 0 || sequence.token_id() >= vocab_size)) {
    return absl::DataLossError("the last stage returned no token of the vocabulary");
  }
  if (sequence.top_ids_size() != sequence.top_logprobs_size() ||
      sequence.top_ids_size() > kMaxLogprobs) {
    return absl::DataLossError("the last stage returned ill-formed log-probabilities");
  }
  if (static_cast<size_t>(sequence.target_logprobs_size()) != rows.targets.size() ||
      sequence.logits_rows() != static_cast<uint32_t>(rows.logits ? rows.row_count : 0)) {
    return absl::DataLossError("the last stage returned another number of scores than asked for");
  }
  return absl::OkStatus();
}

// A header holds what one step may carry, at 5 bytes a token id at most.
static_assert((kMaxCachedTokens + 2 * kMaxStepTokens) * 5 < kMaxFrameHeaderBytes / 2);

}  // namespace

uint64_t ChoiceSeed(uint64_t seed, int choice) {
  if (choice == 0) return seed;
  uint64_t x = seed + 0x9e3779b97f4a7c15u * static_cast<uint64_t>(choice);  // splitmix64
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

Frame MakeStepFrame(uint64_t epoch, const Step& step,
                    const std::function<SequenceInfo(RequestId)>& info) {
  Frame frame;
  frame.header.set_epoch(epoch);
  v1::StepHeader& header = *frame.header.mutable_step();
  header.set_step(step.number);
  for (int slot : step.close) header.add_close(slot);
  header.mutable_clear_blocks()->Add(step.clear.begin(), step.clear.end());
  for (const Step::Copy& copy : step.copies) {
    v1::BlockCopy& message = *header.add_copies();
    message.set_from(copy.from);
    message.set_to(copy.to);
  }
  for (const StepRows& rows : step.rows) {
    if (rows.open) SetOpen(rows, info(rows.id), *header.add_open());
    v1::SequenceRows& message = *header.add_rows();
    message.set_slot(rows.slot);
    message.set_sequence_id(rows.sequence);
    message.set_start_position(rows.start_position);
    message.set_row_count(rows.row_count);
    message.set_sample(rows.sample);
    message.set_ahead(rows.ahead);
    message.set_logprobs(rows.score);
    message.set_logits(rows.logits);
    message.mutable_targets()->Add(rows.targets.begin(), rows.targets.end());
    message.mutable_new_blocks()->Add(rows.new_blocks.begin(), rows.new_blocks.end());
  }
  header.mutable_token_ids()->Add(step.token_ids.begin(), step.token_ids.end());
  return frame;
}

absl::StatusOr<StepOutcome> ParseStepResult(const Frame& frame, const Step& step, int vocab_size) {
  const v1::StepResult& result = frame.header.result();
  const size_t count = step.rows.size();
  if (static_cast<size_t>(result.sequences_size()) != count) {
    return absl::InvalidArgumentError(fmt::format("step {}: {} results for {} sequences",
                                                  step.number, result.sequences_size(), count));
  }
  const std::span<const float> payload = frame.payload.values();
  StepOutcome outcome;
  outcome.results.resize(count);
  outcome.tokens.resize(count);
  outcome.scores.resize(count);
  outcome.logits.resize(count);
  size_t used = 0;  // values of the payload
  for (size_t i = 0; i < count; ++i) {
    const v1::SequenceResult& sequence = result.sequences(static_cast<int>(i));
    const StepRows& rows = step.rows[i];
    if (sequence.sequence_id() != rows.sequence) {
      return absl::InvalidArgumentError(
          fmt::format("step {}: result {} is of another sequence", step.number, i));
    }
    const uint64_t values = static_cast<uint64_t>(sequence.logits_rows()) * vocab_size;
    if (values > payload.size() - used) {
      return absl::InvalidArgumentError(
          fmt::format("step {}: {} rows of logits do not fit a payload of {} values", step.number,
                      sequence.logits_rows(), payload.size()));
    }
    outcome.results[i].status = CheckSequence(sequence, rows, vocab_size);
    outcome.results[i].token_id = sequence.token_id();
    if (outcome.results[i].status.ok()) {
      outcome.tokens[i] = {
          .token_id = sequence.token_id(),
          .logprob = sequence.logprob(),
          .top_ids = {sequence.top_ids().begin(), sequence.top_ids().end()},
          .top_logprobs = {sequence.top_logprobs().begin(), sequence.top_logprobs().end()}};
      outcome.scores[i].assign(sequence.target_logprobs().begin(),
                               sequence.target_logprobs().end());
      outcome.logits[i] = payload.subspan(used, values);
    }
    used += values;
  }
  if (used != payload.size()) {
    return absl::InvalidArgumentError(fmt::format(
        "step {}: a payload of {} values for {} of logits", step.number, payload.size(), used));
  }
  return outcome;
}

}  // namespace stagecoach
