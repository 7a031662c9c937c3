// Reductions over a warp, in an order that is the same everywhere; all lanes get the result.
#ifndef STAGECOACH_KERNELS_CUDA_WARP_CUH_
#define STAGECOACH_KERNELS_CUDA_WARP_CUH_

#include <cuda_runtime.h>

namespace stagecoach::cuda {

inline constexpr int kWarpLanes = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline float WarpSum(float value) {
  for (int offset = kWarpLanes / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, offset);
  }
  return value;
}
template <typename Value>
__device__ inline Value WarpMax(Value value) {
  for (int offset = kWarpLanes / 2; offset > 0; offset /= 2) {
    value = max(value, __shfl_xor_sync(kAllLanes, value, offset));
  }
  return value;
}

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_WARP_CUH_
