// One GPU: its streams, its limits and memory on it.
#ifndef STAGECOACH_KERNELS_CUDA_CUDA_DEVICE_H_
#define STAGECOACH_KERNELS_CUDA_CUDA_DEVICE_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda/kernel_set.h"
#include "kernels/host_memory.h"

namespace stagecoach::cuda {

// Device memory of `size` elements. Freed in the order of one stream (the compute stream unless
// something else was asked for): work launched there before may still use it. Movable.
template <typename T>
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(T* data, size_t size, cudaStream_t free_on)
      : data_(data), size_(size), free_on_(free_on) {}
  ~DeviceBuffer() {
    if (data_ != nullptr) cudaFreeAsync(data_, free_on_);
  }
  DeviceBuffer(DeviceBuffer&& other) noexcept { *this = std::move(other); }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(free_on_, other.free_on_);
    return *this;
  }

  T* data() const { return data_; }
  size_t size() const { return size_; }
  size_t bytes() const { return size_ * sizeof(T); }

 private:
  T* data_ = nullptr;
  size_t size_ = 0;
  cudaStream_t free_on_ = nullptr;
};

// Pinned host memory. Movable.
template <typename T>
class PinnedBuffer {
 public:
  PinnedBuffer() = default;
  PinnedBuffer(T* data, size_t size) : data_(data), size_(size) {}
  ~PinnedBuffer() {
    if (data_ != nullptr) cudaFreeHost(data_);
  }
  PinnedBuffer(PinnedBuffer&& other) noexcept { *this = std::move(other); }
  PinnedBuffer& operator=(PinnedBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }

  T* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  T* data_ = nullptr;
  size_t size_ = 0;
};

// An event. Movable.
class Event {
 public:
  Event() = default;
  explicit Event(cudaEvent_t event) : event_(event) {}
  ~Event() {
    if (event_ != nullptr) cudaEventDestroy(event_);
  }
  Event(Event&& other) noexcept { *this = std::move(other); }
  Event& operator=(Event&& other) noexcept {
    std::swap(event_, other.event_);
    return *this;
  }
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

// Thread-safe. Everything that it makes must be destroyed before it.
class CudaDevice {
 public:
  // Errors: see MakeCudaBackend.
  static absl::StatusOr<std::unique_ptr<CudaDevice>> Open(int index);
  ~CudaDevice();
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  // Makes this the calling thread's device; every entry from outside must begin with it.
  absl::Status MakeCurrent() const;

  cudaStream_t compute() const { return compute_; }
  cudaStream_t copy() const { return copy_; }
  cudaStream_t inputs() const { return inputs_; }  // of steps: copies that are not behind weights
  cudaStream_t pack() const { return pack_; }      // before others where the GPU has a choice
  const GpuTraits& traits() const { return traits_; }
  int multiprocessors() const { return traits_.multiprocessors; }
  int major() const { return major_; }  // compute capability
  KernelSet kernels() const { return traits_.kernels; }
  int index() const { return index_; }
  const std::string& name() const { return name_; }
  const std::string& uuid() const { return uuid_; }        // hexadecimal
  uint64_t memory_bytes() const { return memory_bytes_; }  // free at Open, less a reserve

  // Uninitialised memory, to be used by work ordered after `stream`'s present end.
  // RESOURCE_EXHAUSTED if there is none left.
  template <typename T>
  absl::StatusOr<DeviceBuffer<T>> NewBuffer(size_t size, cudaStream_t stream,
                                            cudaStream_t free_on) const {
    absl::StatusOr<void*> data = Allocate(size, sizeof(T), stream);
    if (!data.ok()) return data.status();
    return DeviceBuffer<T>(static_cast<T*>(*data), size, free_on);
  }
  template <typename T>
  absl::StatusOr<DeviceBuffer<T>> NewBuffer(size_t size, cudaStream_t stream) const {
    return NewBuffer<T>(size, stream, compute_);
  }
  template <typename T>
  absl::StatusOr<DeviceBuffer<T>> NewBuffer(size_t size) const {
    return NewBuffer<T>(size, compute_);
  }
  template <typename T>
  absl::StatusOr<PinnedBuffer<T>> NewPinnedBuffer(size_t size) const {
    absl::StatusOr<void*> data = AllocatePinned(size, sizeof(T));
    if (!data.ok()) return data.status();
    return PinnedBuffer<T>(static_cast<T*>(*data), size);
  }
  // Pinned memory in whole pages; RESOURCE_EXHAUSTED as above.
  absl::StatusOr<std::shared_ptr<HostMemory>> NewPinnedMemory(size_t bytes) const;
  absl::StatusOr<Event> NewEvent() const;       // without timing
  absl::StatusOr<Event> NewTimedEvent() const;  // for cudaEventElapsedTime

 private:
  CudaDevice() = default;
  absl::Status Init(int index);
  absl::StatusOr<void*> Allocate(size_t count, size_t element, cudaStream_t stream) const;
  absl::StatusOr<void*> AllocatePinned(size_t count, size_t element) const;

  int index_ = 0;
  GpuTraits traits_;
  int major_ = 0;
  std::string name_;
  std::string uuid_;
  uint64_t memory_bytes_ = 0;
  cudaStream_t compute_ = nullptr;
  cudaStream_t copy_ = nullptr;
  cudaStream_t inputs_ = nullptr;
  cudaStream_t pack_ = nullptr;
};

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_CUDA_DEVICE_H_
