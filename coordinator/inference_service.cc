#include "coordinator/inference_service.h"

#include <string>
#include <utility>

#include "coordinator/generate_stream.h"
#include "coordinator/limits.h"
#include "model/unicode.h"
#include "worker/link/grpc_wire.h"

namespace stagecoach {
namespace {

bool IsUtf8(const std::string& text) { return ValidUtf8Prefix(text) == text.size(); }

grpc::ServerUnaryReactor* Reply(grpc::CallbackServerContext* context, const absl::Status& status) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(ToGrpcStatus(status));
  return reactor;
}

}  // namespace

InferenceService::InferenceService(Pipeline* pipeline, ClusterControl* cluster,
                                   std::shared_ptr<const Tokenizer> tokenizer,
                                   const ModelFile& model, int max_context)
    : pipeline_(pipeline),
      cluster_(cluster),
      tokenizer_(std::move(tokenizer)),
      check_(tokenizer_, model.params().vocab_size, max_context),
      vocab_size_(model.params().vocab_size),
      model_(DescribeModel(model, *tokenizer_, max_context)) {}

absl::Status InferenceService::CheckReady() const {
  if (stopping_) return absl::UnavailableError("the coordinator is shutting down");
  return cluster_->Readiness();
}

grpc::ServerWriteReactor<v1::GenerateEvent>* InferenceService::Generate(
    grpc::CallbackServerContext* context, const v1::GenerateRequest* message) {
  absl::StatusOr<Request> request = check_.Generate(*message);
  if (absl::Status ready = CheckReady(); request.ok() && !ready.ok()) request = ready;
  const bool at_start =
      request.ok() && request->prompt.size() == 1 && request->prompt[0] == tokenizer_->bos_id();
  // A refused request may have stop strings without bound; they are not looked at.
  return std::make_shared<GenerateStream>(context, pipeline_, tokenizer_,
                                          request.ok() ? *message : v1::GenerateRequest(), at_start)
      ->Start(std::move(request));
}

grpc::ServerWriteReactor<v1::ScoreChunk>* InferenceService::Score(
    grpc::CallbackServerContext* context, const v1::ScoreRequest* message) {
  absl::StatusOr<Request> request = check_.Score(*message);
  if (absl::Status ready = CheckReady(); request.ok() && !ready.ok()) request = ready;
  return std::make_shared<ScoreStream>(context, pipeline_, vocab_size_)->Start(std::move(request));
}

grpc::ServerUnaryReactor* InferenceService::Tokenize(grpc::CallbackServerContext* context,
                                                     const v1::TokenizeRequest* request,
                                                     v1::TokenizeResponse* response) {
  const auto ids = check_.Tokenize(*request);
  if (ids.ok()) response->mutable_token_ids()->Add(ids->begin(), ids->end());
  return Reply(context, ids.status());
}

grpc::ServerUnaryReactor* InferenceService::Detokenize(grpc::CallbackServerContext* context,
                                                       const v1::DetokenizeRequest* request,
                                                       v1::DetokenizeResponse* response) {
  const absl::Status status = check_.Detokenize(*request);
  if (status.ok()) {
    Detokenizer detokenizer(tokenizer_.get(), /*at_start=*/true, request->render_special());
    for (int32_t id : request->token_ids()) *response->mutable_text() += detokenizer.Push(id);
    *response->mutable_text() += detokenizer.Flush();
  }
  return Reply(context, status);
}

grpc::ServerUnaryReactor* InferenceService::GetModel(grpc::CallbackServerContext* context,
                                                     const v1::GetModelRequest*,
                                                     v1::GetModelResponse* response) {
  *response = model_;
  return Reply(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* InferenceService::GetStatus(grpc::CallbackServerContext* context,
                                                      const v1::GetStatusRequest*,
                                                      v1::GetStatusResponse* response) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  cluster_->GetStatus([this, reactor, response](v1::GetStatusResponse status) {
    *response = std::move(status);
    AddPipelineStatus(response);
    reactor->Finish(grpc::Status::OK);
  });
  return reactor;
}

void InferenceService::AddPipelineStatus(v1::GetStatusResponse* response) const {
  const PipelineStats stats = pipeline_->Stats();
  response->set_running(stats.running);
  response->set_waiting(stats.waiting);
  response->set_slots(stats.slots);
  response->set_completed_requests(stats.completed);
  response->set_failed_requests(stats.failed);
  response->set_prompt_tokens(stats.prompt_tokens);
  response->set_completion_tokens(stats.completion_tokens);
  response->set_cached_tokens(stats.cached_tokens);
  response->set_preemptions(stats.preemptions);
  response->set_kv_blocks_used(stats.blocks_used);
  response->set_kv_blocks_cached(stats.blocks_cached);
  response->set_kv_blocks_free(stats.blocks_free);
  response->set_recent_tokens_per_second(stats.recent_tokens_per_second);
  response->set_uptime_seconds(
      std::chrono::duration<double>(std::chrono::steady_clock::now() - started_).count());
}

v1::GetModelResponse DescribeModel(const ModelFile& model, const Tokenizer& tokenizer,
                                   int max_context) {
  const ModelParams& params = model.params();
  v1::GetModelResponse description;
  if (IsUtf8(params.name)) description.set_name(params.name);
  description.set_architecture(params.architecture);
  description.set_layers(params.layers);
  description.set_d_model(params.d_model);
  description.set_heads(params.heads);
  description.set_kv_heads(params.kv_heads);
  description.set_vocab_size(params.vocab_size);
  description.set_context_length(max_context);
  description.set_model_hash(model.hash());
  description.set_bos_id(tokenizer.bos_id());
  description.set_eos_id(tokenizer.eos_id());
  const auto chat_template = model.gguf().String("tokenizer.chat_template");
  if (chat_template.ok() && chat_template->has_value() &&
      (*chat_template)->size() <= kMaxChatTemplateBytes && IsUtf8(**chat_template)) {
    description.set_chat_template(**chat_template);
  }
  uint64_t bytes = 0;
  for (const GgufFile& part : model.parts()) {
    for (const TensorInfo& tensor : part.tensors()) bytes += tensor.bytes;
  }
  description.set_tensor_bytes(bytes);
  return description;
}

}  // namespace stagecoach
