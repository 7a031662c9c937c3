// The sending end of gRPC links.
#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/support/channel_arguments.h>
#include <grpcpp/support/client_callback.h>

#include <algorithm>
#include <deque>
#include <string>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "fmt/format.h"
#include "worker/link/grpc_link.h"
#include "worker/link/grpc_wire.h"

namespace stagecoach {
namespace {

using grpc::ByteBuffer;

constexpr absl::Duration kFirstBackoff = absl::Milliseconds(10);
constexpr absl::Duration kMaxBackoff = absl::Milliseconds(250);
constexpr int kMaxReplyBytes = 4096;
constexpr uint64_t kMaxCredits = 1 << 16;  // a peer that grants more is broken

// One call. Keeps itself alive until OnDone. Neither gRPC nor on_broken is called under mu_; the
// hold that Start takes lets other threads start writes until the read side has ended.
class Call : public grpc::ClientBidiReactor<ByteBuffer, ByteBuffer>,
             public std::enable_shared_from_this<Call> {
 public:
  Call(std::shared_ptr<grpc::Channel> channel, size_t max_message_bytes,
       std::function<void(const absl::Status&)> on_broken)
      : stub_(std::move(channel)),
        max_message_bytes_(max_message_bytes),
        on_broken_(std::move(on_broken)) {}

  void Start(const ByteBuffer& hello) {
    self_ = shared_from_this();
    {
      absl::MutexLock lock(&mu_);
      writing_ = true;
    }
    outgoing_ = hello;
    stub_.PrepareBidiStreamingCall(&context_, kLinkMethod, {}, this);
    AddHold();
    StartWrite(&outgoing_);
    StartRead(&incoming_);
    StartCall();
  }

  // Waits until the peer has accepted. Errors: its refusal; DEADLINE_EXCEEDED.
  absl::Status AwaitOpened(absl::Time deadline) {
    absl::MutexLock lock(&mu_);
    if (!mu_.AwaitWithDeadline(absl::Condition(this, &Call::OpenedOrDone), deadline)) {
      return absl::DeadlineExceededError("the peer did not answer");
    }
    return opened_ ? absl::OkStatus() : status_;
  }

  absl::Status Send(const Frame& frame) {
    absl::StatusOr<ByteBuffer> message = FrameToBuffer(frame, max_message_bytes_);
    if (!message.ok()) return message.status();
    {
      absl::MutexLock lock(&mu_);
      mu_.Await(absl::Condition(this, &Call::SendMayReturn));
      if (closed_) return absl::UnavailableError("link closed");
      if (done_) return absl::UnavailableError(fmt::format("link broken: {}", status_.ToString()));
      --credits_;
      queue_.push_back(*std::move(message));
      if (!TakeForWriting()) return absl::OkStatus();
      AddHold();
    }
    StartWrite(&outgoing_);
    RemoveHold();
    return absl::OkStatus();
  }

  void Close() {
    {
      absl::MutexLock lock(&mu_);
      closed_ = true;
      queue_.clear();
      const bool within_on_broken = notifier_ == std::this_thread::get_id();
      if (!within_on_broken) mu_.Await(absl::Condition(this, &Call::NobodyNotifies));
      if (done_) return;
    }
    context_.TryCancel();
  }

 private:
  bool OpenedOrDone() const ABSL_SHARED_LOCKS_REQUIRED(mu_) { return opened_ || done_; }
  bool SendMayReturn() const ABSL_SHARED_LOCKS_REQUIRED(mu_) {
    return closed_ || done_ || (credits_ > 0 && !reads_ended_);
  }

  bool NobodyNotifies() const ABSL_SHARED_LOCKS_REQUIRED(mu_) {
    return notifier_ == std::thread::id();
  }

  // Moves the head of the queue to outgoing_ if no write is under way; then the caller starts it.
  bool TakeForWriting() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (writing_ || queue_.empty()) return false;
    writing_ = true;
    outgoing_ = std::move(queue_.front());
    queue_.pop_front();
    return true;
  }

  void OnWriteDone(bool ok) override {
    {
      absl::MutexLock lock(&mu_);
      writing_ = false;
      outgoing_.Clear();
      if (!ok || closed_ || !TakeForWriting()) return;
    }
    StartWrite(&outgoing_);
  }

  void OnReadDone(bool ok) override {
    if (ok && TakeReply()) {
      StartRead(&incoming_);
      return;
    }
    if (ok) context_.TryCancel();
    {
      absl::MutexLock lock(&mu_);
      reads_ended_ = true;
    }
    RemoveHold();
  }

  bool TakeReply() {
    const absl::StatusOr<v1::LinkReply> reply = BufferToReply(incoming_);
    incoming_.Clear();
    absl::MutexLock lock(&mu_);
    if (!reply.ok() || credits_ + reply->credits() > kMaxCredits) {
      protocol_error_ = true;
      return false;
    }
    credits_ += reply->credits();
    opened_ = true;
    return true;
  }

  void OnDone(const grpc::Status& grpc_status) override {
    const std::shared_ptr<Call> self = std::move(self_);
    absl::Status status = FromGrpcStatus(grpc_status);
    bool broken;
    {
      absl::MutexLock lock(&mu_);
      if (protocol_error_) status = absl::InternalError("the peer sent a malformed LinkReply");
      if (status.ok()) status = absl::UnavailableError("the peer ended the link");
      status_ = status;
      done_ = true;
      queue_.clear();
      broken = opened_ && !closed_ && on_broken_ != nullptr;
      if (broken) notifier_ = std::this_thread::get_id();
    }
    if (!broken) return;
    on_broken_(status);
    absl::MutexLock lock(&mu_);
    notifier_ = std::thread::id();
  }

  grpc::TemplatedGenericStub<ByteBuffer, ByteBuffer> stub_;
  const size_t max_message_bytes_;
  const std::function<void(const absl::Status&)> on_broken_;
  grpc::ClientContext context_;  // synchronises itself

  // Used by one reaction at a time.
  std::shared_ptr<Call> self_;
  ByteBuffer incoming_;
  // Owned by gRPC from StartWrite until OnWriteDone, that is while writing_.
  ByteBuffer outgoing_;

  absl::Mutex mu_;
  std::deque<ByteBuffer> queue_ ABSL_GUARDED_BY(mu_);  // bounded by the credits
  uint64_t credits_ ABSL_GUARDED_BY(mu_) = 0;
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  bool opened_ ABSL_GUARDED_BY(mu_) = false;
  bool closed_ ABSL_GUARDED_BY(mu_) = false;       // by Close
  bool reads_ended_ ABSL_GUARDED_BY(mu_) = false;  // the hold has been released
  bool protocol_error_ ABSL_GUARDED_BY(mu_) = false;
  bool done_ ABSL_GUARDED_BY(mu_) = false;
  absl::Status status_ ABSL_GUARDED_BY(mu_);       // valid once done_
  std::thread::id notifier_ ABSL_GUARDED_BY(mu_);  // is in on_broken
};

class GrpcSender : public LinkSender {
 public:
  explicit GrpcSender(std::shared_ptr<Call> call) : call_(std::move(call)) {}
  ~GrpcSender() override { call_->Close(); }
  absl::Status Send(Frame frame) override { return call_->Send(frame); }
  void Close() override { call_->Close(); }

 private:
  const std::shared_ptr<Call> call_;
};

grpc::ChannelArguments LinkChannelArguments() {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);  // one connection per link
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 20);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 1000);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 250);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS,
                   static_cast<int>(absl::ToInt64Milliseconds(kLinkKeepaliveTime)));
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS,
                   static_cast<int>(absl::ToInt64Milliseconds(kLinkKeepaliveTimeout)));
  arguments.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
  arguments.SetMaxReceiveMessageSize(kMaxReplyBytes);
  return arguments;
}

// gRPC joins its callback threads when the last channel or server goes. Calls end on those very
// threads, and the end of one may take its channel along: a thread would join itself. So one
// channel (which never connects) stays for the life of the process.
void KeepCallbackThreads() {
  struct Pin {
    std::shared_ptr<grpc::Channel> channel =
        grpc::CreateChannel("127.0.0.1:1", grpc::InsecureChannelCredentials());
    grpc::TemplatedGenericStub<ByteBuffer, ByteBuffer> stub{channel};
    grpc::ClientContext context;
    grpc::ClientBidiReactor<ByteBuffer, ByteBuffer> reactor;
    Pin() { stub.PrepareBidiStreamingCall(&context, kLinkMethod, {}, &reactor); }  // not started
  };
  static union Forever {
    Forever() : pin() {}
    ~Forever() {}  // on purpose not ~Pin
    Pin pin;
  } forever;
}

class GrpcDialer : public LinkDialer {
 public:
  explicit GrpcDialer(size_t max_message_bytes) : max_message_bytes_(max_message_bytes) {
    KeepCallbackThreads();
  }

  absl::StatusOr<std::unique_ptr<LinkSender>> Dial(
      const std::string& address, const v1::LinkHello& hello, absl::Duration timeout,
      std::function<void(const absl::Status&)> on_broken) override {
    const absl::Time deadline = absl::Now() + timeout;
    Frame frame;
    frame.header.set_epoch(hello.epoch());
    *frame.header.mutable_hello() = hello;
    const absl::StatusOr<ByteBuffer> first_message = FrameToBuffer(frame, max_message_bytes_);
    if (!first_message.ok()) return first_message.status();
    const auto channel = grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(),
                                                   LinkChannelArguments());
    absl::Duration backoff = kFirstBackoff;
    for (;;) {
      auto call = std::make_shared<Call>(channel, max_message_bytes_, on_broken);
      call->Start(*first_message);
      const absl::Status status = call->AwaitOpened(deadline);
      if (status.ok()) return std::make_unique<GrpcSender>(std::move(call));
      call->Close();
      const bool late = absl::Now() + backoff > deadline;
      if (late && (absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status))) {
        return absl::DeadlineExceededError(
            fmt::format("could not link to {}: {}", address, status.ToString()));
      }
      if (!absl::IsUnavailable(status)) return status;
      absl::SleepFor(backoff);
      backoff = std::min(backoff * 2, kMaxBackoff);
    }
  }

 private:
  const size_t max_message_bytes_;
};

}  // namespace

std::unique_ptr<LinkDialer> MakeGrpcLinkDialer(size_t max_message_bytes) {
  return std::make_unique<GrpcDialer>(max_message_bytes);
}

}  // namespace stagecoach
