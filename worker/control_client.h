// The worker's side of Cluster.Join: joins, beats, carries out assignments, and joins again for as
// long as it takes.
#ifndef STAGECOACH_WORKER_CONTROL_CLIENT_H_
#define STAGECOACH_WORKER_CONTROL_CLIENT_H_

#include <deque>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "proto/cluster.pb.h"
#include "worker/worker_node.h"

namespace grpc {
class Channel;
class ClientContext;
}  // namespace grpc

namespace stagecoach {

inline constexpr absl::Duration kHeartbeatInterval = absl::Milliseconds(500);

// Thread-safe; Run is called once.
class ControlClient {
 public:
  // Sets the node's callbacks. `node` must outlive the client and must not be assigned before.
  ControlClient(std::string coordinator, v1::WorkerHello hello, WorkerNode* node);
  ~ControlClient();

  // Serves until Stop (Ok) or until joining again cannot help: FAILED_PRECONDITION or
  // INVALID_ARGUMENT when the coordinator refuses this worker, ABORTED when another process has
  // joined under its name. While the coordinator is away the node keeps its weights.
  absl::Status Run();
  void Stop();  // idempotent, any thread

 private:
  struct Stream;

  // One stream from dial to end; sets *welcomed if the coordinator accepted.
  absl::Status JoinOnce(grpc::Channel* channel, bool* welcomed);
  void Receive(const v1::CoordinatorMessage& message);
  void WriteLoop(Stream* stream);
  bool NextMessage(v1::WorkerMessage* message, absl::Time heartbeat_due);
  bool MustWrite() const ABSL_SHARED_LOCKS_REQUIRED(mu_) {
    return stopping_ || !streaming_ || beat_now_ || !failures_.empty();
  }

  const std::string coordinator_;
  const v1::WorkerHello hello_;
  const std::string log_prefix_;  // "[w0]"
  WorkerNode* const node_;

  absl::Mutex mu_;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  bool streaming_ ABSL_GUARDED_BY(mu_) = false;  // the write loop may write
  bool beat_now_ ABSL_GUARDED_BY(mu_) = false;
  grpc::ClientContext* context_ ABSL_GUARDED_BY(mu_) = nullptr;  // of the stream, if there is one
  std::deque<v1::AssignmentFailed> failures_ ABSL_GUARDED_BY(mu_);  // at most one per assignment
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_CONTROL_CLIENT_H_
