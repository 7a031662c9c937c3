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
#include "worker/link/stage_link.h"

namespace stagecoach {

struct WorkerOptions {
  std::string name;
  LayerStoreOptions store;
  KvType kv_type = KvType::kF16;
};

// Thread-safe.
class WorkerNode : public LinkHandler {
 public:
  // `backend` and `dialer` must outlive the node.
  WorkerNode(Backend* backend, std::shared_ptr<const ModelFile> model, LinkDialer* dialer,
             WorkerOptions options);
  ~WorkerNode() override;  // Shutdown()

  // Enters the epoch of `assignment`: breaks the links of the old one, drops its KV, keeps weights
  // that stay, starts prefetching, dials the next hop. Returns at once; progress shows in
  // Heartbeat(). An assignment of an older or equal epoch is ignored.
  void Assign(const v1::Assignment& assignment);
  void Release(const v1::Release& release);

  v1::WorkerHeartbeat Heartbeat() const;
  // Called once per assignment that could not be carried out. Set before the first Assign.
  void SetFailureCallback(std::function<void(const v1::AssignmentFailed&)> callback);

  void Shutdown();  // idempotent

  absl::Status OnLink(uint64_t link, const v1::LinkHello& hello) override;
  void OnFrame(uint64_t link, Frame frame, CreditReturn credit) override;
  void OnLinkClosed(uint64_t link, const absl::Status& reason) override;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_WORKER_NODE_H_
