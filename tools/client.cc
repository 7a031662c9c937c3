#include "tools/client.h"

#include <fmt/format.h>
#include <grpcpp/grpcpp.h>

#include <chrono>

#include "absl/time/clock.h"
#include "proto/inference.grpc.pb.h"

namespace stagecoach {
namespace {

// Logits of a chunk of rows over a large vocabulary.
constexpr int kMaxReceiveBytes = 256 << 20;
constexpr absl::Duration kCallTimeout = absl::Seconds(10);
constexpr absl::Duration kPollInterval = absl::Milliseconds(20);

absl::Status FromGrpc(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
}

void SetDeadline(grpc::ClientContext& context, absl::Time deadline) {
  if (deadline != absl::InfiniteFuture()) context.set_deadline(absl::ToChronoTime(deadline));
}

}  // namespace

class Client::Impl {
 public:
  explicit Impl(const std::string& address) {
    grpc::ChannelArguments arguments;
    arguments.SetMaxReceiveMessageSize(kMaxReceiveBytes);
    arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
    arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 100);
    arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
    stub_ = v1::Inference::NewStub(
        grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments));
  }

  v1::Inference::Stub& stub() { return *stub_; }

  template <typename Request, typename Response>
  absl::StatusOr<Response> Unary(grpc::Status (v1::Inference::Stub::*method)(grpc::ClientContext*,
                                                                             const Request&,
                                                                             Response*),
                                 const Request& request) {
    grpc::ClientContext context;
    SetDeadline(context, absl::Now() + kCallTimeout);
    Response response;
    const grpc::Status status = (stub_.get()->*method)(&context, request, &response);
    if (!status.ok()) return FromGrpc(status);
    return response;
  }

 private:
  std::unique_ptr<v1::Inference::Stub> stub_;
};

Client::Client(const std::string& address) : impl_(std::make_unique<Impl>(address)) {}
Client::~Client() = default;

absl::Status Client::Generate(const v1::GenerateRequest& request, absl::Time deadline,
                              const std::function<bool(const v1::GenerateEvent&)>& on_event) {
  grpc::ClientContext context;
  SetDeadline(context, deadline);
  auto reader = impl_->stub().Generate(&context, request);
  v1::GenerateEvent event;
  while (reader->Read(&event)) {
    if (!on_event(event)) context.TryCancel();
  }
  return FromGrpc(reader->Finish());
}

absl::Status Client::Score(const v1::ScoreRequest& request, absl::Time deadline,
                           const std::function<void(const v1::ScoreChunk&)>& on_chunk) {
  grpc::ClientContext context;
  SetDeadline(context, deadline);
  auto reader = impl_->stub().Score(&context, request);
  v1::ScoreChunk chunk;
  while (reader->Read(&chunk)) on_chunk(chunk);
  return FromGrpc(reader->Finish());
}

absl::StatusOr<v1::TokenizeResponse> Client::Tokenize(const v1::TokenizeRequest& request) {
  return impl_->Unary(&v1::Inference::Stub::Tokenize, request);
}

absl::StatusOr<v1::DetokenizeResponse> Client::Detokenize(const v1::DetokenizeRequest& request) {
  return impl_->Unary(&v1::Inference::Stub::Detokenize, request);
}

absl::StatusOr<v1::GetModelResponse> Client::GetModel() {
  return impl_->Unary(&v1::Inference::Stub::GetModel, v1::GetModelRequest());
}

absl::StatusOr<v1::GetStatusResponse> Client::GetStatus() {
  return impl_->Unary(&v1::Inference::Stub::GetStatus, v1::GetStatusRequest());
}

absl::Status Client::WaitUntilServing(
    absl::Duration timeout,
    const std::function<absl::Status(const absl::StatusOr<v1::GetStatusResponse>&)>& keep_waiting) {
  const absl::Time deadline = absl::Now() + timeout;
  std::string missing;
  while (true) {
    const auto status = GetStatus();
    if (keep_waiting) {
      if (absl::Status verdict = keep_waiting(status); !verdict.ok()) return verdict;
    }
    if (status.ok() && status->state() == v1::SERVICE_STATE_SERVING) return absl::OkStatus();
    missing = status.ok() ? status->detail() : std::string(status.status().message());
    if (absl::Now() > deadline) {
      return absl::DeadlineExceededError(
          fmt::format("not serving after {}: {}", absl::FormatDuration(timeout), missing));
    }
    absl::SleepFor(kPollInterval);
  }
}

}  // namespace stagecoach
