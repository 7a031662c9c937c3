#include "worker/tensor_reader.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <string>
#include <system_error>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "fmt/format.h"
#include "model/file.h"
#include "model/model_error.h"

namespace stagecoach {
namespace {

// How often a caller that waits looks whether it was cancelled.
constexpr absl::Duration kCancelPoll = absl::Milliseconds(5);
// How long a stopped reader is waited for; one that takes longer hangs in a read.
constexpr absl::Duration kStopGrace = absl::Milliseconds(300);

}  // namespace

absl::Status NameTensor(const absl::Status& status, const TensorInfo& tensor) {
  const std::string where = fmt::format("tensor '{}' ({} bytes at offset {}): ", tensor.name,
                                        tensor.bytes, tensor.offset);
  std::string message(status.message());
  if (const auto error = GetModelError(status)) {
    const std::string prefix = fmt::format("{}: ", ModelErrorName(*error));
    if (message.starts_with(prefix)) message.erase(0, prefix.size());
    return MakeModelError(*error, where + message);
  }
  return absl::Status(status.code(), where + message);
}

// Shared by the caller and the thread, and outlives either. Tensor i lies in buffer i % 2, and is
// read once the caller is done with tensor i - 2.
class TensorReader::State {
 public:
  State(std::shared_ptr<ReadContext> context, std::vector<const TensorInfo*> tensors)
      : context_(std::move(context)), tensors_(std::move(tensors)) {
    for (size_t s = 0; s < kSlots; ++s) {
      uint64_t largest = 0;
      for (size_t i = s; i < tensors_.size(); i += kSlots) {
        largest = std::max(largest, tensors_[i]->bytes);
      }
      slots_[s].buffer = context_->buffers.Take(largest);
    }
  }
  ~State() {
    for (Slot& slot : slots_) context_->buffers.Give(std::move(slot.buffer));
  }

  // The thread.
  void ReadAll() {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      {
        const auto has_room = [&]() ABSL_SHARED_LOCKS_REQUIRED(mu_) {
          return stopped_ || i < wanted_ + kSlots - 1;
        };
        absl::MutexLock lock(&mu_);
        mu_.Await(absl::Condition(&has_room));
      }
      if (!Read(i)) break;
    }
    absl::MutexLock lock(&mu_);
    ended_ = true;
  }

  absl::StatusOr<std::span<const std::byte>> Next(bool has_thread,
                                                  const std::atomic<bool>& cancelled) {
    const size_t i = next_++;
    assert(i < tensors_.size());
    {
      absl::MutexLock lock(&mu_);
      wanted_ = next_;
    }
    if (!has_thread && !cancelled) Read(i);
    const auto is_read = [&]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return read_ > i; };
    absl::MutexLock lock(&mu_);
    while (!cancelled && !mu_.AwaitWithTimeout(absl::Condition(&is_read), kCancelPoll)) {
    }
    if (cancelled) return absl::CancelledError("load cancelled");
    const Slot& slot = slots_[i % kSlots];
    if (!slot.status.ok()) return slot.status;
    return slot.raw;
  }

  // Waits for the thread to end. False if it hangs in a read of the file instead; whenever that
  // returns, the thread touches nothing but this.
  bool Stop() {
    stopped_ = true;
    absl::MutexLock lock(&mu_);
    const auto ended = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return ended_; };
    while (!mu_.AwaitWithTimeout(absl::Condition(&ended), kStopGrace)) {
      if (in_file_) return false;
    }
    return true;
  }

 private:
  static constexpr size_t kSlots = 2;
  // Written by the reader before read_ passes it, then read by the caller.
  struct Slot {
    ReadBuffer buffer;
    std::span<const std::byte> raw;
    absl::Status status;
  };

  // False if there is nothing to go on with.
  bool Read(size_t i) {
    Slot& slot = slots_[i % kSlots];
    slot.status =
        TakeFromHost(*tensors_[i], slot) ? absl::OkStatus() : ReadTensor(*tensors_[i], slot);
    const bool ok = slot.status.ok();
    absl::MutexLock lock(&mu_);
    read_ = i + 1;
    return ok;
  }

  bool TakeFromHost(const TensorInfo& tensor, Slot& slot) {
    if (context_->host == nullptr || !slot.buffer.Reserve(tensor.bytes)) return false;
    const absl::Time start = absl::Now();
    const std::span<std::byte> out(slot.buffer.data(), tensor.bytes);
    if (!context_->host->Get(tensor, out)) return false;
    context_->host_ns += absl::ToInt64Nanoseconds(absl::Now() - start);
    context_->host_bytes += tensor.bytes;
    slot.raw = out;
    return true;
  }

  // Whole aligned blocks where the file prefers them: the tensor then lies a little way into the
  // buffer, and nothing is copied.
  absl::Status ReadTensor(const TensorInfo& tensor, Slot& slot) {
    const RandomAccessFile& file = context_->model->file(tensor.file_index);
    const uint64_t alignment = file.read_alignment();
    const uint64_t begin = tensor.offset / alignment * alignment;
    const uint64_t tensor_end = tensor.offset + tensor.bytes;
    const uint64_t end =
        std::max(tensor_end, std::min((tensor_end + alignment - 1) / alignment * alignment,
                                      file.size() / alignment * alignment));
    if (!slot.buffer.Reserve(end - begin)) {
      return NameTensor(absl::ResourceExhaustedError("no memory to read into"), tensor);
    }
    for (uint64_t at = begin; at < end;) {
      if (stopped_) return absl::CancelledError("load cancelled");
      const size_t chunk = std::min<uint64_t>(kReadChunkBytes, end - at);
      const absl::Time start = absl::Now();
      const absl::Status status =
          ReadChunk(tensor, start, file, at, {slot.buffer.data() + (at - begin), chunk});
      context_->read_ns += absl::ToInt64Nanoseconds(absl::Now() - start);
      if (!status.ok()) return NameTensor(status, tensor);
      at += chunk;
      context_->read_bytes += chunk;
    }
    slot.raw = {slot.buffer.data() + (tensor.offset - begin), tensor.bytes};
    return absl::OkStatus();
  }

  absl::Status ReadChunk(const TensorInfo& tensor, absl::Time start, const RandomAccessFile& file,
                         uint64_t offset, std::span<std::byte> out) {
    const OpenReads::Scope open(&context_->open_reads, {&tensor, out.size(), start});
    in_file_ = true;
    const absl::Status status = ReadFully(file, offset, out);
    in_file_ = false;
    return status;
  }

  const std::shared_ptr<ReadContext> context_;
  const std::vector<const TensorInfo*> tensors_;

  std::atomic<bool> stopped_ = false;
  std::atomic<bool> in_file_ = false;

  std::array<Slot, kSlots> slots_;  // handed over by read_ and wanted_
  size_t next_ = 0;                 // the caller's

  absl::Mutex mu_;
  size_t wanted_ ABSL_GUARDED_BY(mu_) = 0;  // tensors that Next was called for
  size_t read_ ABSL_GUARDED_BY(mu_) = 0;    // tensors read, or failed
  bool ended_ ABSL_GUARDED_BY(mu_) = false;
};

TensorReader::TensorReader(std::shared_ptr<ReadContext> context,
                           std::vector<const TensorInfo*> tensors)
    : state_(std::make_shared<State>(std::move(context), std::move(tensors))) {
  try {
    thread_ = std::thread([state = state_] { state->ReadAll(); });
  } catch (const std::system_error&) {
    // Next reads.
  }
}

TensorReader::~TensorReader() {
  if (!thread_.joinable()) return;
  if (state_->Stop()) {
    thread_.join();
  } else {
    thread_.detach();
  }
}

absl::StatusOr<std::span<const std::byte>> TensorReader::Next(const std::atomic<bool>& cancelled) {
  return state_->Next(thread_.joinable(), cancelled);
}

}  // namespace stagecoach
