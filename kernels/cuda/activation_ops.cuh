// The arithmetic of activations, the same wherever they are made.
#ifndef STAGECOACH_KERNELS_CUDA_ACTIVATION_OPS_CUH_
#define STAGECOACH_KERNELS_CUDA_ACTIVATION_OPS_CUH_

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/quant_matmul.h"

namespace stagecoach::cuda {

inline constexpr int kLaneColumns = 8;  // of a superblock: neighbours, of one lane of a warp
inline constexpr int kNormWarps = 16;   // among which a row's sum of squares is dealt out

__device__ inline float SiluTimes(float gate, float up) {
  return __fmul_rn(__fdiv_rn(gate, 1.0f + expf(-gate)), up);
}

__device__ inline uint16_t ToHalfActivation(float value) {
  return __half_as_ushort(__float2half_rn(__fmul_rn(value, kActivationScale)));
}
__device__ inline uint4 ToHalfActivations(const float (&v)[kLaneColumns]) {
  __half2 pairs[kLaneColumns / 2];
#pragma unroll
  for (int i = 0; i < kLaneColumns / 2; ++i) {
    pairs[i] = __floats2half2_rn(__fmul_rn(v[2 * i], kActivationScale),
                                 __fmul_rn(v[2 * i + 1], kActivationScale));
  }
  uint4 bits;
  memcpy(&bits, pairs, sizeof(bits));
  return bits;
}

// A lane's 8 columns of a row of k floats, zero beyond it. Past the first-level cache: the kernel
// that wrote them may have overlapped this one.
__device__ inline void LoadColumns(const float* row, int k, int superblock, int lane,
                                   float (&v)[kLaneColumns]) {
  const int column = superblock * kSuperblock + lane * kLaneColumns;
#pragma unroll
  for (int i = 0; i < kLaneColumns; i += 4) {
    if (column + i + 4 <= k && reinterpret_cast<uintptr_t>(row + column + i) % 16 == 0) {
      const float4 quad = __ldcg(reinterpret_cast<const float4*>(row + column + i));
      v[i] = quad.x, v[i + 1] = quad.y, v[i + 2] = quad.z, v[i + 3] = quad.w;
    } else {
      for (int j = i; j < i + 4; ++j) v[j] = column + j < k ? __ldcg(row + column + j) : 0.0f;
    }
  }
}

// The share of one of kNormWarps warps in a row's sum of squares; the same in all lanes.
__device__ inline float SquaresOfWarp(const float* row, int k, int superblocks, int warp,
                                      int lane) {
  float squares = 0;
  for (int s = warp; s < superblocks; s += kNormWarps) {
    float v[kLaneColumns];
    LoadColumns(row, k, s, lane, v);
#pragma unroll
    for (float value : v) squares = __fmaf_rn(value, value, squares);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    squares = __fadd_rn(squares, __shfl_xor_sync(0xffffffff, squares, mask));
  }
  return squares;
}

// What a row is multiplied by. squares: of the warps, in order.
__device__ inline float NormFactor(const float (&squares)[kNormWarps], int k, float epsilon) {
  float total = 0;
#pragma unroll
  for (float part : squares) total = __fadd_rn(total, part);
  const float mean = __fdiv_rn(total, static_cast<float>(k));
  return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, epsilon)));
}

// A lane's 8 columns of a row, normalised.
__device__ inline void NormColumns(const float* row, const float* weight, float factor, int k,
                                   int superblock, int lane, float (&v)[kLaneColumns]) {
  float w[kLaneColumns];
  LoadColumns(row, k, superblock, lane, v);
  LoadColumns(weight, k, superblock, lane, w);
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) v[i] = __fmul_rn(__fmul_rn(v[i], factor), w[i]);
}

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_ACTIVATION_OPS_CUH_
