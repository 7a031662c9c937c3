#include "coordinator/generate_stream.h"

#include <algorithm>
#include <utility>

namespace stagecoach {

bool JoinEvents(v1::GenerateEvent& waiting, const v1::GenerateEvent& next) {
  if (waiting.choice() != next.choice()) return false;
  std::string text = std::move(*waiting.mutable_text());
  text += next.text();
  waiting.MergeFrom(next);  // adds tokens, and sets what the end of a choice sets
  waiting.set_text(std::move(text));
  return true;
}

GenerateStream::GenerateStream(grpc::CallbackServerContext* context, Pipeline* pipeline,
                               std::shared_ptr<const Tokenizer> tokenizer,
                               const v1::GenerateRequest& request, bool at_start)
    : RequestStream(context, pipeline, kMaxUnreadTokens * std::max(1u, request.n())),
      tokenizer_(std::move(tokenizer)),
      stops_(request.stop().begin(), request.stop().end()),
      stop_token_ids_(request.stop_token_ids().begin(), request.stop_token_ids().end()),
      include_stop_(request.include_stop()),
      logprobs_(request.sampling().logprobs()),
      choices_(std::max(1u, request.n())),
      choices_left_(choices_.size()) {
  for (Choice& choice : choices_) {
    choice.text = std::make_unique<TextStream>(
        tokenizer_.get(),
        TextStream::Options{.stops = stops_, .include_stop = include_stop_, .at_start = at_start});
  }
}

bool GenerateStream::IsText(int32_t id) const {
  // A model may have more rows in its head than its vocabulary has pieces.
  if (id < 0 || id >= tokenizer_->vocab_size()) return false;
  return include_stop_ || stop_token_ids_.count(id) == 0;
}

v1::GeneratedToken GenerateStream::Describe(uint32_t index, const SampledToken& token) const {
  v1::GeneratedToken description;
  description.set_index(index);
  description.set_token_id(token.token_id);
  if (logprobs_ == 0) return description;
  description.mutable_logprob()->set_token_id(token.token_id);
  description.mutable_logprob()->set_logprob(token.logprob);
  const size_t top =
      std::min<size_t>(logprobs_ - 1, std::min(token.top_ids.size(), token.top_logprobs.size()));
  for (size_t i = 0; i < top; ++i) {
    v1::TokenLogprob* entry = description.add_top();
    entry->set_token_id(token.top_ids[i]);
    entry->set_logprob(token.top_logprobs[i]);
  }
  return description;
}

void GenerateStream::OnToken(int number, uint32_t index, const SampledToken& token) {
  Choice& choice = choices_[number];
  if (!choice.stop_match.empty()) return;  // was on its way when the stop string matched
  ++tokens_;
  v1::GenerateEvent event;
  event.set_choice(number);
  *event.add_tokens() = Describe(index, token);
  if (IsText(token.token_id)) {
    TextStream::Output output = choice.text->Push(token.token_id);
    event.set_text(std::move(output.text));
    if (output.stop_index.has_value()) choice.stop_match = stops_[*output.stop_index];
  }
  Write(std::move(event));
  if (!choice.stop_match.empty()) FinishEarly(number);
}

void GenerateStream::OnChoiceEnd(int number, const absl::Status& status,
                                 stagecoach::Finish finish) {
  --choices_left_;
  if (!status.ok()) return;  // the request will end with it
  Choice& choice = choices_[number];
  v1::GenerateEvent event;
  event.set_choice(number);
  TextStream::Output rest = choice.text->Flush();
  event.set_text(std::move(rest.text));
  if (rest.stop_index.has_value()) choice.stop_match = stops_[*rest.stop_index];
  event.set_finish_reason(finish == stagecoach::Finish::kStop || !choice.stop_match.empty()
                              ? v1::FINISH_REASON_STOP
                              : v1::FINISH_REASON_LENGTH);
  event.set_stop_match(choice.stop_match);
  if (choices_left_ == 0) {
    last_ = std::move(event);
  } else {
    Write(std::move(event));
  }
}

void GenerateStream::OnScores(uint32_t, std::span<const float>, std::span<const float>) {}

void GenerateStream::OnEnd(const absl::Status& status, const RequestSummary& summary) {
  if (!status.ok()) {
    End(status);
    return;
  }
  v1::Usage& usage = *last_.mutable_usage();
  usage.set_prompt_tokens(summary.prompt_tokens);
  usage.set_completion_tokens(tokens_);
  usage.set_cached_tokens(summary.cached_tokens);
  v1::Timings& timings = *last_.mutable_timings();
  timings.set_queue_ms(summary.queue_seconds * 1e3);
  timings.set_prompt_ms(summary.prompt_seconds * 1e3);
  timings.set_decode_ms(summary.decode_seconds * 1e3);
  Write(std::move(last_));
  End(absl::OkStatus());
}

ScoreStream::ScoreStream(grpc::CallbackServerContext* context, Pipeline* pipeline, int vocab_size)
    : RequestStream(context, pipeline, kMaxUnreadTokens), vocab_size_(vocab_size) {}

void ScoreStream::OnToken(int, uint32_t, const SampledToken&) {}

void ScoreStream::OnChoiceEnd(int, const absl::Status&, stagecoach::Finish) {}

// Logits are cut so that no message exceeds what clients accept by default. There is a row of them
// for every position, and one log-probability fewer at the end of the text.
void ScoreStream::OnScores(uint32_t first, std::span<const float> logprobs,
                           std::span<const float> logits) {
  const size_t rows = std::max(logprobs.size(), logits.size() / vocab_size_);
  const size_t chunk_rows =
      logits.empty() ? rows
                     : std::max<size_t>(1, kMaxScoreChunkBytes / (vocab_size_ * sizeof(float)));
  for (size_t row = 0; row < rows; row += chunk_rows) {
    const size_t end = std::min(rows, row + chunk_rows);
    v1::ScoreChunk chunk;
    chunk.set_first_position(first + static_cast<uint32_t>(row));
    for (size_t i = row; i < std::min(end, logprobs.size()); ++i) {
      chunk.add_logprobs(logprobs[i]);
    }
    if (!logits.empty()) {
      const auto bytes =
          std::as_bytes(logits.subspan(row * vocab_size_, (end - row) * vocab_size_));
      chunk.set_logits(bytes.data(), bytes.size());
    }
    Write(std::move(chunk));
  }
}

void ScoreStream::OnEnd(const absl::Status& status, const RequestSummary&) { End(status); }

}  // namespace stagecoach
