#include "kernels/cuda/rope.h"

#include <cmath>

#include "kernels/cuda/device_ops.cuh"
#include "kernels/cuda/launch.cuh"
#include "model/half.h"

namespace stagecoach::cuda {
namespace {

constexpr int kTurnThreads = 64;
constexpr int kHeadThreads = 64;  // of a head: two dims each

// Grid: x = rows.
__global__ void TurnsKernel(const double* frequencies, int pairs, const int32_t* positions,
                            float2* turns) {
  LetNextKernelStart();
  WaitForPreviousKernel();
  const size_t row = blockIdx.x;
  for (int i = threadIdx.x; i < pairs; i += kTurnThreads) {
    double sine, cosine;
    sincos(positions[row] * frequencies[i], &sine, &cosine);
    turns[row * pairs + i] = make_float2(static_cast<float>(cosine), static_cast<float>(sine));
  }
}

// Dims 2i and 2i + 1 of a head of `length` dims, turned if they are among the first `pairs`; zero
// beyond the head.
__device__ float2 TurnedPair(const float* head, int i, int length, const float2* turns, int pairs) {
  const float even = 2 * i < length ? head[2 * i] : 0.0f;
  const float odd = 2 * i + 1 < length ? head[2 * i + 1] : 0.0f;
  if (i >= pairs) return make_float2(even, odd);
  const float2 turn = turns[i];
  return make_float2(even * turn.x - odd * turn.y, even * turn.y + odd * turn.x);
}

// In place, by all threads of the block.
__device__ void RotateHead(float* head, int length, const float2* turns, int pairs) {
  for (int i = threadIdx.x; i < pairs; i += kHeadThreads) {
    const float2 turned = TurnedPair(head, i, length, turns, pairs);
    head[2 * i] = turned.x, head[2 * i + 1] = turned.y;
  }
}

__device__ void StorePair(float2 pair, float* out) { *reinterpret_cast<float2*>(out) = pair; }
__device__ void StorePair(float2 pair, uint16_t* out) {
  *reinterpret_cast<ushort2*>(out) = make_ushort2(FloatToHalf(pair.x), FloatToHalf(pair.y));
}

// Grid: x = heads, y = rows.
__global__ void RopeKernel(const float2* turns, int pairs, int head_dim, float* x) {
  LetNextKernelStart();
  WaitForPreviousKernel();
  const size_t row = blockIdx.y, head = row * gridDim.x + blockIdx.x;
  RotateHead(x + head * head_dim, head_dim, turns + row * pairs, pairs);
}

// The place of one head at one position in the KV cache.
template <typename Element>
struct KvPlace {
  Element* keys;
  Element* values;
  int place;  // in the block

  __device__ void StoreKeys(int i, float2 pair) const {
    StorePair(pair, keys + (i / 4 * kKvBlockPositions + place) * 8 + i % 4 * 2);
  }
};

// By all threads of the block. Returns whether a value was not finite (and is stored as zero).
__device__ bool StoreTransposed(const float* v, int length, const KvPlace<uint16_t>& to) {
  bool finite = true;
  for (int d = threadIdx.x; d < length; d += kHeadThreads) {
    finite = finite && HalfIsFinite(FloatToHalf(v[d]));
  }
  const bool broken = __syncthreads_or(!finite);
  for (int d = threadIdx.x; d < length; d += kHeadThreads) {
    to.values[d * kKvBlockPositions + to.place] = broken ? 0 : FloatToHalf(v[d]);
  }
  return broken;
}

// Grid: x = heads of q, then KV heads, y = rows.
template <typename Element>
__global__ void RopeAndStoreKernel(const float2* turns, int pairs, RowTable table, int heads,
                                   float* q, const float* k, const float* v, KvLayout kv) {
  LetNextKernelStart();
  WaitForPreviousKernel();
  const size_t row = blockIdx.y;
  turns += row * pairs;
  if (blockIdx.x < heads) {
    RotateHead(q + (row * heads + blockIdx.x) * kv.key_length, kv.key_length, turns, pairs);
    return;
  }
  const int head = blockIdx.x - heads, position = table.positions[row];
  const size_t block = table.blocks[table.first[row] + position / kKvBlockPositions];
  Element* const keys =
      reinterpret_cast<Element*>(kv.data) + (block * kv.kv_heads + head) * kv.head_elements();
  const KvPlace<Element> to = {keys, keys + kv.padded_keys() * kKvBlockPositions,
                               position % kKvBlockPositions};
  k += (row * kv.kv_heads + head) * kv.key_length;
  v += (row * kv.kv_heads + head) * kv.value_length;
  bool broken = false;
  if constexpr (sizeof(Element) == sizeof(uint16_t)) {
    if (kv.tensor_cores()) broken = StoreTransposed(v, kv.value_length, to);
  }
  for (int i = threadIdx.x; i < kv.padded_keys() / 2; i += kHeadThreads) {
    float2 pair = TurnedPair(k, i, kv.key_length, turns, pairs);
    if (broken) pair.x = NAN;
    to.StoreKeys(i, pair);
  }
  if (kv.tensor_cores()) return;
  for (int i = threadIdx.x; i < kv.padded_values() / 2; i += kHeadThreads) {
    StorePair(TurnedPair(v, i, kv.value_length, nullptr, /*pairs=*/0),
              to.values + to.place * kv.padded_values() + 2 * i);
  }
}

}  // namespace

std::vector<double> RopeFrequencies(const ModelParams& params) {
  std::vector<double> frequencies;
  for (int i = 0; i < params.rope_dims / 2; ++i) {
    const double power = -2.0 * i / params.rope_dims;
    const double factor = params.rope_freq_factors.empty() ? 1.0 : params.rope_freq_factors[i];
    frequencies.push_back(double{params.rope_freq_scale} *
                          std::pow(double{params.rope_freq_base}, power) / factor);
  }
  return frequencies;
}

cudaError_t ComputeTurns(const double* frequencies, int pairs, const int32_t* positions, int rows,
                         float2* turns, cudaStream_t stream) {
  const LaunchShape shape = {.grid = dim3(rows), .threads = kTurnThreads};
  return LaunchKernel(TurnsKernel, shape, stream, frequencies, pairs, positions, turns);
}

cudaError_t Rope(const float2* turns, int pairs, int rows, int heads, int head_dim, float* x,
                 cudaStream_t stream) {
  const LaunchShape shape = {.grid = dim3(heads, rows), .threads = kHeadThreads};
  return LaunchKernel(RopeKernel, shape, stream, turns, pairs, head_dim, x);
}

cudaError_t RopeAndStore(const float2* turns, int pairs, const RowTable& table, int rows, int heads,
                         float* q, const float* k, const float* v, const KvLayout& kv,
                         cudaStream_t stream) {
  const auto kernel = kv.half ? RopeAndStoreKernel<uint16_t> : RopeAndStoreKernel<float>;
  const LaunchShape shape = {.grid = dim3(heads + kv.kv_heads, rows), .threads = kHeadThreads};
  return LaunchKernel(kernel, shape, stream, turns, pairs, table, heads, q, k, v, kv);
}

}  // namespace stagecoach::cuda
