// Device memory for checks and measurements: owned, sized once, fatal on error.
#ifndef STAGECOACH_KERNELS_CUDA_DEVICE_ARRAY_H_
#define STAGECOACH_KERNELS_CUDA_DEVICE_ARRAY_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

namespace stagecoach::cuda {

// Ends the program with a line if `status` is an error.
inline void CheckDevice(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "device: %s\n", cudaGetErrorString(status));
  std::exit(2);
}

template <typename T>
class DeviceArray {
 public:
  DeviceArray() = default;
  explicit DeviceArray(size_t size) : size_(size) {
    CheckDevice(cudaMalloc(reinterpret_cast<void**>(&data_), size * sizeof(T)));
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    CheckDevice(cudaMemcpy(data_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  DeviceArray(DeviceArray&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  DeviceArray& operator=(DeviceArray&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~DeviceArray() { cudaFree(data_); }

  T* get() const { return data_; }
  size_t size() const { return size_; }

 private:
  T* data_ = nullptr;
  size_t size_ = 0;
};

template <typename T>
std::vector<T> CopyToHost(const T* data, size_t count) {
  std::vector<T> result(count);
  CheckDevice(cudaMemcpy(result.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost));
  return result;
}

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_DEVICE_ARRAY_H_
