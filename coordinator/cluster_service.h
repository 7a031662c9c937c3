// Cluster.Join: the control streams of all workers.
#ifndef STAGECOACH_COORDINATOR_CLUSTER_SERVICE_H_
#define STAGECOACH_COORDINATOR_CLUSTER_SERVICE_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "coordinator/registry.h"
#include "proto/cluster.grpc.pb.h"

namespace stagecoach {

// What happens on control streams. Calls come from gRPC's threads, in order for each stream, and
// must not block.
class ControlStreamHandler {
 public:
  virtual ~ControlStreamHandler() = default;
  // `peer`: its transport address, for logs.
  virtual void OnOpen(StreamId stream, const std::string& peer) = 0;
  // The next message is read only after ReadNext.
  virtual void OnMessage(StreamId stream, v1::WorkerMessage message) = 0;
  // Last call for this stream.
  virtual void OnClosed(StreamId stream, const absl::Status& reason) = 0;
};

// Thread-safe. Calls for streams that have ended are ignored.
class ClusterService : public v1::Cluster::CallbackService {
 public:
  // `handler` must outlive the last stream (Shutdown).
  explicit ClusterService(ControlStreamHandler* handler);
  ~ClusterService() override;

  grpc::ServerBidiReactor<v1::WorkerMessage, v1::CoordinatorMessage>* Join(
      grpc::CallbackServerContext* context) override;

  void ReadNext(StreamId stream);
  void Send(StreamId stream, v1::CoordinatorMessage message);
  void Close(StreamId stream, const absl::Status& reason);
  // Closes all streams with `reason`, refuses new ones, and waits at most `timeout` for their end.
  void Shutdown(const absl::Status& reason, absl::Duration timeout);

 private:
  class JoinStream;

  std::shared_ptr<JoinStream> Find(StreamId stream);
  void Remove(StreamId stream);
  bool NoStreams() const ABSL_SHARED_LOCKS_REQUIRED(mu_) { return streams_.empty(); }

  ControlStreamHandler* const handler_;

  absl::Mutex mu_;
  StreamId last_stream_ ABSL_GUARDED_BY(mu_) = 0;
  absl::Status stopped_ ABSL_GUARDED_BY(mu_);  // not ok: Shutdown's reason
  std::map<StreamId, std::shared_ptr<JoinStream>> streams_ ABSL_GUARDED_BY(mu_);  // until OnDone
};

}  // namespace stagecoach

#endif  // STAGECOACH_COORDINATOR_CLUSTER_SERVICE_H_
