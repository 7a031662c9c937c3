// Everything a worker process is, apart from its sockets: assignments in, heartbeats out, frames
// received on accepted links, run through the stage by one thread, and sent to the next hop.
#ifndef STAGECOACH_WORKER_WORKER_NODE_H_
#define STAGECOACH_WORKER_WORKER_NODE_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "model/model_file.h"
#include "proto/cluster.pb.h"
#include "worker/layer_store.h"
#include "worker/link/device_channel.h"
#include "worker/link/stage_link.h"

namespace stagecoach {

struct WorkerOptions {
  std::string name;
  LayerStoreOptions store;
  DeviceTransport* transport = nullptr;  // outlives the node; null: payloads go in frames only
};

// Thread-safe.
class WorkerNode : public LinkHandler {
 public:
  // `backend` and `dialer` must outlive the node.
  WorkerNode(Backend* backend, std::shared_ptr<const ModelFile> model, LinkDialer* dialer,
             WorkerOptions options);
  ~WorkerNode() override;  // Shutdown()

  // --- Set before the first Assign; called from any thread, without locks.
  // Once per assignment that could not be carried out, or could not be any longer.
  void SetFailureCallback(std::function<void(const v1::AssignmentFailed&)> callback);
  // The next heartbeat would say something that should not wait (links ready, a failure).
  void SetChangeCallback(std::function<void()> callback);

  // Enters the epoch of `assignment`: breaks the links of the old one, drops its KV, keeps weights
  // that stay, starts prefetching, dials the next hop. Returns at once; progress shows in
  // Heartbeat(). An assignment of an older or equal epoch is ignored.
  void Assign(const v1::Assignment& assignment);
  // Gives up the assignment of that epoch: links, KV and weights.
  void Release(const v1::Release& release);
  // The coordinator is gone: gives up links and KV, but keeps the weights for the next epoch.
  void LoseCoordinator();

  // Its epoch is the latest one entered, over or not; 0 before the first.
  v1::WorkerHeartbeat Heartbeat() const;
  // Of the layer store, as Prometheus text (metrics.h).
  std::string Metrics() const;

  void Shutdown();  // idempotent

  // LinkHandler. One inbound link per epoch is current, the newest; frames of others, and of other
  // epochs, are dropped and counted.
  absl::Status OnLink(uint64_t link, const v1::LinkHello& hello) override;
  void OnLinkOpened(uint64_t link, LinkBreaker breaker) override;
  void OnFrame(uint64_t link, Frame frame, CreditReturn credit) override;
  void OnLinkClosed(uint64_t link, const absl::Status& reason) override;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_WORKER_NODE_H_
