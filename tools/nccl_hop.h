// Payloads to and fro between two processes, from device to device: one leads and measures, the
// other follows until it is told to end.
#ifndef STAGECOACH_TOOLS_NCCL_HOP_H_
#define STAGECOACH_TOOLS_NCCL_HOP_H_

#include <cstddef>
#include <functional>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "worker/link/device_channel.h"

namespace stagecoach {

// Round trips before those that are measured, and whose pace says how many these can be.
inline constexpr int kHopWarmUp = 20;
// The leader's order goes ahead of payloads, as one of them: their floats and how many come.
inline constexpr size_t kHopOrderFloats = 2;

// What one of the two processes has, ready and all on the same memory.
struct HopEnd {
  DeviceChannel* out = nullptr;
  DeviceChannel* in = nullptr;
  size_t floats = 0;  // that the memory holds
  // The first kHopOrderFloats of the memory, from and to the host; all work on them has ended then.
  std::function<absl::Status(std::span<const float>)> write;
  std::function<absl::Status(std::span<float>)> read;
};

// Round trips of payloads of `floats`, in microseconds, in the order in which they were: `count`,
// or as many as `limit` allows at the pace of the warm-up, but one at least. Errors:
// INVALID_ARGUMENT for more floats than there are; those of the channels.
absl::StatusOr<std::vector<double>> LeadHop(HopEnd& end, size_t floats, int count,
                                            absl::Duration limit);
// The other process returns from FollowHop.
absl::Status EndHop(HopEnd& end);

// Sends back what comes, as the leader orders. Errors: those of the channels; DATA_LOSS for an
// order that makes no sense.
absl::Status FollowHop(HopEnd& end);

}  // namespace stagecoach

#endif  // STAGECOACH_TOOLS_NCCL_HOP_H_
