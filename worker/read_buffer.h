// Memory that weights are read into: aligned for direct reads, never cleared, used again.
#ifndef STAGECOACH_WORKER_READ_BUFFER_H_
#define STAGECOACH_WORKER_READ_BUFFER_H_

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "model/direct_file.h"

namespace stagecoach {

class ReadBuffer {
 public:
  static constexpr size_t kHugePage = size_t{2} << 20;

  // Makes room for `bytes`; what was in the buffer is lost. False if there is no memory.
  [[nodiscard]] bool Reserve(size_t bytes) {
    if (bytes <= capacity_) return true;
    if (bytes > SIZE_MAX / 2) return false;
    memory_.reset();
    capacity_ = 0;
    const size_t alignment = bytes >= kHugePage ? kHugePage : kDirectAlignment;
    const size_t rounded = (bytes + kDirectAlignment - 1) / kDirectAlignment * kDirectAlignment;
    memory_.reset(static_cast<std::byte*>(std::aligned_alloc(alignment, rounded)));
#if defined(MADV_HUGEPAGE)
    // A wish only: one page fault instead of 512.
    if (alignment == kHugePage && memory_) ::madvise(memory_.get(), rounded, MADV_HUGEPAGE);
#endif
    if (memory_ != nullptr) capacity_ = rounded;
    return memory_ != nullptr;
  }
  std::byte* data() const { return memory_.get(); }
  size_t capacity() const { return capacity_; }

 private:
  struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
  };
  std::unique_ptr<std::byte, Free> memory_;
  size_t capacity_ = 0;
};

// Buffers that go from one load to the next while any load is under way. Thread-safe.
class ReadBufferPool {
 public:
  ReadBuffer Take() {
    absl::MutexLock lock(&mu_);
    ++taken_;
    if (free_.empty()) return {};
    ReadBuffer buffer = std::move(free_.back());
    free_.pop_back();
    return buffer;
  }
  // Once all buffers are back, their memory is freed.
  void Give(ReadBuffer buffer) {
    std::vector<ReadBuffer> unused;  // freed after the mutex
    absl::MutexLock lock(&mu_);
    free_.push_back(std::move(buffer));
    if (--taken_ == 0) unused.swap(free_);
  }

 private:
  absl::Mutex mu_;
  std::vector<ReadBuffer> free_ ABSL_GUARDED_BY(mu_);
  int taken_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_READ_BUFFER_H_
