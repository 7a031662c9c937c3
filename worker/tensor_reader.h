// Reads the tensors of one unit ahead of their conversion, on a thread of its own.
#ifndef STAGECOACH_WORKER_TENSOR_READER_H_
#define STAGECOACH_WORKER_TENSOR_READER_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <span>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "model/model_file.h"
#include "worker/host_tier.h"
#include "worker/read_buffer.h"

namespace stagecoach {

// A reader that is stopped takes notice after at most this many bytes.
inline constexpr size_t kReadChunkBytes = 8 << 20;

// One positioned read that has not returned.
struct OpenRead {
  const TensorInfo* tensor = nullptr;
  uint64_t bytes = 0;
  absl::Time since;
};

// The reads of the file that are under way. Thread-safe.
class OpenReads {
 public:
  // For the time of its scope there is an open read.
  class Scope {
   public:
    Scope(OpenReads* reads, OpenRead read) : reads_(reads), at_(reads->Add(read)) {}
    ~Scope() { reads_->Remove(at_); }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    OpenReads* const reads_;
    const std::list<OpenRead>::iterator at_;
  };

  std::vector<OpenRead> List() const {  // the oldest first
    absl::MutexLock lock(&mu_);
    return {reads_.begin(), reads_.end()};
  }

 private:
  std::list<OpenRead>::iterator Add(const OpenRead& read) {
    absl::MutexLock lock(&mu_);
    return reads_.insert(reads_.end(), read);
  }
  void Remove(std::list<OpenRead>::iterator at) {
    absl::MutexLock lock(&mu_);
    reads_.erase(at);
  }

  mutable absl::Mutex mu_;
  std::list<OpenRead> reads_ ABSL_GUARDED_BY(mu_);
};

// What the reads of all loads share.
struct ReadContext {
  std::shared_ptr<const ModelFile> model;
  HostTier* host = nullptr;  // not used by a reader that was stopped
  ReadBufferPool buffers;
  OpenReads open_reads;
  std::atomic<uint64_t> read_bytes = 0;  // from the file
  std::atomic<int64_t> read_ns = 0;      // spent with that, summed over threads
  std::atomic<uint64_t> host_bytes = 0;  // from the host tier
  std::atomic<int64_t> host_ns = 0;
};

// The error, saying which tensor it struck.
absl::Status NameTensor(const absl::Status& status, const TensorInfo& tensor);

// One thread calls. While it uses one tensor, the next one is read: two buffers, together no larger
// than the two largest tensors (and the blocks that direct reads round up to).
class TensorReader {
 public:
  // `tensors` must belong to context->model. Without a thread to be had, Next reads by itself.
  TensorReader(std::shared_ptr<ReadContext> context, std::vector<const TensorInfo*> tensors);
  // Stops reading. A read that storage holds up is left to end by itself; what it needs stays
  // alive until then.
  ~TensorReader();

  // The bytes of the next tensor, valid until the next call. Call at most once per tensor, and not
  // after an error. Errors: kTruncated, kIo, naming tensor and offset; RESOURCE_EXHAUSTED;
  // CANCELLED soon after `cancelled` became true, even while storage answers nothing.
  absl::StatusOr<std::span<const std::byte>> Next(const std::atomic<bool>& cancelled);

 private:
  class State;
  const std::shared_ptr<State> state_;
  std::thread thread_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_TENSOR_READER_H_
