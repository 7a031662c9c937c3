// Reads the parts of one unit ahead of their conversion, on threads of its own.
#ifndef STAGECOACH_WORKER_TENSOR_READER_H_
#define STAGECOACH_WORKER_TENSOR_READER_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "kernels/backend.h"
#include "model/model_file.h"
#include "worker/host_buffers.h"
#include "worker/host_tier.h"
#include "worker/unit_parts.h"

namespace stagecoach {

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

std::map<TensorType, WeightBounds> BoundsOfTypes(const Backend& backend);

// What the reads of all loads share.
struct ReadContext {
  ReadContext(Backend* backend, std::shared_ptr<const ModelFile> model, HostTier* host,
              HostAllocator* allocator, const LoadOptions& options)
      : model(std::move(model)),
        host(host),
        allocator(allocator),
        options(options),
        slots(LoadSlots(backend->info(), options)),
        one_size(backend->info().own_memory),
        bounds(BoundsOfTypes(*backend)),
        buffers(/*keep=*/one_size) {}

  const std::shared_ptr<const ModelFile> model;
  HostTier* const host;  // these two are not used by a reader that was stopped
  HostAllocator* const allocator;
  const LoadOptions options;
  const int slots;
  const bool one_size;                              // buffers are alike, and kept
  const std::map<TensorType, WeightBounds> bounds;  // the backend's

  HostBufferPool buffers;
  OpenReads open_reads;
  std::atomic<uint64_t> read_bytes = 0;  // from the file
  std::atomic<int64_t> read_ns = 0;      // spent with that, summed over threads
  std::atomic<uint64_t> host_bytes = 0;  // from the host tier
  std::atomic<int64_t> host_ns = 0;
};

// The error, saying which tensor it struck.
absl::Status NameTensor(const absl::Status& status, const TensorInfo& tensor);

// A part of a unit in memory. What the host tier holds in one piece is one part, and that memory.
struct ReadPart {
  UnitPart what;
  TensorPart part;         // its check, if any, was made by the reader
  bool from_file = false;  // as opposed to the host tier, which holds what was checked before
  uint64_t hash = 0;       // if from the file: xxh3-64
  absl::Status scales;     // likewise: CheckTensorPart
};

// One thread calls. While it uses one part, the next ones are read; parts that are held in the host
// tier need no thread.
class TensorReader {
 public:
  // `tensors` must belong to context->model. Without a thread to be had, Next reads by itself.
  TensorReader(std::shared_ptr<ReadContext> context, const std::vector<UnitTensor>& tensors);
  // Stops reading. Reads that storage holds up are left to end by themselves; what they need stays
  // alive until then.
  ~TensorReader();

  // False when there was no further part.
  bool HasNext() const;
  // The next part. Of the parts given, the caller and the backend together may hold context->slots
  // at most. Not after an error. Errors: kTruncated, kIo, naming tensor and offset;
  // RESOURCE_EXHAUSTED; CANCELLED soon after `cancelled` became true, even while storage answers
  // nothing.
  absl::StatusOr<ReadPart> Next(const std::atomic<bool>& cancelled);

 private:
  class State;
  const std::shared_ptr<State> state_;
  std::vector<std::thread> threads_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_TENSOR_READER_H_
