// Host memory that bytes of weights are read into and kept in, on their way to the backend.
#ifndef STAGECOACH_KERNELS_HOST_MEMORY_H_
#define STAGECOACH_KERNELS_HOST_MEMORY_H_

#include <cstddef>
#include <functional>
#include <memory>
#include <utility>

namespace stagecoach {

// At least `size` bytes of whole pages, aligned for direct reads, not cleared. Owns them.
class HostMemory {
 public:
  // `free` gives the bytes back; called once.
  HostMemory(std::byte* data, size_t size, bool direct, std::function<void()> free)
      : data_(data), size_(size), direct_(direct), free_(std::move(free)) {}
  ~HostMemory() { free_(); }
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;

  std::byte* data() const { return data_; }
  size_t size() const { return size_; }
  // The backend's device reads it by itself, while the host does something else.
  bool direct() const { return direct_; }

 private:
  std::byte* const data_;
  const size_t size_;
  const bool direct_;
  const std::function<void()> free_;
};

// Ordinary memory, which no device reads by itself unless it is pinned: pages of their own, that go
// back to the system at once. Not touched. nullptr if there is none.
std::shared_ptr<HostMemory> NewPageMemory(size_t bytes);

}  // namespace stagecoach

#endif  // STAGECOACH_KERNELS_HOST_MEMORY_H_
