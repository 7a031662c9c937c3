#include "coordinator/cluster_service.h"

#include <deque>
#include <utility>
#include <vector>

#include "coordinator/limits.h"
#include "worker/link/grpc_wire.h"

namespace stagecoach {
namespace {

// Messages to a worker that it has not read: it gets a handful per epoch.
constexpr size_t kMaxUnsentMessages = 64;

}  // namespace

// Starting an operation never runs a reaction on the same stack, so that operations may be started
// under mu_; this keeps them from being started after Finish.
class ClusterService::JoinStream
    : public grpc::ServerBidiReactor<v1::WorkerMessage, v1::CoordinatorMessage> {
 public:
  JoinStream(ClusterService* service, StreamId id) : service_(service), id_(id) {}

  void ReadNext() {
    absl::MutexLock lock(&mu_);
    if (!finished_) StartRead(&in_);
  }

  void Send(v1::CoordinatorMessage message) {
    absl::MutexLock lock(&mu_);
    if (closing_) return;
    if (outbox_.size() >= kMaxUnsentMessages) {
      closing_ = true;
      reason_ = absl::ResourceExhaustedError("the worker does not read its messages");
    } else {
      outbox_.push_back(std::move(message));
    }
    Progress();
  }

  void Close(const absl::Status& reason) {
    absl::MutexLock lock(&mu_);
    if (closing_) return;
    closing_ = true;
    reason_ = reason;
    Progress();
  }

  void OnReadDone(bool ok) override {
    if (!ok) {
      service_->handler_->OnClosed(id_, absl::OkStatus());
      Close(absl::CancelledError("the worker closed its control stream"));
      return;
    }
    if (in_.ByteSizeLong() > kMaxWorkerMessageBytes) {
      const absl::Status reason = absl::ResourceExhaustedError("worker message over the bound");
      service_->handler_->OnClosed(id_, reason);
      Close(reason);
      return;
    }
    service_->handler_->OnMessage(id_, std::move(in_));
  }

  void OnWriteDone(bool ok) override {
    absl::MutexLock lock(&mu_);
    writing_ = false;
    if (ok) outbox_.pop_front();
    if (!ok && !closing_) {
      closing_ = true;
      reason_ = absl::CancelledError("the control stream broke");
    }
    Progress();
  }

  void OnDone() override { service_->Remove(id_); }

 private:
  // Writes what waits, then finishes if asked to.
  void Progress() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (writing_ || finished_) return;
    if (closing_) {
      finished_ = true;
      Finish(ToGrpcStatus(reason_));
    } else if (!outbox_.empty()) {
      writing_ = true;
      StartWrite(&outbox_.front());
    }
  }

  ClusterService* const service_;
  const StreamId id_;
  v1::WorkerMessage in_;  // gRPC's while a read is under way, else the handler's

  absl::Mutex mu_;
  std::deque<v1::CoordinatorMessage> outbox_ ABSL_GUARDED_BY(mu_);  // front: being written
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  bool closing_ ABSL_GUARDED_BY(mu_) = false;   // Finish is to follow, with reason_
  bool finished_ ABSL_GUARDED_BY(mu_) = false;  // Finish was called
  absl::Status reason_ ABSL_GUARDED_BY(mu_);
};

ClusterService::ClusterService(ControlStreamHandler* handler) : handler_(handler) {}
ClusterService::~ClusterService() = default;

grpc::ServerBidiReactor<v1::WorkerMessage, v1::CoordinatorMessage>* ClusterService::Join(
    grpc::CallbackServerContext* context) {
  std::shared_ptr<JoinStream> stream;
  StreamId id = 0;
  absl::Status refusal;
  {
    absl::MutexLock lock(&mu_);
    id = ++last_stream_;
    stream = std::make_shared<JoinStream>(this, id);
    streams_[id] = stream;
    refusal = stopped_;
  }
  if (refusal.ok()) {
    handler_->OnOpen(id, context->peer());
    stream->ReadNext();
  } else {
    stream->Close(refusal);
  }
  return stream.get();  // streams_ keeps it until OnDone, which follows only after this call
}

std::shared_ptr<ClusterService::JoinStream> ClusterService::Find(StreamId stream) {
  absl::MutexLock lock(&mu_);
  auto it = streams_.find(stream);
  return it == streams_.end() ? nullptr : it->second;
}

void ClusterService::Remove(StreamId stream) {
  std::shared_ptr<JoinStream> last;  // destroyed outside mu_
  absl::MutexLock lock(&mu_);
  auto it = streams_.find(stream);
  if (it == streams_.end()) return;
  last = std::move(it->second);
  streams_.erase(it);
}

void ClusterService::ReadNext(StreamId stream) {
  if (auto found = Find(stream)) found->ReadNext();
}

void ClusterService::Send(StreamId stream, v1::CoordinatorMessage message) {
  if (auto found = Find(stream)) found->Send(std::move(message));
}

void ClusterService::Close(StreamId stream, const absl::Status& reason) {
  if (auto found = Find(stream)) found->Close(reason);
}

void ClusterService::Shutdown(const absl::Status& reason, absl::Duration timeout) {
  std::vector<std::shared_ptr<JoinStream>> streams;
  {
    absl::MutexLock lock(&mu_);
    stopped_ = reason;
    for (const auto& [id, stream] : streams_) streams.push_back(stream);
  }
  for (const auto& stream : streams) stream->Close(reason);
  streams.clear();
  absl::MutexLock lock(&mu_);
  mu_.AwaitWithTimeout(absl::Condition(this, &ClusterService::NoStreams), timeout);
}

}  // namespace stagecoach
