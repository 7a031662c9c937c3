#include "kernels/cuda/rope.h"

#include <cmath>

#include "kernels/cuda/device_ops.cuh"
#include "kernels/cuda/kv_store.cuh"
#include "kernels/cuda/launch.cuh"

namespace stagecoach::cuda {
namespace {

constexpr int kHeadThreads = 64;  // of a head: two dims each

// In place, by all threads of the block.
__device__ void RotateHead(float* head, int length, const float2* turns, int pairs) {
  for (int i = threadIdx.x; i < pairs; i += kHeadThreads) {
    const float2 turned = TurnedPair(head, i, length, turns, pairs);
    head[2 * i] = turned.x, head[2 * i + 1] = turned.y;
  }
}

// Grid: x = heads, y = rows.
__global__ void RopeKernel(const float2* turns, int pairs, int head_dim, float* x) {
  LetNextKernelStart();
  WaitForPreviousKernel();
  const size_t row = blockIdx.y, head = row * gridDim.x + blockIdx.x;
  RotateHead(x + head * head_dim, head_dim, turns + row * pairs, pairs);
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
  const int head = static_cast<int>(blockIdx.x) - heads;
  const HeadPlace<Element> place(kv, table, row, head);
  StoreHead<kHeadThreads>(place, kv, row, head, k, v, turns, pairs);
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
