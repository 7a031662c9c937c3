#include "kernels/cpu/cpu_kv_cache.h"

#include <algorithm>
#include <cstring>

#include <fmt/format.h>

#include "model/status_macros.h"

namespace stagecoach::cpu {
namespace {

// Values that share a scale (KvFormat::kQuant).
constexpr int kRun = 32;
static_assert(kRun == kActivationBlock);

size_t RoundUp8(int n) { return (static_cast<size_t>(n) + 7) / 8 * 8; }
size_t Runs(int n) { return (static_cast<size_t>(n) + kRun - 1) / kRun; }

KvFormat FormatOf(KvType type) {
  switch (type) {
    case KvType::kF16:
      return KvFormat::kHalf;
    case KvType::kF32:
      return KvFormat::kFloat;
    case KvType::kQ8_0:
      return KvFormat::kQuant;
  }
  return KvFormat::kHalf;
}

// Keys and values of one head in one block.
size_t TileBytes(const KvShape& shape) {
  const size_t elements = kTilePositions * (shape.key_length + RoundUp8(shape.value_length));
  if (shape.type == KvType::kF32) return elements * sizeof(float);
  if (shape.type == KvType::kF16) return elements * sizeof(uint16_t);
  const size_t scales = kTilePositions * (Runs(shape.key_length) + Runs(shape.value_length));
  return elements + scales * sizeof(uint16_t);
}

}  // namespace

absl::StatusOr<std::unique_ptr<CpuKvCache>> CpuKvCache::Create(const KvShape& shape) {
  constexpr int kMaxHead = 1 << 16;
  if (shape.layers < 1 || shape.kv_heads < 1 || shape.key_length < 1 || shape.value_length < 1 ||
      shape.blocks < 1 || shape.key_length > kMaxHead || shape.value_length > kMaxHead) {
    return absl::InvalidArgumentError("bad shape of a KV cache");
  }
  auto cache = std::make_unique<CpuKvCache>();
  cache->shape_ = shape;
  cache->format_ = FormatOf(shape.type);
  cache->head_bytes_ = TileBytes(shape);
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
  for (int h = 0; h < shape_.kv_heads; ++h) {
    std::byte* tile = head(layer, h) + static_cast<size_t>(block) * block_stride();
    const float* key = keys + static_cast<ptrdiff_t>(h) * shape_.key_length;
    const float* value = values + static_cast<ptrdiff_t>(h) * shape_.value_length;
    switch (format_) {
      case KvFormat::kFloat:
        StoreFloats(position_in_block, key, value, tile);
        break;
      case KvFormat::kHalf:
        StoreHalves(kernels, position_in_block, key, value, tile);
        break;
      case KvFormat::kQuant:
        StoreQuants(kernels, position_in_block, key, value, tile);
        break;
    }
  }
}

void CpuKvCache::PrefetchKeys(int layer, int block, int position_in_block) const {
  const size_t element = format_ == KvFormat::kFloat  ? sizeof(float)
                         : format_ == KvFormat::kHalf ? sizeof(uint16_t)
                                                      : sizeof(int8_t);
  for (int h = 0; h < shape_.kv_heads; ++h) {
    const std::byte* key =
        head(layer, h) + static_cast<size_t>(block) * block_stride() + position_in_block * element;
    for (int d = 0; d < shape_.key_length; ++d) {
      __builtin_prefetch(key + d * kTilePositions * element, 1);
    }
  }
}

void CpuKvCache::StoreFloats(int position_in_block, const float* key, const float* value,
                             std::byte* tile) const {
  float* out = reinterpret_cast<float*>(tile);
  for (int d = 0; d < shape_.key_length; ++d) out[d * kTilePositions + position_in_block] = key[d];
  out += static_cast<ptrdiff_t>(shape_.key_length) * kTilePositions;
  std::memcpy(out + position_in_block * RoundUp8(shape_.value_length), value,
              shape_.value_length * sizeof(float));
}

void CpuKvCache::StoreHalves(const CpuKernels& kernels, int position_in_block, const float* key,
                             const float* value, std::byte* tile) const {
  uint16_t* out = reinterpret_cast<uint16_t*>(tile);
  constexpr int kAtOnce = 64;
  for (int first = 0; first < shape_.key_length; first += kAtOnce) {
    uint16_t halves[kAtOnce];
    const int count = std::min(kAtOnce, shape_.key_length - first);
    kernels.to_half(key + first, count, halves);
    for (int d = 0; d < count; ++d) {
      out[(first + d) * kTilePositions + position_in_block] = halves[d];
    }
  }
  out += static_cast<ptrdiff_t>(shape_.key_length) * kTilePositions;
  kernels.to_half(value, shape_.value_length,
                  out + position_in_block * RoundUp8(shape_.value_length));
}

void CpuKvCache::StoreQuants(const CpuKernels& kernels, int position_in_block, const float* key,
                             const float* value, std::byte* tile) const {
  // Quantises a run; returns its scale.
  const auto quantize = [&kernels](const float* x, int count, int8_t* quants) {
    float padded[kRun] = {};
    std::copy_n(x, count, padded);
    ActivationScale scale;
    kernels.quantize(padded, kRun, quants, &scale);
    uint16_t half;
    kernels.to_half(&scale.scale, 1, &half);
    return half;
  };
  int8_t quants[kRun];
  int8_t* out = reinterpret_cast<int8_t*>(tile);
  uint16_t* scales = reinterpret_cast<uint16_t*>(out + shape_.key_length * kTilePositions);
  for (int first = 0; first < shape_.key_length; first += kRun) {
    const int count = std::min(kRun, shape_.key_length - first);
    scales[first / kRun * kTilePositions + position_in_block] =
        quantize(key + first, count, quants);
    for (int d = 0; d < count; ++d) {
      out[(first + d) * kTilePositions + position_in_block] = quants[d];
    }
  }
  out = reinterpret_cast<int8_t*>(scales + Runs(shape_.key_length) * kTilePositions);
  const size_t stride = RoundUp8(shape_.value_length);
  scales = reinterpret_cast<uint16_t*>(out + stride * kTilePositions);
  for (int first = 0; first < shape_.value_length; first += kRun) {
    const int count = std::min(kRun, shape_.value_length - first);
    scales[first / kRun * kTilePositions + position_in_block] =
        quantize(value + first, count, quants);
    std::copy_n(quants, count, out + position_in_block * stride + first);
  }
}

void CpuKvCache::CopyBlock(int from, int to) const {
  for (int layer = 0; layer < shape_.layers; ++layer) {
    std::memcpy(block(layer, to), block(layer, from), block_stride());
  }
}

void CpuKvCache::ClearBlock(int cleared) const {
  for (int layer = 0; layer < shape_.layers; ++layer) {
    std::memset(block(layer, cleared), 0, block_stride());
  }
}

}  // namespace stagecoach::cpu
