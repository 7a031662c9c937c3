#include "worker/link/nccl/nccl_channel.h"

#include <cstdlib>
#include <thread>
#include <utility>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "fmt/format.h"
#include "model/status_macros.h"
#include "worker/link/spin_wait.h"

namespace stagecoach {
namespace {

// Between looks, once kSpinTime has passed: what takes so long is no payload of one decode step.
constexpr absl::Duration kPollInterval = absl::Microseconds(50);

constexpr char kReceivingName[] = "receiving by NCCL";

std::string Interface() {
  const char* const name = std::getenv("NCCL_SOCKET_IFNAME");
  return name == nullptr ? "the interface that NCCL chose (NCCL_SOCKET_IFNAME is not set)"
                         : fmt::format("interface '{}' (NCCL_SOCKET_IFNAME)", name);
}

}  // namespace

NcclChannel::NcclChannel(std::shared_ptr<NcclApi> nccl, std::shared_ptr<DeviceApi> device,
                         NcclOptions options, Rank rank, const ChannelMemory& memory,
                         std::string peer)
    : nccl_(std::move(nccl)),
      device_(std::move(device)),
      options_(std::move(options)),
      rank_(rank),
      memory_(memory),
      peer_(std::move(peer)) {}

NcclChannel::~NcclChannel() {
  Cancel();
  if (!device_->Use(memory_.device).ok()) return;
  if (!AbortedInTime() || !StreamEndsInTime()) {
    Stuck();
    return;
  }
  if (stream_ != nullptr) device_->FreeStream(stream_);
  for (Slot& slot : slots_) {
    if (slot.copied != nullptr) device_->FreeEvent(slot.copied);
    if (slot.sent != nullptr) device_->FreeEvent(slot.sent);
    if (slot.data != nullptr) device_->FreeBuffer(slot.data);
  }
  for (void* event : received_) {
    if (event != nullptr) device_->FreeEvent(event);
  }
  for (void* event : {ready_, ended_}) {
    if (event != nullptr) device_->FreeEvent(event);
  }
}

// The memory may still be in use.
void NcclChannel::Stuck() const {
  if (!options_.on_stuck) return;
  options_.on_stuck(absl::InternalError(
      fmt::format("the NCCL communicator with {} could not be aborted within {}", peer_,
                  absl::FormatDuration(options_.abort_timeout))));
}

void NcclChannel::Cancel() {
  cancelled_ = true;
  absl::MutexLock lock(&mu_);
  NcclApi::Comm const comm = std::exchange(comm_, nullptr);
  if (comm == nullptr) return;
  if (rank_ == Rank::kReceiver && memory_.spoiled != nullptr) *memory_.spoiled = 1;
  aborted_ = std::make_shared<absl::Notification>();
  std::thread([nccl = nccl_, device = device_, index = memory_.device, comm, aborted = aborted_] {
    if (device->Use(index).ok()) nccl->Abort(comm);
    aborted->Notify();
  }).detach();
}

bool NcclChannel::AbortedInTime() {
  std::shared_ptr<absl::Notification> aborted;
  {
    absl::MutexLock lock(&mu_);
    aborted = aborted_;
  }
  return aborted == nullptr || aborted->WaitForNotificationWithTimeout(options_.abort_timeout);
}

// What the abort has ended has left the stream.
bool NcclChannel::StreamEndsInTime() {
  if (ended_ == nullptr || !device_->Record(ended_, stream_).ok()) return true;
  const absl::Time deadline = absl::Now() + options_.abort_timeout;
  for (;;) {
    const absl::StatusOr<bool> reached = device_->Reached(ended_);
    if (!reached.ok() || *reached) return true;  // a device that fails does nothing more
    if (absl::Now() > deadline) return false;
    absl::SleepFor(kPollInterval);
  }
}

absl::Status NcclChannel::Begin(const NcclId& id) {
  STAGECOACH_RETURN_IF_ERROR(device_->Use(memory_.device));
  const auto make = [](auto made, auto* out) {
    if (made.ok()) *out = *made;
    return made.status();
  };
  STAGECOACH_RETURN_IF_ERROR(make(device_->NewStream(), &stream_));
  STAGECOACH_RETURN_IF_ERROR(make(device_->NewEvent(), &ended_));
  if (rank_ == Rank::kReceiver) {
    STAGECOACH_RETURN_IF_ERROR(make(device_->NewEvent(), &ready_));
    for (void*& event : received_) STAGECOACH_RETURN_IF_ERROR(make(device_->NewEvent(), &event));
  } else {
    for (Slot& slot : slots_) {
      STAGECOACH_RETURN_IF_ERROR(make(device_->NewEvent(), &slot.copied));
      STAGECOACH_RETURN_IF_ERROR(make(device_->NewEvent(), &slot.sent));
      STAGECOACH_RETURN_IF_ERROR(make(device_->NewBuffer(memory_.floats), &slot.data));
    }
  }
  absl::MutexLock lock(&mu_);
  return Checked(nccl_->Init(&comm_, id, static_cast<int>(rank_)), "ncclCommInitRankConfig");
}

absl::Status NcclChannel::Call(std::string_view what,
                               absl::FunctionRef<NcclCode(NcclApi::Comm)> call) {
  absl::MutexLock lock(&mu_);
  return comm_ == nullptr ? GivenUp(what) : Checked(call(comm_), what);
}

absl::Status NcclChannel::Checked(NcclCode code, std::string_view what) {
  if (code == NcclCode::kSuccess || code == NcclCode::kInProgress) return absl::OkStatus();
  return absl::UnavailableError(fmt::format("NCCL with {}: {} failed with code {}: {}", peer_, what,
                                            static_cast<int>(code), nccl_->LastError()));
}

absl::StatusOr<bool> NcclChannel::Settled(std::string_view what) {
  NcclCode state = NcclCode::kSuccess;
  STAGECOACH_RETURN_IF_ERROR(Call("ncclCommGetAsyncError", [&](NcclApi::Comm comm) {
    return nccl_->AsyncError(comm, &state);
  }));
  STAGECOACH_RETURN_IF_ERROR(Checked(state, what));
  return state == NcclCode::kSuccess;
}

absl::Status NcclChannel::GivenUp(std::string_view what) const {
  return absl::CancelledError(fmt::format("{} with {} was given up", what, peer_));
}

absl::Status NcclChannel::TookTooLong(std::string_view what, absl::Duration timeout) const {
  return absl::DeadlineExceededError(
      fmt::format("{} with {} took more than {}", what, peer_, absl::FormatDuration(timeout)));
}

absl::Status NcclChannel::Poll(std::string_view what, absl::Duration timeout,
                               absl::FunctionRef<absl::StatusOr<bool>()> done) {
  const absl::Time start = absl::Now();
  for (;;) {
    if (cancelled_) return GivenUp(what);
    const absl::StatusOr<bool> end = done();
    if (!end.ok()) return end.status();
    if (*end) return absl::OkStatus();
    STAGECOACH_RETURN_IF_ERROR(Settled(what).status());
    const absl::Duration waited = absl::Now() - start;
    if (waited > timeout) return TookTooLong(what, timeout);
    if (waited < absl::FromChrono(kSpinTime)) {
      std::this_thread::yield();
    } else {
      absl::SleepFor(kPollInterval);
    }
  }
}

absl::Status NcclChannel::AwaitSettled(std::string_view what, absl::Duration timeout) {
  return Poll(what, timeout, [this, what] { return Settled(what); });
}

absl::Status NcclChannel::AwaitEvent(std::string_view what, void* event, absl::Duration timeout) {
  return Poll(what, timeout, [this, event] { return device_->Reached(event); });
}

absl::Status NcclChannel::NotMet(const absl::Status& status) const {
  if (absl::IsCancelled(status)) return status;
  return absl::Status(
      status.code(),
      fmt::format("{}; over {}. Check that both hosts reach each other there, that no firewall "
                  "blocks it, and that NCCL_SOCKET_IFNAME names the right interface on both; "
                  "NCCL_DEBUG=INFO says more, --transport grpc does without",
                  std::string_view(status.message().data(), status.message().size()), Interface()));
}

absl::Status NcclChannel::AwaitReady() {
  STAGECOACH_RETURN_IF_ERROR(device_->Use(memory_.device));
  absl::Status status = AwaitSettled("setting up NCCL", options_.init_timeout);
  if (status.ok()) {
    status = rank_ == Rank::kSender ? SendWithin(memory_.floats, options_.init_timeout)
                                    : ReceiveWithin(memory_.floats, options_.init_timeout);
  }
  if (status.ok() && rank_ == Rank::kReceiver) {
    status = AwaitReceivedWithin(options_.init_timeout);
    asked_ = came_ = 0;  // it does not count
  }
  if (status.ok() && rank_ == Rank::kSender) {
    status = AwaitEvent("the first NCCL payload", slots_[0].sent, options_.init_timeout);
  }
  return status.ok() ? status : NotMet(status);
}

absl::Status NcclChannel::Send(size_t floats) {
  return SendWithin(floats, options_.transfer_timeout);
}
absl::Status NcclChannel::Receive(size_t floats) {
  return ReceiveWithin(floats, options_.transfer_timeout);
}

absl::Status NcclChannel::SendWithin(size_t floats, absl::Duration timeout) {
  STAGECOACH_RETURN_IF_ERROR(device_->Use(memory_.device));
  Slot& slot = slots_[next_slot_];
  next_slot_ = (next_slot_ + 1) % slots_.size();
  if (slot.used) {
    STAGECOACH_RETURN_IF_ERROR(AwaitEvent("sending by NCCL", slot.sent, timeout));
  }
  STAGECOACH_RETURN_IF_ERROR(device_->Copy(slot.data, memory_.data, floats, memory_.stream));
  STAGECOACH_RETURN_IF_ERROR(device_->Record(slot.copied, memory_.stream));
  STAGECOACH_RETURN_IF_ERROR(device_->Await(stream_, slot.copied));
  STAGECOACH_RETURN_IF_ERROR(Call("ncclSend", [&](NcclApi::Comm comm) {
    return nccl_->Send(comm, slot.data, floats, stream_);
  }));
  STAGECOACH_RETURN_IF_ERROR(AwaitSettled("ncclSend", timeout));
  slot.used = true;
  return device_->Record(slot.sent, stream_);
}

absl::Status NcclChannel::ReceiveWithin(size_t floats, absl::Duration timeout) {
  STAGECOACH_RETURN_IF_ERROR(device_->Use(memory_.device));
  if (asked_ - came_ == kReceiving) STAGECOACH_RETURN_IF_ERROR(AwaitReceivedWithin(timeout));
  STAGECOACH_RETURN_IF_ERROR(device_->Record(ready_, memory_.stream));
  STAGECOACH_RETURN_IF_ERROR(device_->Await(stream_, ready_));
  STAGECOACH_RETURN_IF_ERROR(Call("ncclRecv", [&](NcclApi::Comm comm) {
    return nccl_->Receive(comm, memory_.data, floats, stream_);
  }));
  STAGECOACH_RETURN_IF_ERROR(AwaitSettled("ncclRecv", timeout));
  void* const received = received_[asked_ % kReceiving];
  STAGECOACH_RETURN_IF_ERROR(device_->Record(received, stream_));
  if (asked_++ == came_) waiting_since_ = absl::Now();
  if (memory_.stream == nullptr) return absl::OkStatus();
  return device_->Await(memory_.stream, received);
}

absl::StatusOr<bool> NcclChannel::AllReceived() {
  if (cancelled_) return GivenUp(kReceivingName);
  STAGECOACH_RETURN_IF_ERROR(device_->Use(memory_.device));
  for (; came_ < asked_; ++came_) {
    STAGECOACH_ASSIGN_OR_RETURN(const bool here, device_->Reached(received_[came_ % kReceiving]));
    if (!here) return false;
    waiting_since_ = absl::Now();
  }
  return true;
}

absl::StatusOr<uint64_t> NcclChannel::Received() {
  STAGECOACH_ASSIGN_OR_RETURN(const bool all, AllReceived());
  if (all) return came_;
  STAGECOACH_RETURN_IF_ERROR(Settled(kReceivingName).status());
  if (absl::Now() - waiting_since_ > options_.transfer_timeout) {
    return TookTooLong(kReceivingName, options_.transfer_timeout);
  }
  return came_;
}

absl::Status NcclChannel::AwaitReceived() { return AwaitReceivedWithin(options_.transfer_timeout); }

absl::Status NcclChannel::AwaitReceivedWithin(absl::Duration timeout) {
  return Poll(kReceivingName, timeout, [this] { return AllReceived(); });
}

}  // namespace stagecoach
