// RMSNorm by warps, the same wherever it is done: a superblock at a time, 8 columns to a lane.
#ifndef STAGECOACH_KERNELS_CUDA_NORM_OPS_CUH_
#define STAGECOACH_KERNELS_CUDA_NORM_OPS_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/activation_ops.cuh"

namespace stagecoach::cuda {

// Among which a row's sum of squares is dealt out: superblock s goes to warp s % kNormWarps.
inline constexpr int kNormWarps = 16;

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

// The same of a row of whole superblocks, 16-byte aligned.
__device__ inline void LoadWholeColumns(const float* row, int superblock, int lane,
                                        float (&v)[kLaneColumns]) {
  const auto* own =
      reinterpret_cast<const float4*>(row + superblock * kSuperblock + lane * kLaneColumns);
#pragma unroll
  for (int i = 0; i < kLaneColumns / 4; ++i) {
    const float4 quad = __ldcg(own + i);
    v[4 * i] = quad.x, v[4 * i + 1] = quad.y, v[4 * i + 2] = quad.z, v[4 * i + 3] = quad.w;
  }
}

// A lane's share in a row's sum of squares.
__device__ inline void AddSquares(const float (&v)[kLaneColumns], float& sum) {
#pragma unroll
  for (float value : v) sum = __fmaf_rn(value, value, sum);
}

// What a row's sum of squares is multiplied by for its mean.
__host__ __device__ inline float NormShare(int k) { return 1.0f / static_cast<float>(k); }

// What a row is multiplied by. squares: of the warps, 16-byte aligned.
__device__ inline float NormFactor(const float* squares, float share, float epsilon) {
  static_assert(kNormWarps == 16);
  float sums[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float4 four = reinterpret_cast<const float4*>(squares)[i];
    sums[i] = __fadd_rn(__fadd_rn(four.x, four.y), __fadd_rn(four.z, four.w));
  }
  const float total = __fadd_rn(__fadd_rn(sums[0], sums[1]), __fadd_rn(sums[2], sums[3]));
  const float mean = __fmul_rn(total, share);
  return rsqrtf(__fadd_rn(mean, epsilon));
}

__device__ inline void Normalise(float factor, const float (&weight)[kLaneColumns],
                                 float (&v)[kLaneColumns]) {
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) v[i] = __fmul_rn(__fmul_rn(v[i], factor), weight[i]);
}

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_NORM_OPS_CUH_
