#include "kernels/cuda/finite_rows.h"
#include "kernels/cuda/launch.cuh"

namespace stagecoach::cuda {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kExponent = 0x7f800000;

__global__ void FiniteRowsKernel(const float* x, int columns, uint8_t* finite) {
  x += static_cast<size_t>(blockIdx.x) * columns;
  int bad = 0;
  for (int k = threadIdx.x; k < columns; k += kThreads) {
    bad |= (__float_as_uint(x[k]) & kExponent) == kExponent;
  }
  bad = __syncthreads_or(bad);
  if (threadIdx.x == 0) finite[blockIdx.x] = bad == 0;
}

}  // namespace

cudaError_t FindFiniteRows(const float* x, int rows, int columns, uint8_t* finite,
                           cudaStream_t stream) {
  const LaunchShape shape = {.grid = dim3(rows), .threads = kThreads, .overlap = false};
  return LaunchKernel(FiniteRowsKernel, shape, stream, x, columns, finite);
}

}  // namespace stagecoach::cuda
