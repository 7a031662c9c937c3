// One end of a channel over NCCL.
#ifndef STAGECOACH_WORKER_LINK_NCCL_NCCL_CHANNEL_H_
#define STAGECOACH_WORKER_LINK_NCCL_NCCL_CHANNEL_H_

#include <array>
#include <atomic>
#include <memory>
#include <string>
#include <string_view>

#include "absl/base/thread_annotations.h"
#include "absl/functional/function_ref.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "worker/link/nccl/nccl_transport.h"

namespace stagecoach {

// NCCL's operations go through a stream of their own, in which they may wait for the other end. The
// stream of the residual's work waits for what is received; the host polls events, with a deadline
// and with an eye on NCCL's state and on Cancel, which aborts at once: a thread may be waiting for
// that stream elsewhere.
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
  absl::StatusOr<uint64_t> Received() override;
  absl::Status AwaitReceived() override;
  void Cancel() override;

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
                    absl::FunctionRef<absl::StatusOr<bool>()> done);
  absl::Status AwaitSettled(std::string_view what, absl::Duration timeout);
  absl::Status AwaitEvent(std::string_view what, void* event, absl::Duration timeout);
  absl::Status SendWithin(size_t floats, absl::Duration timeout);
  absl::Status ReceiveWithin(size_t floats, absl::Duration timeout);
  absl::StatusOr<bool> AllReceived();  // looks at what has come
  absl::Status AwaitReceivedWithin(absl::Duration timeout);
  // On the communicator, unless it was cancelled.
  absl::Status Call(std::string_view what, absl::FunctionRef<NcclCode(NcclApi::Comm)> call);
  absl::Status Checked(NcclCode code, std::string_view what);
  absl::StatusOr<bool> Settled(std::string_view what);  // what was called last
  absl::Status GivenUp(std::string_view what) const;
  absl::Status TookTooLong(std::string_view what, absl::Duration timeout) const;
  absl::Status NotMet(const absl::Status& status) const;
  bool AbortedInTime();
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
  absl::Mutex mu_;
  NcclApi::Comm comm_ ABSL_GUARDED_BY(mu_) = nullptr;
  std::shared_ptr<absl::Notification> aborted_ ABSL_GUARDED_BY(mu_);  // it is being aborted

  // Of the one thread that uses the channel.
  void* stream_ = nullptr;
  void* ended_ = nullptr;  // event: nothing is in the stream any more
  void* ready_ = nullptr;  // receiver's events: the memory may be overwritten,
  std::array<void*, kReceiving> received_ = {};  // payload i is there, at i % kReceiving
  uint64_t asked_ = 0, came_ = 0;                // payloads; came_ as of the latest look
  absl::Time waiting_since_;                     // for payload came_, if it was asked for
  std::array<Slot, kNcclSendSlots> slots_;
  size_t next_slot_ = 0;
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_LINK_NCCL_NCCL_CHANNEL_H_
