// The receiving end of gRPC links. The sending end is grpc_dialer.cc.
#include "worker/link/grpc_link.h"

#include <grpcpp/alarm.h>
#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/server_builder.h>

#include <chrono>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "fmt/format.h"
#include "worker/link/grpc_wire.h"

namespace stagecoach {
namespace {

constexpr size_t kMaxLinks = 64;                             // of one process
constexpr std::chrono::seconds kHelloTimeout{5};             // for the first frame of a link
constexpr uint32_t kCreditBatch = 16;                        // frames per LinkReply
constexpr absl::Duration kShutdownGrace = absl::Seconds(1);  // then links are cancelled

// Ends a call that is not (or no longer) wanted.
class Refusal : public grpc::ServerGenericBidiReactor {
 public:
  explicit Refusal(const absl::Status& status) { Finish(ToGrpcStatus(status)); }
  void OnDone() override { delete this; }
};

}  // namespace

class GrpcLinkService::Impl : public grpc::CallbackGenericService {
 public:
  Impl(LinkHandler* handler, size_t max_message_bytes)
      : handler_(handler), max_message_bytes_(max_message_bytes) {}

  grpc::ServerGenericBidiReactor* CreateReactor(
      grpc::GenericCallbackServerContext* context) override;
  void Shutdown();

  LinkHandler* handler() const { return handler_; }
  size_t max_message_bytes() const { return max_message_bytes_; }

 private:
  class ServerLink;

  void Remove(uint64_t id) {
    absl::MutexLock lock(&mu_);
    links_.erase(id);
  }
  std::vector<std::shared_ptr<ServerLink>> Links() {
    absl::MutexLock lock(&mu_);
    std::vector<std::shared_ptr<ServerLink>> links;
    for (const auto& [id, link] : links_) links.push_back(link);
    return links;
  }
  bool AwaitNoLinks(absl::Duration timeout) {
    absl::MutexLock lock(&mu_);
    return mu_.AwaitWithTimeout(absl::Condition(this, &Impl::NoLinks), timeout);
  }
  bool NoLinks() const ABSL_SHARED_LOCKS_REQUIRED(mu_) { return links_.empty(); }

  LinkHandler* const handler_;
  const size_t max_message_bytes_;

  absl::Mutex mu_;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  std::map<uint64_t, std::shared_ptr<ServerLink>> links_ ABSL_GUARDED_BY(mu_);  // until OnDone
};

// One accepted call. Neither the handler nor gRPC is ever called under mu_; `starting_` counts the
// threads that are about to start an operation, and the last of them finishes the call if that
// has been asked for meanwhile (no operation may be started after Finish).
class GrpcLinkService::Impl::ServerLink : public grpc::ServerGenericBidiReactor,
                                          public std::enable_shared_from_this<ServerLink> {
 public:
  ServerLink(Impl* service, grpc::GenericCallbackServerContext* context)
      : service_(service), context_(context) {}

  uint64_t id() const { return id_; }

  void Start() {
    hello_alarm_.Set(std::chrono::system_clock::now() + kHelloTimeout,
                     [weak = weak_from_this()](bool expired) {
                       auto link = weak.lock();
                       if (expired && link != nullptr) {
                         link->Break(absl::DeadlineExceededError("no LinkHello came"));
                       }
                     });
    ReadNext();
  }

  void Break(const absl::Status& reason) {
    bool finish;
    {
      absl::MutexLock lock(&mu_);
      if (ending_) return;
      ending_ = true;
      reason_ = reason;
      finish = starting_ == 0;
    }
    if (finish) Finish(ToGrpcStatus(reason));
  }

  void Cancel() {
    absl::MutexLock lock(&mu_);
    if (!done_) context_->TryCancel();  // reactions come on other threads
  }

 private:
  // Brackets every Start call; false: the call is ending and nothing may be started.
  bool BeginStart() {
    absl::MutexLock lock(&mu_);
    if (ending_) return false;
    ++starting_;
    return true;
  }
  void EndStart() {
    absl::Status reason;
    {
      absl::MutexLock lock(&mu_);
      if (--starting_ > 0 || !ending_) return;
      reason = reason_;
    }
    Finish(ToGrpcStatus(reason));
  }

  void ReadNext() {
    if (!BeginStart()) return;
    StartRead(&incoming_);
    EndStart();
  }

  void OnReadDone(bool ok) override {
    if (!ok) return Break(absl::CancelledError("closed by the sender"));
    absl::StatusOr<Frame> frame = BufferToFrame(incoming_, service_->max_message_bytes());
    incoming_.Clear();
    absl::Status status = frame.status();
    if (status.ok()) status = accepted_ ? TakeFrame(*std::move(frame)) : TakeHello(*frame);
    if (!status.ok()) return Break(status);
    Grant();
    ReadNext();
  }

  absl::Status TakeHello(const Frame& frame) {
    hello_alarm_.Cancel();
    if (!frame.header.has_hello() || !frame.payload.values().empty()) {
      return absl::InvalidArgumentError("the first frame of a link must be a LinkHello");
    }
    absl::Status accepted = service_->handler()->OnLink(id_, frame.header.hello());
    if (!accepted.ok()) return accepted;
    accepted_ = true;
    service_->handler()->OnLinkOpened(id_, [weak = weak_from_this()](const absl::Status& reason) {
      if (auto link = weak.lock()) link->Break(reason);
    });
    absl::MutexLock lock(&mu_);
    to_grant_ = kLinkCredits;
    return absl::OkStatus();
  }

  absl::Status TakeFrame(Frame frame) {
    {
      absl::MutexLock lock(&mu_);
      if (sender_credits_ == 0) return absl::ResourceExhaustedError("frame sent without credit");
      --sender_credits_;
    }
    service_->handler()->OnFrame(id_, std::move(frame), CreditReturn([self = shared_from_this()] {
                                   {
                                     absl::MutexLock lock(&self->mu_);
                                     ++self->to_grant_;
                                   }
                                   self->Grant();
                                 }));
    return absl::OkStatus();
  }

  // Tells the sender of credits given back, in batches while it has enough of them.
  void Grant() {
    {
      absl::MutexLock lock(&mu_);
      const bool due = to_grant_ >= kCreditBatch || sender_credits_ <= kCreditBatch;
      if (ending_ || writing_ || to_grant_ == 0 || !due) return;
      v1::LinkReply reply;
      reply.set_credits(to_grant_);
      sender_credits_ += std::exchange(to_grant_, 0);
      outgoing_ = ReplyToBuffer(reply);
      writing_ = true;
      ++starting_;
    }
    StartWrite(&outgoing_);
    EndStart();
  }

  void OnWriteDone(bool ok) override {
    {
      absl::MutexLock lock(&mu_);
      writing_ = false;
    }
    if (ok) Grant();  // else the pending read fails too, and ends the link
  }

  void OnDone() override {
    hello_alarm_.Cancel();
    absl::Status reason;
    {
      absl::MutexLock lock(&mu_);
      done_ = true;
      reason = reason_;
    }
    if (accepted_) service_->handler()->OnLinkClosed(id_, reason);
    service_->Remove(id_);  // may destroy this
  }

  const uint64_t id_ = NextLinkId();
  Impl* const service_;
  grpc::GenericCallbackServerContext* const context_;  // valid until OnDone returns

  // Used by one reaction at a time.
  grpc::ByteBuffer incoming_;
  bool accepted_ = false;
  grpc::Alarm hello_alarm_;

  // Owned by gRPC from StartWrite until OnWriteDone, that is while writing_.
  grpc::ByteBuffer outgoing_;

  absl::Mutex mu_;
  int starting_ ABSL_GUARDED_BY(mu_) = 0;
  bool ending_ ABSL_GUARDED_BY(mu_) = false;  // Finish was called, or will be by EndStart
  bool done_ ABSL_GUARDED_BY(mu_) = false;
  absl::Status reason_ ABSL_GUARDED_BY(mu_);
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  uint32_t sender_credits_ ABSL_GUARDED_BY(mu_) = 0;  // granted and not yet used
  uint32_t to_grant_ ABSL_GUARDED_BY(mu_) = 0;        // given back and not yet granted
};

grpc::ServerGenericBidiReactor* GrpcLinkService::Impl::CreateReactor(
    grpc::GenericCallbackServerContext* context) {
  if (context->method() != kLinkMethod) {
    return new Refusal(absl::UnimplementedError("no such method"));
  }
  auto link = std::make_shared<ServerLink>(this, context);
  {
    absl::MutexLock lock(&mu_);
    if (stopping_) return new Refusal(absl::UnavailableError("shutting down"));
    if (links_.size() >= kMaxLinks) {
      return new Refusal(absl::ResourceExhaustedError("too many links"));
    }
    links_[link->id()] = link;
  }
  link->Start();
  return link.get();
}

void GrpcLinkService::Impl::Shutdown() {
  {
    absl::MutexLock lock(&mu_);
    stopping_ = true;
  }
  for (const auto& link : Links()) link->Break(absl::UnavailableError("shutting down"));
  if (AwaitNoLinks(kShutdownGrace)) return;
  for (const auto& link : Links()) link->Cancel();
  AwaitNoLinks(absl::InfiniteDuration());
}

GrpcLinkService::GrpcLinkService(LinkHandler* handler, size_t max_message_bytes)
    : impl_(std::make_unique<Impl>(handler, max_message_bytes)) {}

GrpcLinkService::~GrpcLinkService() { Shutdown(); }

void GrpcLinkService::Register(grpc::ServerBuilder& builder) {
  builder.RegisterCallbackGenericService(impl_.get());
  builder.SetMaxReceiveMessageSize(static_cast<int>(impl_->max_message_bytes()));
  // Limits are on bytes as received, so nothing may grow after that check.
  builder.SetCompressionAlgorithmSupportStatus(GRPC_COMPRESS_DEFLATE, false);
  builder.SetCompressionAlgorithmSupportStatus(GRPC_COMPRESS_GZIP, false);
  const auto set = [&builder](const char* name, int64_t value) {
    builder.AddChannelArgument(name, static_cast<int>(value));
  };
  set(GRPC_ARG_KEEPALIVE_TIME_MS, absl::ToInt64Milliseconds(kLinkKeepaliveTime));
  set(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, absl::ToInt64Milliseconds(kLinkKeepaliveTimeout));
  set(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  set(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  set(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 1000);
  set(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  set(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, kLinkLookaheadBytes);
  set(GRPC_ARG_HTTP2_MAX_FRAME_SIZE, kLinkHttp2FrameBytes);
}

void GrpcLinkService::Shutdown() { impl_->Shutdown(); }

}  // namespace stagecoach
