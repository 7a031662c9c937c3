// How keys are turned and keys and values get into the KV cache, for the kernels that do so.
#ifndef STAGECOACH_KERNELS_CUDA_KV_STORE_CUH_
#define STAGECOACH_KERNELS_CUDA_KV_STORE_CUH_

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>

#include "kernels/cuda/cuda_kv_cache.h"
#include "kernels/cuda/device_ops.cuh"
#include "kernels/cuda/rope.h"
#include "model/half.h"

namespace stagecoach::cuda {

__device__ inline float2 TurnPair(float even, float odd, float2 turn) {
  return make_float2(even * turn.x - odd * turn.y, even * turn.y + odd * turn.x);
}

// Dims 2i and 2i + 1 of a head of `length` dims, turned if they are among the first `pairs`; zero
// beyond the head.
__device__ inline float2 TurnedPair(const float* head, int i, int length, const float2* turns,
                                    int pairs) {
  const float even = 2 * i < length ? head[2 * i] : 0.0f;
  const float odd = 2 * i + 1 < length ? head[2 * i + 1] : 0.0f;
  return i < pairs ? TurnPair(even, odd, turns[i]) : make_float2(even, odd);
}

__device__ inline void StorePair(float2 pair, float* out) {
  *reinterpret_cast<float2*>(out) = pair;
}
__device__ inline void StorePair(float2 pair, uint16_t* out) {
  *reinterpret_cast<__half2*>(out) = __floats2half2_rn(pair.x, pair.y);
}

// Where else keys and values go, besides the KV cache: nowhere. Into a stage only in caches for
// tensor cores: StoreTransposed awaits what the block's threads copy there.
struct NotStaged {
  static constexpr bool kStaged = false;
};

// Values for tensor cores, by all kThreads threads of the block. Returns whether one was not
// finite; then zeros are stored.
template <int kThreads, typename Stage>
__device__ bool StoreTransposed(const float* v, int length, uint16_t* values, int place,
                                const Stage& stage) {
  const auto half = [&](int d) { return __half_as_ushort(__float2half_rn(v[d])); };
  const int mine = threadIdx.x;
  const uint16_t first = mine < length ? half(mine) : 0;  // often all there is
  bool finite = HalfIsFinite(first);
  for (int d = mine + kThreads; d < length; d += kThreads) finite = finite && HalfIsFinite(half(d));
  if constexpr (Stage::kStaged) AwaitCopies();
  const bool broken = __syncthreads_or(!finite);
  for (int d = mine; d < length; d += kThreads) {
    const uint16_t value = broken ? 0 : d == mine ? first : half(d);
    values[d * kKvBlockPositions + place] = value;
    if constexpr (Stage::kStaged) stage.StoreValue(d, place, value);
  }
  return broken;
}

// Where keys and values of one row and KV head go. Found in tables that are there before the step.
template <typename Element>
struct HeadPlace {
  int place;  // in the KV block
  Element* keys;
  Element* values;

  __device__ HeadPlace(const KvLayout& kv, const RowTable& table, size_t row, int head) {
    const int position = table.positions[row];
    const size_t block = table.blocks[table.first[row] + position / kKvBlockPositions];
    place = position % kKvBlockPositions;
    keys = reinterpret_cast<Element*>(kv.data) + (block * kv.kv_heads + head) * kv.head_elements();
    values = keys + kv.padded_keys() * kKvBlockPositions;
  }
};

// Stores one KV head of one row, by all kThreads threads of the block. k, v: [rows][kv_heads][..];
// turns: of this row. stage: see NotStaged.
template <int kThreads, typename Element, typename Stage = NotStaged>
__device__ void StoreHead(const HeadPlace<Element>& to, const KvLayout& kv, size_t row, int head,
                          const float* k, const float* v, const float2* turns, int pairs,
                          const Stage& stage = {}) {
  const auto [place, keys, values] = to;
  k += (row * kv.kv_heads + head) * kv.key_length;
  v += (row * kv.kv_heads + head) * kv.value_length;
  const auto turned = [&](int i) { return TurnedPair(k, i, kv.key_length, turns, pairs); };
  const int key_pairs = kv.padded_keys() / 2;
  int i = threadIdx.x;
  float2 pair =
      i < key_pairs ? turned(i) : make_float2(0, 0);  // before a barrier stands in the way
  bool broken = false;
  if constexpr (sizeof(Element) == sizeof(uint16_t)) {
    if (kv.tensor_cores()) {
      broken = StoreTransposed<kThreads>(v, kv.value_length, values, place, stage);
    }
  }
  while (i < key_pairs) {
    if (broken) pair.x = NAN;
    StorePair(pair, keys + (i / 4 * kKvBlockPositions + place) * 8 + i % 4 * 2);
    if constexpr (Stage::kStaged) stage.StoreKey(i, place, pair);
    i += kThreads;
    if (i < key_pairs) pair = turned(i);
  }
  if (kv.tensor_cores()) return;
  for (int i = threadIdx.x; i < kv.padded_values() / 2; i += kThreads) {
    StorePair(TurnedPair(v, i, kv.value_length, nullptr, /*pairs=*/0),
              values + place * kv.padded_values() + 2 * i);
  }
}

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_KV_STORE_CUH_
