// What clients call.
#ifndef STAGECOACH_COORDINATOR_INFERENCE_SERVICE_H_
#define STAGECOACH_COORDINATOR_INFERENCE_SERVICE_H_

#include <atomic>
#include <chrono>
#include <memory>

#include "coordinator/cluster_control.h"
#include "coordinator/pipeline.h"
#include "coordinator/request_check.h"
#include "model/model_file.h"
#include "model/tokenizer.h"
#include "proto/inference.grpc.pb.h"

namespace stagecoach {

// Thread-safe. Errors of all calls: INVALID_ARGUMENT naming the field, OUT_OF_RANGE for a prompt
// over the context, RESOURCE_EXHAUSTED with `retry-after-ms` and `grpc-retry-pushback-ms` (the same
// number; gRPC clients with a retry policy heed the latter) in the trailing metadata, UNAVAILABLE
// naming what is missing.
class InferenceService : public v1::Inference::CallbackService {
 public:
  // `pipeline` and `cluster` must outlive the last call.
  InferenceService(Pipeline* pipeline, ClusterControl* cluster,
                   std::shared_ptr<const Tokenizer> tokenizer, const ModelFile& model,
                   int max_context);

  // From now on Generate and Score answer UNAVAILABLE; calls under way go on.
  void StopAccepting() { stopping_ = true; }

  grpc::ServerWriteReactor<v1::GenerateEvent>* Generate(
      grpc::CallbackServerContext* context, const v1::GenerateRequest* request) override;
  grpc::ServerWriteReactor<v1::ScoreChunk>* Score(grpc::CallbackServerContext* context,
                                                  const v1::ScoreRequest* request) override;
  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* context,
                                     const v1::TokenizeRequest* request,
                                     v1::TokenizeResponse* response) override;
  grpc::ServerUnaryReactor* Detokenize(grpc::CallbackServerContext* context,
                                       const v1::DetokenizeRequest* request,
                                       v1::DetokenizeResponse* response) override;
  grpc::ServerUnaryReactor* GetModel(grpc::CallbackServerContext* context,
                                     const v1::GetModelRequest* request,
                                     v1::GetModelResponse* response) override;
  grpc::ServerUnaryReactor* GetStatus(grpc::CallbackServerContext* context,
                                      const v1::GetStatusRequest* request,
                                      v1::GetStatusResponse* response) override;

 private:
  absl::Status CheckReady() const;
  void AddPipelineStatus(v1::GetStatusResponse* response) const;

  Pipeline* const pipeline_;
  ClusterControl* const cluster_;
  const std::shared_ptr<const Tokenizer> tokenizer_;
  const RequestCheck check_;
  const int vocab_size_;
  const v1::GetModelResponse model_;
  const std::chrono::steady_clock::time_point started_ = std::chrono::steady_clock::now();
  std::atomic<bool> stopping_{false};
};

// What GetModel answers. Text that is not UTF-8 or too long to send is left out.
v1::GetModelResponse DescribeModel(const ModelFile& model, const Tokenizer& tokenizer,
                                   int max_context);

}  // namespace stagecoach

#endif  // STAGECOACH_COORDINATOR_INFERENCE_SERVICE_H_
