// Memory that weights are read into: aligned for direct reads, never cleared, used again.
#ifndef STAGECOACH_WORKER_READ_BUFFER_H_
#define STAGECOACH_WORKER_READ_BUFFER_H_

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "model/direct_file.h"

namespace stagecoach {

struct UnmapPages {
  void operator()(std::byte* memory) const { ::munmap(memory, bytes); }
  size_t bytes = 0;
};

class ReadBuffer {
 public:
  // Makes room for `bytes`; what was in the buffer is lost. False if there is no memory.
  [[nodiscard]] bool Reserve(size_t bytes) {
    if (bytes <= capacity()) return true;
    if (bytes > SIZE_MAX / 2) return false;
    memory_.reset();
    const size_t rounded = (bytes + kDirectAlignment - 1) / kDirectAlignment * kDirectAlignment;
    // Pages of their own, which go back to the system at once.
    void* pages =
        ::mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) return false;
#if defined(MADV_HUGEPAGE)
    ::madvise(pages, rounded, MADV_HUGEPAGE);  // a wish only: one page fault instead of 512
#endif
    memory_ =
        std::unique_ptr<std::byte, UnmapPages>(static_cast<std::byte*>(pages), UnmapPages{rounded});
    return true;
  }
  std::byte* data() const { return memory_.get(); }
  size_t capacity() const { return memory_ == nullptr ? 0 : memory_.get_deleter().bytes; }

 private:
  std::unique_ptr<std::byte, UnmapPages> memory_;
};

// Buffers that go from one load to the next: memory that was used before is read into several
// times as fast as fresh pages. Thread-safe.
class ReadBufferPool {
 public:
  // The largest idle one of at most `bytes` (and the blocks that direct reads round up to), so that
  // a load never holds more than its own tensors ask for; else an empty one, and the idle ones,
  // which do not suit, are freed.
  ReadBuffer Take(size_t bytes) {
    std::vector<ReadBuffer> unused;  // freed after the mutex
    absl::MutexLock lock(&mu_);
    size_t best = free_.size();
    for (size_t i = 0; i < free_.size(); ++i) {
      if (free_[i].capacity() > bytes + kRounding) continue;
      if (best == free_.size() || free_[i].capacity() > free_[best].capacity()) best = i;
    }
    if (best == free_.size()) {
      unused.swap(free_);
      return {};
    }
    std::swap(free_[best], free_.back());
    ReadBuffer buffer = std::move(free_.back());
    free_.pop_back();
    return buffer;
  }
  void Give(ReadBuffer buffer) {
    absl::MutexLock lock(&mu_);
    free_.push_back(std::move(buffer));
  }
  // For when no load is to follow soon.
  void FreeIdle() {
    std::vector<ReadBuffer> unused;  // freed after the mutex
    absl::MutexLock lock(&mu_);
    unused.swap(free_);
  }

 private:
  // A tensor's first and last block, and the buffer's own end.
  static constexpr size_t kRounding = 3 * kDirectAlignment;

  absl::Mutex mu_;
  std::vector<ReadBuffer> free_ ABSL_GUARDED_BY(mu_);
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_READ_BUFFER_H_
