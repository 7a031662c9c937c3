// The payloads of a link from device to device, beside its frames.
#ifndef STAGECOACH_WORKER_LINK_DEVICE_CHANNEL_H_
#define STAGECOACH_WORKER_LINK_DEVICE_CHANNEL_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace stagecoach {

// A stage's residual stream, which a channel reads or writes in place (kernels/backend.h:
// ResidualMemory).
struct ChannelMemory {
  float* data = nullptr;   // [floats]
  size_t floats = 0;       // that one payload has at most
  void* stream = nullptr;  // of the work on `data`; null: the host's memory
  // If not null: set to 1 before a payload that was asked for is given up, for what waits in the
  // stream goes on then.
  std::atomic<uint32_t>* spoiled = nullptr;
  int device = 0;
};

// Payloads that have been asked for and have not come yet.
inline constexpr int kReceiving = 4;

// One end. Payloads arrive in the order in which they were sent; which frame each belongs to, the
// frames say (FrameHeader.nccl_floats). One thread at a time, but for Cancel. The destructor aborts
// what is under way, in bounded time: afterwards nothing uses the memory.
class DeviceChannel {
 public:
  virtual ~DeviceChannel() = default;
  // Once, before any payload: waits until both ends have met and a first payload has crossed, so
  // that none after it allocates or connects. Errors: DEADLINE_EXCEEDED and others, saying what to
  // check; CANCELLED.
  virtual absl::Status AwaitReady() = 0;
  // The sending end: the first `floats` of the memory, as what was put into its stream before this
  // call leaves them. Waits while too many payloads are on their way. Errors: UNAVAILABLE (the
  // channel is broken for good), CANCELLED.
  virtual absl::Status Send(size_t floats) = 0;
  // The receiving end asks for a payload: behind what was put into the memory's stream before this
  // call it comes, and what is put there afterwards waits for it (and finds anything at all, with
  // ChannelMemory.spoiled set, if the channel ends first). Asks are kReceiving ahead of what has
  // come, at most: more wait. Errors: as Send.
  virtual absl::Status Receive(size_t floats) = 0;
  // How many payloads have come, ever. Errors: as Send; DEADLINE_EXCEEDED.
  virtual absl::StatusOr<uint64_t> Received() = 0;
  // Waits until all that were asked for have; in memory of the host they are only then. Errors: as
  // Received.
  virtual absl::Status AwaitReceived() = 0;
  // Any thread: calls under way, and later ones, end soon with CANCELLED, and nothing in the
  // memory's stream waits any longer. Does not wait.
  virtual void Cancel() = 0;
};

// Makes the channels of one process. Thread-safe.
class DeviceTransport {
 public:
  virtual ~DeviceTransport() = default;
  virtual std::string description() const = 0;  // "NCCL 2.28.9"
  // Names a communicator that does not exist yet: for both ends of one channel, once.
  virtual absl::StatusOr<std::string> NewId() = 0;
  // Begins to meet the other end, which must be opened with the same id; returns at once. `peer` is
  // for messages. Errors: INVALID_ARGUMENT for what is no id; UNAVAILABLE, RESOURCE_EXHAUSTED.
  virtual absl::StatusOr<std::unique_ptr<DeviceChannel>> OpenSender(const std::string& id,
                                                                    const ChannelMemory& memory,
                                                                    const std::string& peer) = 0;
  virtual absl::StatusOr<std::unique_ptr<DeviceChannel>> OpenReceiver(const std::string& id,
                                                                      const ChannelMemory& memory,
                                                                      const std::string& peer) = 0;
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_LINK_DEVICE_CHANNEL_H_
