#include "worker/tensor_reader.h"

#include <algorithm>
#include <cassert>
#include <span>
#include <string>
#include <system_error>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "fmt/format.h"
#include "model/file.h"
#include "model/manifest.h"
#include "model/model_error.h"
#include "model/status_macros.h"
#include "worker/part_check.h"

namespace stagecoach {
namespace {

// How often a caller that waits looks whether it was cancelled.
constexpr absl::Duration kCancelPoll = absl::Milliseconds(5);
// How long a stopped reader is waited for; one that takes longer hangs in a
// read.
constexpr absl::Duration kStopGrace = absl::Milliseconds(300);
// Of one read: a reader that is stopped takes notice after that.
constexpr uint64_t kMostReadBytes = kPartBytes + 2 * kDirectAlignment;
// Of one that may find its bytes in the page cache: they are looked through
// while they are in the processor's own cache, for it is memory that all
// readers together wait for then.
constexpr uint64_t kCachedReadBytes = uint64_t{1} << 19;

}  // namespace

std::map<TensorType, WeightBounds> BoundsOfTypes(const Backend& backend) {
  std::map<TensorType, WeightBounds> bounds;
  for (const TensorTypeInfo& info : AllTensorTypes())
    bounds[info.type] = backend.BoundsOf(info.type);
  return bounds;
}

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

// Shared by the caller and the threads, and outlives either. Parts are read in
// order, each into the buffer of its slot once the part that was there before
// has been let go.
class TensorReader::State : public std::enable_shared_from_this<State> {
 public:
  State(std::shared_ptr<ReadContext> context, const std::vector<UnitTensor>& tensors)
      : context_(std::move(context)) {
    for (const UnitTensor& tensor : tensors) AddTensor(tensor);
    TakeBuffers();
  }
  ~State() {
    for (Slot& slot : slots_) context_->buffers.Give(std::move(slot.buffer));
  }

  // Threads that find something to do.
  int useful_threads() const {
    return static_cast<int>(std::min<size_t>(context_->options.threads, to_read_.size()));
  }
  bool HasNext() const { return next_ < parts_.size(); }

  // A thread that AddThread has announced.
  void ReadAll() {
    while (ClaimAndRead()) {
    }
    absl::MutexLock lock(&mu_);
    --running_;
  }
  void AddThread(int count) {
    absl::MutexLock lock(&mu_);
    running_ += count;
  }

  absl::StatusOr<ReadPart> Next(bool has_threads, const std::atomic<bool>& cancelled) {
    assert(HasNext());
    Part& part = parts_[next_++];
    if (part.whole != nullptr) return TakeWhole(part);
    const auto is_read = [&]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return part.done; };
    while (!has_threads && !cancelled) {
      {
        absl::MutexLock lock(&mu_);
        if (part.done) break;
      }
      if (!ClaimAndRead()) break;
    }
    absl::MutexLock lock(&mu_);
    while (!cancelled && !mu_.AwaitWithTimeout(absl::Condition(&is_read), kCancelPoll)) {
    }
    if (cancelled) return absl::CancelledError("load cancelled");
    if (!part.status.ok()) return part.status;
    part.result.part.memory = std::shared_ptr<const HostMemory>(
        slots_[part.slot].buffer.get(),
        [state = shared_from_this(), slot = part.slot](const HostMemory*) { state->LetGo(slot); });
    return std::move(part.result);
  }

  // Waits for the threads to end. False if some hang in a read of the file
  // instead; whenever that returns, they touch nothing but this.
  bool Stop() {
    absl::MutexLock lock(&mu_);
    stopped_ = true;
    const auto ended = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return running_ == 0; };
    while (!mu_.AwaitWithTimeout(absl::Condition(&ended), kStopGrace)) {
      if (in_file_ == running_) return false;
    }
    return true;
  }

 private:
  struct Part {
    UnitPart what;
    std::shared_ptr<const HostTensor> held;   // null: read it from the file
    std::shared_ptr<const HostMemory> whole;  // the tensor in one piece: nothing is to be read
    size_t slot = 0;
    bool done = false;  // guarded by mu_, and hands over the two below
    absl::Status status;
    ReadPart result;
  };
  struct Slot {
    std::shared_ptr<HostMemory> buffer;  // of whose turn it is
    uint64_t bytes = 0;                  // to be had at most
    bool busy = false;                   // guarded by mu_
  };

  void AddTensor(const UnitTensor& tensor) {
    const auto held = context_->host == nullptr ? nullptr : context_->host->Find(*tensor.tensor);
    if (held != nullptr && held->whole() != nullptr) {
      Part& part = parts_.emplace_back();
      part.what = {.role = tensor.role,
                   .tensor = tensor.tensor,
                   .bytes = tensor.tensor->bytes,
                   .last = true};
      part.whole = held->whole();
      return;
    }
    for (const UnitPart& what : CutTensor(tensor, context_->options)) {
      Part& part = parts_.emplace_back();
      part.what = what;
      part.held = held;
      part.slot = to_read_.size() % context_->slots;
      to_read_.push_back(parts_.size() - 1);
    }
  }

  void TakeBuffers() {
    slots_.resize(std::min<size_t>(context_->slots, to_read_.size()));
    for (const size_t i : to_read_) {
      Slot& slot = slots_[parts_[i].slot];
      slot.bytes = std::max(slot.bytes, BufferBytes(parts_[i].what, context_->options));
    }
    for (Slot& slot : slots_) {
      if (context_->one_size) slot.bytes = std::max(slot.bytes, context_->options.part_bytes);
      slot.buffer = context_->buffers.Take(slot.bytes, slot.bytes);
    }
  }

  ReadPart TakeWhole(Part& part) {
    context_->host_bytes += part.what.bytes;
    return {.what = part.what,
            .part = {.raw = {part.whole->data(), part.what.bytes},
                     .checked = true,
                     .memory = std::move(part.whole)}};
  }

  // Reads the next part, when there is room for it. False if there is nothing
  // to go on with.
  bool ClaimAndRead() {
    Part* part = nullptr;
    {
      const auto can_go_on = [&]() ABSL_SHARED_LOCKS_REQUIRED(mu_) {
        return stopped_ || failed_ || claimed_ == to_read_.size() ||
               !slots_[parts_[to_read_[claimed_]].slot].busy;
      };
      absl::MutexLock lock(&mu_);
      mu_.Await(absl::Condition(&can_go_on));
      if (stopped_ || failed_ || claimed_ == to_read_.size()) return false;
      part = &parts_[to_read_[claimed_++]];
      slots_[part->slot].busy = true;
    }
    absl::Status status = Read(*part);
    absl::MutexLock lock(&mu_);
    part->status = std::move(status);
    part->done = true;
    failed_ |= !part->status.ok();
    return true;
  }

  // The claimed part.
  absl::Status Read(Part& part) {
    const UnitPart& what = part.what;
    std::span<const std::byte> raw;
    const bool from_tier = part.held != nullptr && TakeFromHost(part, raw);
    PartCheck check(what, context_->bounds.at(what.tensor->type));
    if (!from_tier) STAGECOACH_RETURN_IF_ERROR(ReadFile(part, check, raw));
    part.result = {.what = what,
                   .part = {.first_row = what.first_row, .raw = raw, .checked = true},
                   .from_file = !from_tier};
    if (from_tier) return absl::OkStatus();
    STAGECOACH_RETURN_IF_ERROR(check.status());
    part.result.hash = check.hash();
    part.result.scales = check.weights();
    return absl::OkStatus();
  }

  bool stopped() const {
    absl::MutexLock lock(&mu_);
    return stopped_;
  }

  void LetGo(size_t slot) {
    absl::MutexLock lock(&mu_);
    slots_[slot].busy = false;
  }

  // Room for `bytes` in the part's buffer, and for what direct reads round up
  // to.
  absl::Status Reserve(const Part& part, uint64_t bytes) {
    Slot& slot = slots_[part.slot];
    if (slot.buffer != nullptr && slot.buffer->size() >= bytes) return absl::OkStatus();
    if (stopped()) return absl::CancelledError("load cancelled");
    slot.buffer = nullptr;
    slot.buffer = context_->allocator->New(slot.bytes + 2 * kDirectAlignment);
    if (slot.buffer != nullptr && slot.buffer->size() >= bytes) return absl::OkStatus();
    return NameTensor(absl::ResourceExhaustedError("no memory to read into"), *part.what.tensor);
  }

  bool TakeFromHost(Part& part, std::span<const std::byte>& raw) {
    if (!Reserve(part, part.what.bytes).ok()) return false;
    const absl::Time start = absl::Now();
    const std::span<std::byte> out(slots_[part.slot].buffer->data(), part.what.bytes);
    if (!part.held->Read(part.what.offset, out)) return false;
    context_->host_ns += absl::ToInt64Nanoseconds(absl::Now() - start);
    context_->host_bytes += out.size();
    raw = out;
    return true;
  }

  // Whole aligned blocks where the file prefers them: the part then lies a
  // little way into the buffer, and nothing is copied.
  absl::Status ReadFile(Part& part, PartCheck& check, std::span<const std::byte>& raw) {
    const TensorInfo& tensor = *part.what.tensor;
    const RandomAccessFile& file = context_->model->file(tensor.file_index);
    const uint64_t alignment = file.read_alignment();
    const uint64_t part_begin = tensor.offset + part.what.offset;
    const uint64_t part_end = part_begin + part.what.bytes;
    const uint64_t begin = part_begin / alignment * alignment;
    const uint64_t end =
        std::max(part_end, std::min((part_end + alignment - 1) / alignment * alignment,
                                    file.size() / alignment * alignment));
    STAGECOACH_RETURN_IF_ERROR(Reserve(part, end - begin));
    std::byte* const to = slots_[part.slot].buffer->data();
    const uint64_t most = alignment > 1 ? kMostReadBytes : kCachedReadBytes;
    for (uint64_t at = begin; at < end;) {
      const size_t chunk = std::min(most, end - at);
      STAGECOACH_RETURN_IF_ERROR(ReadChunk(tensor, file, at, {to + (at - begin), chunk}));
      at += chunk;
      raw = {to + (part_begin - begin), std::min(at, part_end) - part_begin};
      check.LookThrough(raw);
    }
    return absl::OkStatus();
  }

  absl::Status ReadChunk(const TensorInfo& tensor, const RandomAccessFile& file, uint64_t offset,
                         std::span<std::byte> out) {
    {
      absl::MutexLock lock(&mu_);
      if (stopped_) return absl::CancelledError("load cancelled");
      ++in_file_;
    }
    const absl::Time start = absl::Now();
    const OpenReads::Scope open(&context_->open_reads, {&tensor, out.size(), start});
    const absl::Status status = ReadFully(file, offset, out);
    context_->read_ns += absl::ToInt64Nanoseconds(absl::Now() - start);
    if (status.ok()) context_->read_bytes += out.size();
    absl::MutexLock lock(&mu_);
    --in_file_;
    return status.ok() ? status : NameTensor(status, tensor);
  }

  const std::shared_ptr<ReadContext> context_;
  std::vector<Part> parts_;
  std::vector<size_t> to_read_;  // those of them that are not in memory in one piece
  std::vector<Slot> slots_;
  size_t next_ = 0;  // the caller's

  mutable absl::Mutex mu_;
  size_t claimed_ ABSL_GUARDED_BY(mu_) = 0;  // of to_read_
  int running_ ABSL_GUARDED_BY(mu_) = 0;     // threads
  int in_file_ ABSL_GUARDED_BY(mu_) = 0;     // those of them in a read of the file
  bool failed_ ABSL_GUARDED_BY(mu_) = false;
  bool stopped_ ABSL_GUARDED_BY(mu_) = false;
};

TensorReader::TensorReader(std::shared_ptr<ReadContext> context,
                           const std::vector<UnitTensor>& tensors)
    : state_(std::make_shared<State>(std::move(context), tensors)) {
  for (int i = state_->useful_threads(); i > 0; --i) {
    state_->AddThread(1);
    try {
      threads_.emplace_back([state = state_] { state->ReadAll(); });
    } catch (const std::system_error&) {
      state_->AddThread(-1);
      return;  // fewer; without any, Next reads
    }
  }
}

TensorReader::~TensorReader() {
  const bool ended = state_->Stop();
  for (std::thread& thread : threads_) {
    if (ended) {
      thread.join();
    } else {
      thread.detach();
    }
  }
}

bool TensorReader::HasNext() const { return state_->HasNext(); }

absl::StatusOr<ReadPart> TensorReader::Next(const std::atomic<bool>& cancelled) {
  return state_->Next(!threads_.empty(), cancelled);
}

}  // namespace stagecoach
