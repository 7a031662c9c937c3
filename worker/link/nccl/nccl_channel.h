// One end of a channel over NCCL.
#ifndef STAGECOACH_WORKER_LINK_NCCL_NCCL_CHANNEL_H_
#define STAGECOACH_WORKER_LINK_NCCL_NCCL_CHANNEL_H_

#include <array>
#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "worker/link/nccl/nccl_transport.h"

namespace stagecoach {

// NCCL's operations go through a stream of their own, in which they may wait for the other end; the
// stream of the residual's work never waits for it: the host polls events, with a deadline and with
// an eye on NCCL's state and on Cancel.
class NcclChannel : public DeviceChannel {
 public:
  enum class Rank { kSender = 0, kReceiver = 1 };

  NcclChannel(std::shared_ptr<NcclApi> nccl, std::shared_ptr<DeviceApi> device, NcclOptions options,
              Rank rank, const ChannelMemory& memory, std::string peer);
  ~NcclChannel() override;
  NcclChannel(const NcclChannel&) = delete;
  NcclChannel& operator=(const NcclChannel&) = delete;

  absl::Status Begin(const NcclId& id);  // call once, before all else

  absl::Status AwaitReady() override;
  absl::Status Send(size_t floats) override;
  absl::Status Receive(size_t floats) override;
  void Cancel() override { cancelled_ = true; }

 private:
  // The sender's copies of payloads on their way.
  struct Slot {
    float* data = nullptr;
    void* copied = nullptr;  // events
    void* sent = nullptr;
    bool used = false;
  };
  // Until done() is true. Errors: CANCELLED; UNAVAILABLE once NCCL reports an error; those of done;
  // DEADLINE_EXCEEDED.
  absl::Status Poll(std::string_view what, absl::Duration timeout,
                    const std::function<absl::StatusOr<bool>()>& done);
  absl::Status AwaitSettled(std::string_view what, absl::Duration timeout);
  absl::Status AwaitEvent(std::string_view what, void* event, absl::Duration timeout);
  absl::Status SendWithin(size_t floats, absl::Duration timeout);
  absl::Status ReceiveWithin(size_t floats, absl::Duration timeout);
  absl::Status Check(NcclCode code, std::string_view what);
  absl::Status NotMet(const absl::Status& status) const;
  bool AbortInTime();
  bool StreamEndsInTime();
  void Stuck() const;

  // Constant after construction.
  const std::shared_ptr<NcclApi> nccl_;
  const std::shared_ptr<DeviceApi> device_;
  const NcclOptions options_;
  const Rank rank_;
  const ChannelMemory memory_;
  const std::string peer_;

  std::atomic<bool> cancelled_ = false;

  // Of the one thread that uses the channel.
  NcclApi::Comm comm_ = nullptr;
  void* stream_ = nullptr;
  void* ended_ = nullptr;     // event: nothing is in the stream any more
  void* ready_ = nullptr;     // receiver's events: the memory may be overwritten,
  void* received_ = nullptr;  // the payload is there
  std::array<Slot, kNcclSendSlots> slots_;
  size_t next_slot_ = 0;
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_LINK_NCCL_NCCL_CHANNEL_H_
