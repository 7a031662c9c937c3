#include "kernels/cpu/cpu_kv_cache.h"

#include <algorithm>
#include <cstring>

#include <fmt/format.h>

#include "model/status_macros.h"

namespace stagecoach::cpu {
namespace {

size_t RoundUp8(int n) { return (static_cast<size_t>(n) + 7) / 8 * 8; }

}  // namespace

absl::StatusOr<std::unique_ptr<CpuKvCache>> CpuKvCache::Create(const KvShape& shape) {
  constexpr int kMaxHead = 1 << 16;
  if (shape.layers < 1 || shape.kv_heads < 1 || shape.key_length < 1 || shape.value_length < 1 ||
      shape.blocks < 1 || shape.key_length > kMaxHead || shape.value_length > kMaxHead) {
    return absl::InvalidArgumentError("bad shape of a KV cache");
  }
  auto cache = std::make_unique<CpuKvCache>();
  cache->shape_ = shape;
  const size_t element = shape.type == KvType::kF16 ? sizeof(uint16_t) : sizeof(float);
  cache->head_bytes_ = kTilePositions * element * (shape.key_length + RoundUp8(shape.value_length));
  size_t bytes = 0;
  if (__builtin_mul_overflow(cache->head_bytes_, static_cast<size_t>(shape.kv_heads), &bytes) ||
      __builtin_mul_overflow(bytes, static_cast<size_t>(shape.layers), &bytes) ||
      __builtin_mul_overflow(bytes, static_cast<size_t>(shape.blocks), &bytes)) {
    return absl::ResourceExhaustedError("size of the KV cache overflows");
  }
  auto memory = AlignedBuffer<std::byte>::Create(bytes);
  if (!memory.ok()) {
    return absl::ResourceExhaustedError(fmt::format("no memory for a KV cache of {} bytes", bytes));
  }
  cache->memory_ = *std::move(memory);
  return cache;
}

void CpuKvCache::Store(const CpuKernels& kernels, int layer, int block, int position_in_block,
                       const float* keys, const float* values) const {
  const size_t value_stride = RoundUp8(shape_.value_length);
  for (int h = 0; h < shape_.kv_heads; ++h) {
    std::byte* at = head(layer, h) + static_cast<size_t>(block) * block_stride();
    const float* k = keys + static_cast<ptrdiff_t>(h) * shape_.key_length;
    const float* v = values + static_cast<ptrdiff_t>(h) * shape_.value_length;
    if (shape_.type == KvType::kF32) {
      float* out = reinterpret_cast<float*>(at);
      for (int d = 0; d < shape_.key_length; ++d)
        out[d * kTilePositions + position_in_block] = k[d];
      out += static_cast<ptrdiff_t>(shape_.key_length) * kTilePositions;
      std::memcpy(out + position_in_block * value_stride, v, shape_.value_length * sizeof(float));
      continue;
    }
    uint16_t* out = reinterpret_cast<uint16_t*>(at);
    constexpr int kRun = 64;
    for (int first = 0; first < shape_.key_length; first += kRun) {
      uint16_t halves[kRun];
      const int count = std::min(kRun, shape_.key_length - first);
      kernels.to_half(k + first, count, halves);
      for (int d = 0; d < count; ++d) {
        out[(first + d) * kTilePositions + position_in_block] = halves[d];
      }
    }
    out += static_cast<ptrdiff_t>(shape_.key_length) * kTilePositions;
    kernels.to_half(v, shape_.value_length, out + position_in_block * value_stride);
  }
}

}  // namespace stagecoach::cpu
