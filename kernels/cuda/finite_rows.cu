#include "kernels/cuda/device_ops.cuh"
#include "kernels/cuda/finite_rows.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/warp.cuh"

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

// By the first warp.
__device__ int32_t PickLargest(const TopKey* keys, int runs) {
  TopKey largest = 0;
  for (int i = threadIdx.x; i < runs; i += kWarpLanes) largest = max(largest, keys[i]);
  const TopLogit best = FromTopKey(WarpMax(largest));
  return isnan(best.logit) ? -1 : best.id;
}

// As FiniteRowsKernel, into memory of the host, and the tokens with it. Block i has row i and, if
// there is one, pick i, which may be another row's.
__global__ void EndStepKernel(const float* x, int columns, const __grid_constant__ StepPicks picks,
                              uint8_t* finite, int32_t* tokens) {
  LetNextKernelStart();
  WaitForPreviousKernel();
  const int pick = blockIdx.x;
  if (pick < picks.count && threadIdx.x < kWarpLanes) {
    int32_t token;
    if (picks.largest == nullptr) {
      token = picks.drawn[pick];
    } else {
      token = PickLargest(picks.largest + static_cast<size_t>(pick) * picks.runs, picks.runs);
      if (threadIdx.x == 0) picks.drawn[pick] = token;
    }
    if (threadIdx.x == 0) tokens[pick] = token;
  }
  FindFinite(x, columns, finite);
}

}  // namespace

cudaError_t FindFiniteRows(const float* x, int rows, int columns, uint8_t* finite,
                           cudaStream_t stream) {
  const LaunchShape shape = {.grid = dim3(rows), .threads = kThreads, .overlap = false};
  return LaunchKernel(FiniteRowsKernel, shape, stream, x, columns, finite);
}

cudaError_t EndStep(const float* x, int rows, int columns, const StepPicks& picks, uint8_t* finite,
                    int32_t* tokens, cudaStream_t stream) {
  const LaunchShape shape = {.grid = dim3(rows), .threads = kThreads};
  return LaunchKernel(EndStepKernel, shape, stream, x, columns, picks, finite, tokens);
}

}  // namespace stagecoach::cuda
