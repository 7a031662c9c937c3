// Turns what clients send into requests that the pipeline may trust, or into an error that names
// the field. Bounds: coordinator/limits.h and proto/sampling.proto. Pure; thread-safe.
#ifndef STAGECOACH_COORDINATOR_REQUEST_CHECK_H_
#define STAGECOACH_COORDINATOR_REQUEST_CHECK_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/pipeline.h"
#include "model/tokenizer.h"
#include "proto/inference.pb.h"

namespace stagecoach {

class RequestCheck {
 public:
  // vocab_size: rows of the model's embedding; max_context: prompt and output together.
  RequestCheck(std::shared_ptr<const Tokenizer> tokenizer, int vocab_size, int max_context);

  // Tokenises the prompt and fills in everything but the deadline. max_tokens is cut to what the
  // context has room for. Errors: INVALID_ARGUMENT "<field>: ..."; OUT_OF_RANGE with both lengths
  // if the prompt leaves no room for one token.
  absl::StatusOr<Request> Generate(const v1::GenerateRequest& message) const;
  // Errors: as above; at least two tokens, at most the context.
  absl::StatusOr<Request> Score(const v1::ScoreRequest& message) const;
  absl::StatusOr<std::vector<int32_t>> Tokenize(const v1::TokenizeRequest& message) const;
  absl::Status Detokenize(const v1::DetokenizeRequest& message) const;

 private:
  absl::StatusOr<std::vector<int32_t>> Prompt(const v1::GenerateRequest& message) const;
  absl::Status CheckStops(const v1::GenerateRequest& message) const;
  // The fields that say how the request is scheduled.
  absl::Status CheckSchedule(const v1::GenerateRequest& message) const;

  const std::shared_ptr<const Tokenizer> tokenizer_;
  const int vocab_size_;
  const int max_context_;
  std::vector<int32_t> end_ids_;  // end of generation
};

absl::StatusOr<SamplingParams> CheckSampling(const v1::SamplingParams& message, int vocab_size);

}  // namespace stagecoach

#endif  // STAGECOACH_COORDINATOR_REQUEST_CHECK_H_
