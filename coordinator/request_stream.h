// One streaming call of a client and the request that the pipeline runs for it.
#ifndef STAGECOACH_COORDINATOR_REQUEST_STREAM_H_
#define STAGECOACH_COORDINATOR_REQUEST_STREAM_H_

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "coordinator/event_queue.h"
#include "coordinator/limits.h"
#include "coordinator/pipeline.h"
#include "worker/link/grpc_wire.h"

namespace stagecoach {

// A deadline of gRPC's (system clock) as the pipeline wants it.
inline absl::Time ToDeadline(std::chrono::system_clock::time_point deadline) {
  return deadline == std::chrono::system_clock::time_point::max() ? absl::InfiniteFuture()
                                                                  : absl::FromChrono(deadline);
}

// Keeps events for the client in a bounded queue and writes one after the other; events that wait
// are joined where the derived class can, so that a busy machine sends fewer messages. The call
// ends when the pipeline ends the request and all events are written; if the client goes away or
// does not read, the request is cancelled at once. Lives until both gRPC and the pipeline are done
// with it. The derived class turns what the pipeline reports (on its thread) into events.
template <typename Event>
class RequestStream : public grpc::ServerWriteReactor<Event>,
                      public RequestObserver,
                      public std::enable_shared_from_this<RequestStream<Event>> {
 public:
  // Starts the call: hands `request` to the pipeline, or ends the call with its error. Call once,
  // on an object owned by a shared_ptr; returns what the service method has to return.
  grpc::ServerWriteReactor<Event>* Start(absl::StatusOr<Request> request) {
    {
      absl::MutexLock lock(&mu_);
      self_ = this->shared_from_this();
    }
    if (!request.ok()) {
      End(request.status());
      return this;
    }
    request->deadline = ToDeadline(context_->deadline());
    const absl::StatusOr<RequestId> id =
        pipeline_->Submit(*std::move(request), this->shared_from_this());
    if (!id.ok()) {
      if (id.status().code() == absl::StatusCode::kResourceExhausted) {
        const int64_t ms = absl::ToInt64Milliseconds(pipeline_->Stats().retry_after);
        context_->AddTrailingMetadata("retry-after-ms", std::to_string(ms));
        context_->AddTrailingMetadata("grpc-retry-pushback-ms", std::to_string(ms));
      }
      End(id.status());
      return this;
    }
    absl::MutexLock lock(&mu_);
    id_ = *id;
    if (cancel_wanted_) pipeline_->Cancel(*id);
    for (int choice : finish_wanted_) pipeline_->FinishEarly(*id, choice);
    return this;
  }

  void OnWriteDone(bool ok) final {
    absl::MutexLock lock(&mu_);
    outbox_.EndWrite();
    if (!ok) Abandon(absl::CancelledError("the client is gone"));
    Progress();
  }

  void OnCancel() final {
    absl::MutexLock lock(&mu_);
    Abandon(absl::CancelledError("cancelled by the client"));
    Progress();
  }

  void OnDone() final {
    std::shared_ptr<RequestStream> last;  // destroyed outside mu_
    absl::MutexLock lock(&mu_);
    last = std::move(self_);
  }

 protected:
  // max_unread: events that may wait for the client.
  RequestStream(grpc::CallbackServerContext* context, Pipeline* pipeline, size_t max_unread)
      : context_(context), pipeline_(pipeline), max_unread_(max_unread) {}

  // Queues an event. A client that leaves more than max_unread of them unread loses its request.
  void Write(Event event) {
    absl::MutexLock lock(&mu_);
    if (ended_) return;
    if (outbox_.unread() >= max_unread_) {
      Abandon(absl::ResourceExhaustedError("the client does not read its events"));
    } else {
      outbox_.Push(std::move(event),
                   [this](Event& waiting, const Event& next) { return Join(waiting, next); });
    }
    Progress();
  }

  // Adds `next` to `waiting`, the last event queued, of which nothing has been written, unless that
  // would say something else than one after the other; then it returns false.
  virtual bool Join(Event& /*waiting*/, const Event& /*next*/) const { return false; }

  // The last event has been queued: ends the call once all are written.
  void End(const absl::Status& status) {
    absl::MutexLock lock(&mu_);
    if (ended_) return;
    ended_ = true;
    status_ = status;
    Progress();
  }

  // Has the pipeline end a choice as if a stop token had come.
  void FinishEarly(int choice) {
    absl::MutexLock lock(&mu_);
    if (id_.has_value()) {
      pipeline_->FinishEarly(*id_, choice);
    } else {
      finish_wanted_.push_back(choice);
    }
  }

 private:
  // Drops what is not being written, cancels the request and ends the call with `status`.
  void Abandon(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    outbox_.DropWaiting();
    cancel_wanted_ = true;
    if (id_.has_value()) pipeline_->Cancel(*id_);
    if (!ended_) status_ = status;
    ended_ = true;
  }

  // Starting an operation never runs a reaction on the same stack, so that it may be done under
  // mu_.
  void Progress() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (outbox_.writing() || finished_) return;
    if (!outbox_.empty()) {
      this->StartWrite(outbox_.BeginWrite());
    } else if (ended_) {
      finished_ = true;
      this->Finish(ToGrpcStatus(status_));
    }
  }

  grpc::CallbackServerContext* const context_;  // gRPC's, until Finish
  Pipeline* const pipeline_;
  const size_t max_unread_;

  absl::Mutex mu_;
  std::shared_ptr<RequestStream> self_ ABSL_GUARDED_BY(mu_);  // until OnDone
  std::optional<RequestId> id_ ABSL_GUARDED_BY(mu_);          // once submitted
  bool cancel_wanted_ ABSL_GUARDED_BY(mu_) = false;
  std::vector<int> finish_wanted_ ABSL_GUARDED_BY(mu_);  // choices, before id_ is known
  EventQueue<Event> outbox_ ABSL_GUARDED_BY(mu_);
  bool ended_ ABSL_GUARDED_BY(mu_) = false;     // Finish is to follow, with status_
  bool finished_ ABSL_GUARDED_BY(mu_) = false;  // Finish was called
  absl::Status status_ ABSL_GUARDED_BY(mu_);
};

}  // namespace stagecoach

#endif  // STAGECOACH_COORDINATOR_REQUEST_STREAM_H_
