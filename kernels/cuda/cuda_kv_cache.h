// Keys and values of one stage on the GPU, in blocks of 32 positions.
#ifndef STAGECOACH_KERNELS_CUDA_CUDA_KV_CACHE_H_
#define STAGECOACH_KERNELS_CUDA_CUDA_KV_CACHE_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/cuda/cuda_device.h"

namespace stagecoach::cuda {

// Longest key or value of a head that the attention kernels take.
inline constexpr int kMaxHeadLength = 256;

// Where the KV of one layer lies. Elements are halves or floats:
//   [blocks][kv_heads]{ keys [key_length / 8][32 positions][8], values [32 positions][value_length]
//   }
// with both lengths rounded up to 8 (the rest is zero). So a lane per position reads keys, and a
// lane per dimension values, in whole lines.
struct KvLayout {
  std::byte* data;  // of the layer
  bool half;
  int kv_heads;
  int key_length;
  int value_length;

  // Whether the attention with tensor cores takes it.
  __host__ __device__ bool tensor_cores() const {
    return half && key_length == value_length && (key_length == 64 || key_length == 128);
  }
  __host__ __device__ int padded_keys() const { return (key_length + 7) / 8 * 8; }
  __host__ __device__ int padded_values() const { return (value_length + 7) / 8 * 8; }
  // Elements of one head of one block.
  __host__ __device__ size_t head_elements() const {
    return size_t{kKvBlockPositions} * (padded_keys() + padded_values());
  }
};

class CudaKvCache : public KvCache {
 public:
  // Errors: INVALID_ARGUMENT for a shape that the kernels do not take, RESOURCE_EXHAUSTED.
  static absl::StatusOr<std::unique_ptr<CudaKvCache>> Create(const CudaDevice& device,
                                                             const KvShape& shape);

  const KvShape& shape() const { return shape_; }
  KvLayout layer(int kv_layer) const;

  // All layers of a block, in the order of `stream`.
  cudaError_t CopyBlock(int from, int to, cudaStream_t stream) const;
  cudaError_t ClearBlock(int block, cudaStream_t stream) const;

 private:
  std::byte* block(int index) const { return memory_.data() + block_bytes_ * index; }

  KvShape shape_;
  size_t block_bytes_ = 0;  // in one layer
  size_t layer_bytes_ = 0;
  DeviceBuffer<std::byte> memory_;
};

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_CUDA_KV_CACHE_H_
