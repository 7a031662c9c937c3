// The arithmetic of activations, the same wherever they are made.
#ifndef STAGECOACH_KERNELS_CUDA_ACTIVATION_OPS_CUH_
#define STAGECOACH_KERNELS_CUDA_ACTIVATION_OPS_CUH_

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/quant_matmul.h"

namespace stagecoach::cuda {

inline constexpr int kLaneColumns = 8;  // of a superblock: neighbours, of one lane of a warp

__device__ inline float SiluTimes(float gate, float up) {
  return __fmul_rn(__fdiv_rn(gate, 1.0f + expf(-gate)), up);
}

__device__ inline uint16_t ToHalfActivation(float value) {
  return __half_as_ushort(__float2half_rn(__fmul_rn(value, kActivationScale)));
}
__device__ inline __half2 ToHalfActivations(float first, float second) {
  return __floats2half2_rn(__fmul_rn(first, kActivationScale), __fmul_rn(second, kActivationScale));
}
__device__ inline uint4 ToHalfActivations(const float (&v)[kLaneColumns]) {
  __half2 pairs[kLaneColumns / 2];
#pragma unroll
  for (int i = 0; i < kLaneColumns / 2; ++i) {
    pairs[i] = ToHalfActivations(v[2 * i], v[2 * i + 1]);
  }
  uint4 bits;
  memcpy(&bits, pairs, sizeof(bits));
  return bits;
}

// The same; rest: what is missing, divided by kRestScale. Of what is not finite, neither is it.
__device__ inline uint4 ToHalfActivations(const float (&v)[kLaneColumns],
                                          float (&rest)[kLaneColumns]) {
  const uint4 bits = ToHalfActivations(v);
  const auto* halves = reinterpret_cast<const __half*>(&bits);
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) {
    const float taken = __fmul_rn(__half2float(halves[i]), 1 / kActivationScale);
    rest[i] = __fmul_rn(__fsub_rn(v[i], taken), 1 / kRestScale);
  }
  return bits;
}

// A row's halves of kLaneColumns columns from a multiple of that on.
__device__ inline void StoreHalves(const Activations& out, int row, int column, uint4 bits) {
  if (!out.IsWide()) {
    *reinterpret_cast<uint4*>(out.halves + out.HalfPlace(row, column)) = bits;
    return;
  }
  const uint32_t pairs[] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < kLaneColumns / 2; ++i) {
    *reinterpret_cast<uint32_t*>(out.halves + out.HalfPlace(row, column + 2 * i)) = pairs[i];
  }
}

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_ACTIVATION_OPS_CUH_
