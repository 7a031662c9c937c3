#include "kernels/cuda/read_all.h"

#include "kernels/cuda/launch.cuh"

namespace stagecoach::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 8;

__global__ void ReadAllKernel(const float4* data, size_t count, float never, float* out) {
  float sum = 0;
  const size_t stride = static_cast<size_t>(gridDim.x) * kThreads;
#pragma unroll 4
  for (size_t i = static_cast<size_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += stride) {
    const float4 v = __ldcg(data + i);
    sum += v.x + v.y + v.z + v.w;
  }
  if (sum == never) *out = sum;
}

}  // namespace

cudaError_t ReadAll(const float* data, size_t count, int multiprocessors, float never, float* out,
                    cudaStream_t stream) {
  const LaunchShape shape = {.grid = dim3(multiprocessors * kBlocksPerMultiprocessor),
                             .threads = kThreads,
                             .overlap = false};
  return LaunchKernel(ReadAllKernel, shape, stream, reinterpret_cast<const float4*>(data),
                      count / 4, never, out);
}

}  // namespace stagecoach::cuda
