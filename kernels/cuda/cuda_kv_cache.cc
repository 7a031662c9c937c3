#include "kernels/cuda/cuda_kv_cache.h"

#include <optional>

#include "fmt/format.h"
#include "kernels/cuda/cuda_status.h"
#include "model/checked_math.h"
#include "model/status_macros.h"

namespace stagecoach::cuda {

absl::StatusOr<std::unique_ptr<CudaKvCache>> CudaKvCache::Create(const CudaDevice& device,
                                                                 const KvShape& shape) {
  if (shape.layers < 1 || shape.kv_heads < 1 || shape.key_length < 1 || shape.value_length < 1 ||
      shape.blocks < 1) {
    return absl::InvalidArgumentError("bad shape of a KV cache");
  }
  if (shape.key_length > kMaxHeadLength || shape.value_length > kMaxHeadLength) {
    return absl::InvalidArgumentError(
        fmt::format("keys of {} and values of {}: the CUDA backend takes at most {}",
                    shape.key_length, shape.value_length, kMaxHeadLength));
  }
  if (shape.type != KvType::kF16 && shape.type != KvType::kF32) {
    return absl::InvalidArgumentError("the CUDA backend keeps keys and values as f16 or f32 only");
  }
  auto cache = std::make_unique<CudaKvCache>();
  cache->shape_ = shape;
  const KvLayout layout = cache->layer(0);
  const size_t element = shape.type == KvType::kF16 ? sizeof(uint16_t) : sizeof(float);
  std::optional<uint64_t> bytes = CheckedMul(layout.head_elements() * element, shape.kv_heads);
  if (bytes) {
    cache->block_bytes_ = *bytes;
    bytes = CheckedMul(*bytes, shape.blocks);
  }
  if (bytes) {
    cache->layer_bytes_ = *bytes;
    bytes = CheckedMul(*bytes, shape.layers);
  }
  if (!bytes) return absl::ResourceExhaustedError("size of the KV cache overflows");
  STAGECOACH_ASSIGN_OR_RETURN(cache->memory_, device.NewBuffer<std::byte>(*bytes));
  STAGECOACH_RETURN_IF_CUDA_ERROR(
      cudaMemsetAsync(cache->memory_.data(), 0, *bytes, device.compute()));
  return cache;
}

KvLayout CudaKvCache::layer(int kv_layer) const {
  return {.data = memory_.data() + layer_bytes_ * kv_layer,
          .half = shape_.type == KvType::kF16,
          .kv_heads = shape_.kv_heads,
          .key_length = shape_.key_length,
          .value_length = shape_.value_length};
}

cudaError_t CudaKvCache::CopyBlock(int from, int to, cudaStream_t stream) const {
  return cudaMemcpy2DAsync(block(to), layer_bytes_, block(from), layer_bytes_, block_bytes_,
                           shape_.layers, cudaMemcpyDeviceToDevice, stream);
}

cudaError_t CudaKvCache::ClearBlock(int index, cudaStream_t stream) const {
  return cudaMemset2DAsync(block(index), layer_bytes_, 0, block_bytes_, shape_.layers, stream);
}

}  // namespace stagecoach::cuda
