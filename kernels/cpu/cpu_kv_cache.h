// The KV cache of a stage as the CPU attention kernel reads it.
#ifndef STAGECOACH_KERNELS_CPU_CPU_KV_CACHE_H_
#define STAGECOACH_KERNELS_CPU_CPU_KV_CACHE_H_

#include <cstddef>
#include <memory>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/cpu/aligned_buffer.h"
#include "kernels/cpu/cpu_kernels.h"

namespace stagecoach::cpu {

static_assert(kTilePositions == kKvBlockPositions);

// [layers][blocks][kv_heads] tiles in the KvFormat of the shape's type.
class CpuKvCache : public KvCache {
 public:
  // Errors: INVALID_ARGUMENT, RESOURCE_EXHAUSTED.
  static absl::StatusOr<std::unique_ptr<CpuKvCache>> Create(const KvShape& shape);

  const KvShape& shape() const { return shape_; }
  KvFormat format() const { return format_; }
  size_t block_stride() const { return head_bytes_ * shape_.kv_heads; }  // bytes
  // Block 0 of one layer and head.
  std::byte* head(int layer, int kv_head) const {
    return memory_.data() + block_stride() * shape_.blocks * layer + head_bytes_ * kv_head;
  }
  // Stores the keys [kv_heads][key_length] and values [kv_heads][value_length] of one position.
  void Store(const CpuKernels& kernels, int layer, int block, int position_in_block,
             const float* keys, const float* values) const;
  // Fetches the lines that Store writes the keys to: one for each of their values.
  void PrefetchKeys(int layer, int block, int position_in_block) const;
  // In all layers.
  void CopyBlock(int from, int to) const;
  void ClearBlock(int block) const;

 private:
  void StoreFloats(int position_in_block, const float* key, const float* value,
                   std::byte* tile) const;
  void StoreHalves(const CpuKernels& kernels, int position_in_block, const float* key,
                   const float* value, std::byte* tile) const;
  void StoreQuants(const CpuKernels& kernels, int position_in_block, const float* key,
                   const float* value, std::byte* tile) const;
  std::byte* block(int layer, int block) const {
    return head(layer, 0) + static_cast<size_t>(block) * block_stride();
  }

  KvShape shape_;
  KvFormat format_ = KvFormat::kHalf;
  size_t head_bytes_ = 0;
  AlignedBuffer<std::byte> memory_;
};

}  // namespace stagecoach::cpu

#endif  // STAGECOACH_KERNELS_CPU_CPU_KV_CACHE_H_
