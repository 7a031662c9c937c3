// StageLinks over gRPC: one bidirectional stream of raw byte buffers per link.
#ifndef STAGECOACH_WORKER_LINK_GRPC_LINK_H_
#define STAGECOACH_WORKER_LINK_GRPC_LINK_H_

#include <cstddef>
#include <memory>

#include "worker/link/stage_link.h"

namespace grpc {
class ServerBuilder;
}

namespace stagecoach {

// The receiving end, mounted on a server that may offer other services too.
class GrpcLinkService {
 public:
  // `handler` must outlive this object. A message over max_message_bytes breaks its link with
  // RESOURCE_EXHAUSTED.
  GrpcLinkService(LinkHandler* handler, size_t max_message_bytes);
  ~GrpcLinkService();
  // Also sets the builder's receive limit. Call before BuildAndStart.
  void Register(grpc::ServerBuilder& builder);
  // Breaks all links and waits for their last callback. Idempotent; before the server's Shutdown.
  void Shutdown();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

std::unique_ptr<LinkDialer> MakeGrpcLinkDialer(size_t max_message_bytes);

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_LINK_GRPC_LINK_H_
