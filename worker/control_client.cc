#include "worker/control_client.h"

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/support/channel_arguments.h>

#include <algorithm>
#include <thread>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/time/clock.h"
#include "fmt/format.h"
#include "proto/cluster.grpc.pb.h"
#include "spdlog/spdlog.h"
#include "worker/link/frame.h"

namespace stagecoach {
namespace {

constexpr absl::Duration kFirstBackoff = absl::Milliseconds(100);
constexpr absl::Duration kMaxBackoff = absl::Seconds(2);
constexpr int kMaxMessageBytes = 64 << 10;  // of a coordinator

grpc::ChannelArguments Arguments() {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 50);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 1000);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 500);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 10000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 5000);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
  return arguments;
}

// Whether joining again cannot help.
bool IsFinal(const absl::Status& status, bool welcomed) {
  if (welcomed) return absl::IsAborted(status);  // fenced off by a newer stream of this name
  return absl::IsFailedPrecondition(status) || absl::IsInvalidArgument(status);
}

}  // namespace

struct ControlClient::Stream {
  std::unique_ptr<v1::Cluster::Stub> stub;
  grpc::ClientContext context;
  std::unique_ptr<grpc::ClientReaderWriter<v1::WorkerMessage, v1::CoordinatorMessage>> call;
};

ControlClient::ControlClient(std::string coordinator, v1::WorkerHello hello, WorkerNode* node)
    : coordinator_(std::move(coordinator)),
      hello_(std::move(hello)),
      log_prefix_(fmt::format("[{}]", hello_.worker())),
      node_(node) {
  node_->SetFailureCallback([this](const v1::AssignmentFailed& failed) {
    absl::MutexLock lock(&mu_);
    failures_.push_back(failed);
  });
  node_->SetChangeCallback([this] {
    absl::MutexLock lock(&mu_);
    beat_now_ = true;
  });
}

ControlClient::~ControlClient() { Stop(); }

absl::Status ControlClient::Run() {
  const auto channel =
      grpc::CreateCustomChannel(coordinator_, grpc::InsecureChannelCredentials(), Arguments());
  absl::Duration backoff = kFirstBackoff;
  std::string last_reason;
  for (;;) {
    bool welcomed = false;
    const absl::Status status = JoinOnce(channel.get(), &welcomed);
    if (welcomed) {
      node_->LoseCoordinator();
      backoff = kFirstBackoff;
      last_reason.clear();
    }
    absl::MutexLock lock(&mu_);
    if (stopping_) return absl::OkStatus();
    if (IsFinal(status, welcomed)) return status;
    std::string reason = absl::CHexEscape(std::string(status.message().substr(0, 256)));
    if (reason != last_reason) {  // once per reason, not once per attempt
      spdlog::warn("{} {} {}: {}; trying again", log_prefix_,
                   welcomed ? "lost the coordinator at" : "cannot join the coordinator at",
                   coordinator_, reason);
    }
    last_reason = std::move(reason);
    mu_.AwaitWithTimeout(absl::Condition(&stopping_), backoff);
    if (stopping_) return absl::OkStatus();
    backoff = std::min(backoff * 2, kMaxBackoff);
  }
}

void ControlClient::Stop() {
  absl::MutexLock lock(&mu_);
  stopping_ = true;
  if (context_ != nullptr) context_->TryCancel();
}

absl::Status ControlClient::JoinOnce(grpc::Channel* channel, bool* welcomed) {
  Stream stream;
  stream.stub = v1::Cluster::NewStub(std::shared_ptr<grpc::Channel>(channel, [](auto*) {}));
  {
    absl::MutexLock lock(&mu_);
    if (stopping_) return absl::CancelledError("stopped");
    context_ = &stream.context;
  }
  stream.call = stream.stub->Join(&stream.context);
  v1::WorkerMessage hello;
  *hello.mutable_hello() = hello_;
  v1::CoordinatorMessage message;
  std::thread writer;
  if (stream.call->Write(hello)) {
    while (stream.call->Read(&message)) {
      if (!message.has_welcome()) {
        if (*welcomed) Receive(message);
        continue;
      }
      if (std::exchange(*welcomed, true)) continue;
      spdlog::info("{} joined the coordinator at {}", log_prefix_, coordinator_);
      absl::MutexLock lock(&mu_);
      streaming_ = true;
      beat_now_ = true;
      failures_.clear();  // of assignments given up with an earlier coordinator
      writer = std::thread(&ControlClient::WriteLoop, this, &stream);
    }
  }
  {
    absl::MutexLock lock(&mu_);
    streaming_ = false;
  }
  if (writer.joinable()) writer.join();
  stream.call->WritesDone();  // if the stream is not over yet, the coordinator ends it now
  const grpc::Status status = stream.call->Finish();
  absl::MutexLock lock(&mu_);
  context_ = nullptr;
  if (status.ok()) return absl::UnavailableError("the coordinator ended the stream");
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
}

void ControlClient::Receive(const v1::CoordinatorMessage& message) {
  if (message.has_assignment()) node_->Assign(message.assignment());
  if (message.has_release()) node_->Release(message.release());
}

void ControlClient::WriteLoop(Stream* stream) {
  absl::Time heartbeat_due = absl::Now();
  v1::WorkerMessage message;
  while (NextMessage(&message, heartbeat_due)) {
    if (message.has_heartbeat()) {
      *message.mutable_heartbeat() = node_->Heartbeat();
      heartbeat_due = absl::Now() + kHeartbeatInterval;
    }
    if (!stream->call->Write(message)) return;  // Read fails too and ends the stream
  }
}

// A failure, or an empty heartbeat to be filled in; false: the stream is over.
bool ControlClient::NextMessage(v1::WorkerMessage* message, absl::Time heartbeat_due) {
  absl::MutexLock lock(&mu_);
  const absl::Duration wait = std::min(heartbeat_due - absl::Now(), kHeartbeatInterval);
  mu_.AwaitWithTimeout(absl::Condition(this, &ControlClient::MustWrite), wait);
  if (stopping_ || !streaming_) return false;
  message->Clear();
  if (!failures_.empty()) {
    *message->mutable_assignment_failed() = std::move(failures_.front());
    failures_.pop_front();
    return true;
  }
  beat_now_ = false;
  message->mutable_heartbeat();
  return true;
}

}  // namespace stagecoach
