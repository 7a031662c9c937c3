#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/tensor_peak.h"

namespace stagecoach::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 4;
constexpr int kSums = 8;  // independent, so that the latency of none is waited for
constexpr int kRounds = 4096;

// 16 x 8 += 16 x 32 * 32 x 8, and 16 x 8 += 16 x 16 * 16 x 8.
constexpr uint64_t kInt8Ops = 2 * 16 * 8 * 32, kHalfOps = 2 * 16 * 8 * 16;

__global__ void __launch_bounds__(kThreads) Int8Kernel(float never, float* out) {
  const uint32_t a = threadIdx.x * 0x01010101u, b = blockIdx.x * 0x01010101u;
  int sums[kSums][4] = {};
  for (int round = 0; round < kRounds; ++round) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      asm volatile(
          "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%4,%4,%4}, {%5,%5}, "
          "{%0,%1,%2,%3};"
          : "+r"(sums[i][0]), "+r"(sums[i][1]), "+r"(sums[i][2]), "+r"(sums[i][3])
          : "r"(a), "r"(b));
    }
  }
  int total = 0;
  for (int i = 0; i < kSums; ++i) total += sums[i][0] + sums[i][1] + sums[i][2] + sums[i][3];
  if (static_cast<float>(total) == never) *out = never;
}

__global__ void __launch_bounds__(kThreads) HalfKernel(float never, float* out) {
  const uint32_t a = 0x3c003c00u, b = blockIdx.x == 0 ? 0u : 0x3c003c00u;  // ones
  float sums[kSums][4] = {};
  for (int round = 0; round < kRounds; ++round) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%4,%4,%4}, "
          "{%5,%5}, {%0,%1,%2,%3};"
          : "+f"(sums[i][0]), "+f"(sums[i][1]), "+f"(sums[i][2]), "+f"(sums[i][3])
          : "r"(a), "r"(b));
    }
  }
  float total = 0;
  for (int i = 0; i < kSums; ++i) total += sums[i][0] + sums[i][1] + sums[i][2] + sums[i][3];
  if (total == never) *out = never;
}

}  // namespace

cudaError_t RunTensorCores(PeakInput input, int multiprocessors, float never, float* out,
                           cudaStream_t stream) {
  const LaunchShape shape = {.grid = dim3(multiprocessors * kBlocksPerMultiprocessor),
                             .threads = kThreads,
                             .overlap = false};
  return LaunchKernel(input == PeakInput::kInt8 ? Int8Kernel : HalfKernel, shape, stream, never,
                      out);
}

uint64_t TensorOps(PeakInput input, int multiprocessors) {
  const uint64_t warps =
      static_cast<uint64_t>(multiprocessors) * kBlocksPerMultiprocessor * (kThreads / 32);
  return warps * kRounds * kSums * (input == PeakInput::kInt8 ? kInt8Ops : kHalfOps);
}

}  // namespace stagecoach::cuda
