// A synchronous client of the Inference service.
#ifndef STAGECOACH_TOOLS_CLIENT_H_
#define STAGECOACH_TOOLS_CLIENT_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "proto/inference.pb.h"

namespace stagecoach {

// Thread-safe. Errors are the service's own; UNAVAILABLE when it cannot be reached.
class Client {
 public:
  explicit Client(const std::string& address);  // host:port
  ~Client();
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;

  // Calls on_event for each event, in order, until the stream ends; false from it cancels the call
  // (and gives CANCELLED).
  absl::Status Generate(const v1::GenerateRequest& request, absl::Time deadline,
                        const std::function<bool(const v1::GenerateEvent&)>& on_event);
  absl::Status Score(const v1::ScoreRequest& request, absl::Time deadline,
                     const std::function<void(const v1::ScoreChunk&)>& on_chunk);
  absl::StatusOr<v1::TokenizeResponse> Tokenize(const v1::TokenizeRequest& request);
  absl::StatusOr<v1::DetokenizeResponse> Detokenize(const v1::DetokenizeRequest& request);
  absl::StatusOr<v1::GetModelResponse> GetModel();
  absl::StatusOr<v1::GetStatusResponse> GetStatus();

  // Polls GetStatus until the service is serving; `keep_waiting` (may be empty) sees each answer
  // and may end the wait with a status of its own. Errors: that status, or DEADLINE_EXCEEDED with
  // what is missing.
  absl::Status WaitUntilServing(
      absl::Duration timeout,
      const std::function<absl::Status(const absl::StatusOr<v1::GetStatusResponse>&)>&
          keep_waiting);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_TOOLS_CLIENT_H_
