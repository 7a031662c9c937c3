// Host memory for weights under way: asked of the backend, used again by later loads.
#ifndef STAGECOACH_WORKER_HOST_BUFFERS_H_
#define STAGECOACH_WORKER_HOST_BUFFERS_H_

#include <cstddef>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "kernels/backend.h"
#include "kernels/host_memory.h"
#include "model/direct_file.h"

namespace stagecoach {

// What a tensor's first and last block add to its bytes when whole blocks are read, and the pages
// that memory is rounded up to.
inline constexpr size_t kReadRounding = 3 * kDirectAlignment;

// The backend's memory; ordinary pages, with a line in the log at the first time, when it has no
// more. Thread-safe.
class HostAllocator {
 public:
  // `backend` must outlive the allocator.
  explicit HostAllocator(Backend* backend) : backend_(backend) {}
  std::shared_ptr<HostMemory> New(size_t bytes);  // nullptr if there is none at all
  bool fell_back() const {
    absl::MutexLock lock(&mu_);
    return fell_back_;
  }

 private:
  Backend* const backend_;
  mutable absl::Mutex mu_;
  bool fell_back_ ABSL_GUARDED_BY(mu_) = false;
};

// Buffers that go from one load to the next: memory that was used before is read into several
// times as fast as fresh pages. Thread-safe.
class HostBufferPool {
 public:
  // keep: idle buffers are never freed but with the pool: such memory is dear to get.
  explicit HostBufferPool(bool keep = false) : keep_(keep) {}

  // An idle buffer of at least `least_bytes` and at most `bytes` (and kReadRounding), so that a
  // load never holds more than its own tensors ask for; the largest of them. Else nullptr, and the
  // idle ones, which do not suit, are freed (unless they are kept).
  std::shared_ptr<HostMemory> Take(size_t least_bytes, size_t bytes);
  void Give(std::shared_ptr<HostMemory> buffer);
  // For when no load is to follow soon.
  void FreeIdle();

 private:
  const bool keep_;
  absl::Mutex mu_;
  std::vector<std::shared_ptr<HostMemory>> free_ ABSL_GUARDED_BY(mu_);
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_HOST_BUFFERS_H_
