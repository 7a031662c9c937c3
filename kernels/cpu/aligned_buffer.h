// Cache-line aligned memory of trivial elements that never throws.
#ifndef STAGECOACH_KERNELS_CPU_ALIGNED_BUFFER_H_
#define STAGECOACH_KERNELS_CPU_ALIGNED_BUFFER_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace stagecoach::cpu {

struct AlignedFree {
  explicit AlignedFree(size_t mapped_bytes = 0) : mapped_bytes(mapped_bytes) {}
  void operator()(void* p) const;
  size_t mapped_bytes;  // pages of its own, given back at once; 0: from the heap
};

// `bytes` zeroed bytes, aligned to a cache line and, when large, to a huge page (which the system
// is asked for). Touched, so that no step pays for page faults. nullptr if there is not enough
// memory.
std::unique_ptr<void, AlignedFree> AllocateZeroed(size_t bytes);

template <typename T>
class AlignedBuffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  AlignedBuffer() = default;

  // Errors: RESOURCE_EXHAUSTED.
  static absl::StatusOr<AlignedBuffer> Create(size_t count) {
    AlignedBuffer buffer;
    if (count > SIZE_MAX / 2 / sizeof(T)) {
      return absl::ResourceExhaustedError("buffer size overflows");
    }
    buffer.memory_ = AllocateZeroed(count * sizeof(T));
    if (buffer.memory_ == nullptr) {
      return absl::ResourceExhaustedError("out of memory for a buffer of the CPU backend");
    }
    buffer.size_ = count;
    return buffer;
  }

  T* data() const { return static_cast<T*>(memory_.get()); }
  size_t size() const { return size_; }
  size_t bytes() const { return size_ * sizeof(T); }
  T& operator[](size_t i) const { return data()[i]; }

 private:
  std::unique_ptr<void, AlignedFree> memory_;
  size_t size_ = 0;
};

}  // namespace stagecoach::cpu

#endif  // STAGECOACH_KERNELS_CPU_ALIGNED_BUFFER_H_
