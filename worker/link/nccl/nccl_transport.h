// Channels over NCCL: one communicator of two ranks for each pair of neighbouring stages, so that a
// pair fails alone. A communicator lives as long as its epoch: what breaks is aborted, and made
// anew in the next one.
#ifndef STAGECOACH_WORKER_LINK_NCCL_NCCL_TRANSPORT_H_
#define STAGECOACH_WORKER_LINK_NCCL_NCCL_TRANSPORT_H_

#include <functional>
#include <memory>

#include "absl/time/time.h"
#include "worker/link/device_channel.h"
#include "worker/link/nccl/nccl_api.h"

namespace stagecoach {

// Payloads copied out of the residual stream and not yet taken by the next stage.
inline constexpr int kNcclSendSlots = 4;

struct NcclOptions {
  // Below the coordinator's kLinkTimeout, so that its reason is the one that is told.
  absl::Duration init_timeout = absl::Seconds(10);
  // For one payload whose frame has come (the stages before may yet have to compute it), or for a
  // slot: the other end is alive, but does nothing.
  absl::Duration transfer_timeout = absl::Seconds(30);
  // NCCL waits then for the steps that are with the device, too.
  absl::Duration abort_timeout = absl::Seconds(5);
  // A communicator could not be aborted in time: its kernels may use their memory for ever, which
  // nothing but the end of the process makes free. Null: that memory is left as it is.
  std::function<void(const absl::Status&)> on_stuck = nullptr;
};

std::unique_ptr<DeviceTransport> MakeNcclTransport(std::shared_ptr<NcclApi> nccl,
                                                   std::shared_ptr<DeviceApi> device,
                                                   NcclOptions options);

// With the NCCL library of this machine (libnccl.so.2, loaded now). Errors: UNAVAILABLE if there is
// none, or in a program built without CUDA; FAILED_PRECONDITION if it is too old.
absl::StatusOr<std::unique_ptr<DeviceTransport>> OpenNccl(NcclOptions options);

// What NCCL takes for one host: NCCL_HOSTID if it is set, else names this boot of this machine.
std::string NcclHostId();

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_LINK_NCCL_NCCL_TRANSPORT_H_
