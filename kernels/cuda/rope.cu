#include "kernels/cuda/rope.h"

#include <cmath>

#include "kernels/cuda/device_ops.cuh"
#include "kernels/cuda/launch.cuh"
#include "model/half.h"

namespace stagecoach::cuda {
namespace {

constexpr int kThreads = 256;

__device__ void StoreElement(float value, float* out) { *out = value; }
__device__ void StoreElement(float value, uint16_t* out) { *out = FloatToHalf(value); }

// Cosine and sine of each pair at one position, in shared memory.
struct Turns {
  float cosine[kMaxHeadLength / 2];
  float sine[kMaxHeadLength / 2];

  // By all threads of the block, which are synchronised afterwards.
  __device__ void Compute(const double* frequencies, int pairs, int position) {
    for (int i = threadIdx.x; i < pairs; i += kThreads) {
      double s, c;
      sincos(position * frequencies[i], &s, &c);
      cosine[i] = static_cast<float>(c);
      sine[i] = static_cast<float>(s);
    }
    __syncthreads();
  }

  // The rotated value of dim `d` of a head.
  __device__ float Rotated(const float* head, int d, int pairs) const {
    const int i = d / 2;
    if (i >= pairs) return head[d];
    const float even = head[2 * i], odd = head[2 * i + 1];
    return d % 2 == 0 ? even * cosine[i] - odd * sine[i] : even * sine[i] + odd * cosine[i];
  }

  // By all threads of the block: `heads` heads of head_dim values in place.
  __device__ void RotateHeads(float* x, int heads, int head_dim, int pairs) const {
    for (int j = threadIdx.x; j < heads * pairs; j += kThreads) {
      float* pair = x + static_cast<size_t>(j / pairs) * head_dim + j % pairs * 2;
      const float even = pair[0], odd = pair[1];
      const int i = j % pairs;
      pair[0] = even * cosine[i] - odd * sine[i];
      pair[1] = even * sine[i] + odd * cosine[i];
    }
  }
};

__global__ void RopeKernel(const double* frequencies, int pairs, const int32_t* positions,
                           int heads, int head_dim, float* x) {
  __shared__ Turns turns;
  LetNextKernelStart();
  const size_t row = blockIdx.x;
  turns.Compute(frequencies, pairs, positions[row]);
  WaitForPreviousKernel();
  turns.RotateHeads(x + row * heads * head_dim, heads, head_dim, pairs);
}

template <typename Element>
__global__ void RopeAndStoreKernel(const double* frequencies, int pairs, RowTable table, int heads,
                                   float* q, const float* k, const float* v, KvLayout kv) {
  __shared__ Turns turns;
  LetNextKernelStart();
  const size_t row = blockIdx.x;
  const int position = table.positions[row];
  turns.Compute(frequencies, pairs, position);
  WaitForPreviousKernel();
  if (pairs > 0) {
    turns.RotateHeads(q + row * heads * kv.key_length, heads, kv.key_length, pairs);
  }
  const int place = position % kKvBlockPositions;
  const int32_t block = table.blocks[table.first[row] + position / kKvBlockPositions];
  Element* out = reinterpret_cast<Element*>(kv.data) +
                 static_cast<size_t>(block) * kv.kv_heads * kv.head_elements();
  const int keys = kv.padded_keys(), values = kv.padded_values();
  k += row * kv.kv_heads * kv.key_length;
  v += row * kv.kv_heads * kv.value_length;
  for (int j = threadIdx.x; j < kv.kv_heads * keys; j += kThreads) {
    const int head = j / keys, d = j % keys;
    const float value =
        d < kv.key_length ? turns.Rotated(k + head * kv.key_length, d, pairs) : 0.0f;
    StoreElement(value,
                 out + head * kv.head_elements() + (d / 8 * kKvBlockPositions + place) * 8 + d % 8);
  }
  for (int j = threadIdx.x; j < kv.kv_heads * values; j += kThreads) {
    const int head = j / values, d = j % values;
    StoreElement(d < kv.value_length ? v[head * kv.value_length + d] : 0.0f,
                 out + head * kv.head_elements() + keys * kKvBlockPositions + place * values + d);
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

cudaError_t Rope(const double* frequencies, int pairs, const int32_t* positions, int rows,
                 int heads, int head_dim, float* x, cudaStream_t stream) {
  const LaunchShape shape = {.grid = dim3(rows), .threads = kThreads};
  return LaunchKernel(RopeKernel, shape, stream, frequencies, pairs, positions, heads, head_dim, x);
}

cudaError_t RopeAndStore(const double* frequencies, int pairs, const RowTable& table, int rows,
                         int heads, float* q, const float* k, const float* v, const KvLayout& kv,
                         cudaStream_t stream) {
  const auto kernel = kv.half ? RopeAndStoreKernel<uint16_t> : RopeAndStoreKernel<float>;
  const LaunchShape shape = {.grid = dim3(rows), .threads = kThreads};
  return LaunchKernel(kernel, shape, stream, frequencies, pairs, table, heads, q, k, v, kv);
}

}  // namespace stagecoach::cuda
