// The calls Generate and Score as observers of their requests.
#ifndef STAGECOACH_COORDINATOR_GENERATE_STREAM_H_
#define STAGECOACH_COORDINATOR_GENERATE_STREAM_H_

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_set>
#include <vector>

#include "coordinator/request_stream.h"
#include "coordinator/text_stream.h"
#include "model/tokenizer.h"
#include "proto/inference.pb.h"

namespace stagecoach {

// Adds `next` to `waiting`, an earlier event, so that it says what both say, unless they are of
// different choices; then it returns false.
bool JoinEvents(v1::GenerateEvent& waiting, const v1::GenerateEvent& next);

class GenerateStream : public RequestStream<v1::GenerateEvent> {
 public:
  // at_start: the output starts a text (nothing but BOS came before).
  GenerateStream(grpc::CallbackServerContext* context, Pipeline* pipeline,
                 std::shared_ptr<const Tokenizer> tokenizer, const v1::GenerateRequest& request,
                 bool at_start);

  void OnToken(int choice, uint32_t index, const SampledToken& token) override;
  void OnChoiceEnd(int choice, const absl::Status& status, stagecoach::Finish finish) override;
  void OnScores(uint32_t first, std::span<const float> logprobs,
                std::span<const float> logits) override;  // never comes
  void OnEnd(const absl::Status& status, const RequestSummary& summary) override;

 protected:
  bool Join(v1::GenerateEvent& waiting, const v1::GenerateEvent& next) const override {
    return JoinEvents(waiting, next);
  }

 private:
  // Whether the token's text belongs to the output.
  bool IsText(int32_t id) const;
  v1::GeneratedToken Describe(uint32_t index, const SampledToken& token) const;

  const std::shared_ptr<const Tokenizer> tokenizer_;
  const std::vector<std::string> stops_;
  const std::unordered_set<int32_t> stop_token_ids_;
  const bool include_stop_;
  const uint32_t logprobs_;
  struct Choice {
    std::unique_ptr<TextStream> text;
    std::string stop_match;
  };
  // On the pipeline's thread only.
  std::vector<Choice> choices_;
  size_t choices_left_;
  v1::GenerateEvent last_;  // of the choice that ended last, until OnEnd
  uint32_t tokens_ = 0;
};

class ScoreStream : public RequestStream<v1::ScoreChunk> {
 public:
  ScoreStream(grpc::CallbackServerContext* context, Pipeline* pipeline, int vocab_size);

  void OnToken(int choice, uint32_t index, const SampledToken& token) override;  // never comes
  void OnChoiceEnd(int choice, const absl::Status& status, stagecoach::Finish finish) override;
  void OnScores(uint32_t first, std::span<const float> logprobs,
                std::span<const float> logits) override;
  void OnEnd(const absl::Status& status, const RequestSummary& summary) override;

 private:
  const size_t vocab_size_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_COORDINATOR_GENERATE_STREAM_H_
