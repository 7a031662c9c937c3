#include "kernels/cuda/device_ops.cuh"
#include "kernels/cuda/finite_rows.h"
#include "kernels/cuda/launch.cuh"

namespace stagecoach::cuda {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kExponent = 0x7f800000;

// Of the block's row.
__device__ void FindFinite(const float* x, int columns, uint8_t* finite) {
  x += static_cast<size_t>(blockIdx.x) * columns;
  int bad = 0;
  for (int k = threadIdx.x; k < columns; k += kThreads) {
    bad |= (__float_as_uint(x[k]) & kExponent) == kExponent;
  }
  bad = __syncthreads_or(bad);
  if (threadIdx.x == 0) finite[blockIdx.x] = bad == 0;
}

__global__ void FiniteRowsKernel(const float* x, int columns, uint8_t* finite) {
  FindFinite(x, columns, finite);
}

// As FiniteRowsKernel, into memory of the host, and the tokens with it.
__global__ void EndStepKernel(const float* x, int columns, const int32_t* drawn, int count,
                              uint8_t* finite, int32_t* tokens) {
  LetNextKernelStart();
  WaitForPreviousKernel();
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < count; i += gridDim.x * kThreads) {
    tokens[i] = drawn[i];
  }
  FindFinite(x, columns, finite);
}

}  // namespace

cudaError_t FindFiniteRows(const float* x, int rows, int columns, uint8_t* finite,
                           cudaStream_t stream) {
  const LaunchShape shape = {.grid = dim3(rows), .threads = kThreads, .overlap = false};
  return LaunchKernel(FiniteRowsKernel, shape, stream, x, columns, finite);
}

cudaError_t EndStep(const float* x, int rows, int columns, const int32_t* drawn, int count,
                    uint8_t* finite, int32_t* tokens, cudaStream_t stream) {
  const LaunchShape shape = {.grid = dim3(rows), .threads = kThreads};
  return LaunchKernel(EndStepKernel, shape, stream, x, columns, drawn, count, finite, tokens);
}

}  // namespace stagecoach::cuda
