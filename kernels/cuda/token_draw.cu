#include "kernels/cuda/token_draw.h"

#include "kernels/cuda/device_ops.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/warp.cuh"
#include "kernels/sampling_units.h"

namespace stagecoach::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpLanes;
constexpr int kRunTokens = 4096;  // of a row, that a block adds up
constexpr int kThreadTokens = kRunTokens / kThreads;

struct Powers {
  double values[portable_math_internal::kTableSize];
};
constexpr Powers MakePowers() {
  Powers powers = {};
  for (int i = 0; i < portable_math_internal::kTableSize; ++i) {
    powers.values[i] = portable_math_internal::kPowerTable[i];
  }
  return powers;
}
__device__ const Powers kPowers = MakePowers();

// All threads; `powers` may be read from then on.
__device__ void LoadPowers(double* powers) {
  for (int i = threadIdx.x; i < portable_math_internal::kTableSize; i += kThreads) {
    powers[i] = kPowers.values[i];
  }
  __syncthreads();
}

// What this thread's tokens of the run weigh: kThreadTokens neighbours from `first` on.
__device__ uint64_t ThreadUnits(const double* powers, const float* logits, int first, int vocab,
                                float best, double temperature) {
  uint64_t sum = 0;
  const int last = min(first + kThreadTokens, vocab);
  for (int i = first; i < last; ++i) sum += SamplingUnits(powers, logits[i], best, temperature);
  return sum;
}

// Grid: x = runs of a row, y = rows. sums: [rows][runs].
__global__ void SumRunsKernel(const float* logits, int vocab, const TopKey* best, int stride,
                              const TokenDraw* draws, uint64_t* sums) {
  __shared__ double powers[portable_math_internal::kTableSize];
  __shared__ uint64_t warp_sums[kWarps];
  LetNextKernelStart();
  LoadPowers(powers);
  WaitForPreviousKernel();
  const size_t row = blockIdx.y;
  if (draws[row].temperature == 0) return;
  const TopLogit largest = FromTopKey(best[row * stride]);
  const int first = blockIdx.x * kRunTokens + threadIdx.x * kThreadTokens;
  uint64_t sum = ThreadUnits(powers, logits + row * vocab, first, vocab, largest.logit,
                             draws[row].temperature);
  for (int offset = kWarpLanes / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, offset);
  }
  if (threadIdx.x % kWarpLanes == 0) warp_sums[threadIdx.x / kWarpLanes] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = 0;
  for (const uint64_t of_warp : warp_sums) sum += of_warp;
  sums[row * gridDim.x + blockIdx.x] = sum;
}

// A run and how far into its units the target lies.
struct Place {
  int run;
  uint64_t target;
};

__device__ Place FindRun(const uint64_t* sums, int runs, double uniform) {
  uint64_t total = 0;
  for (int run = 0; run < runs; ++run) total += sums[run];
  uint64_t target = DrawTarget(total, uniform);
  int run = 0;
  while (run + 1 < runs && target >= sums[run]) target -= sums[run++];
  return {run, target};
}

// A block for each row.
__global__ void PickKernel(const float* logits, int vocab, const TopKey* best,
                           const TokenDraw* draws, const uint64_t* sums, int runs,
                           int32_t* tokens) {
  __shared__ double powers[portable_math_internal::kTableSize];
  __shared__ uint64_t thread_sums[kThreads];
  __shared__ Place place;
  LetNextKernelStart();
  LoadPowers(powers);
  WaitForPreviousKernel();
  const size_t row = blockIdx.x;
  const TopLogit largest = FromTopKey(best[row]);
  if (isnan(largest.logit)) {
    if (threadIdx.x == 0) tokens[row] = -1;
    return;  // the whole block
  }
  const double temperature = draws[row].temperature;
  if (temperature == 0) {
    if (threadIdx.x == 0) tokens[row] = largest.id;
    return;
  }
  logits += row * vocab;
  if (threadIdx.x == 0) place = FindRun(sums + row * runs, runs, draws[row].uniform);
  __syncthreads();
  const int first = place.run * kRunTokens + threadIdx.x * kThreadTokens;
  thread_sums[threadIdx.x] = ThreadUnits(powers, logits, first, vocab, largest.logit, temperature);
  __syncthreads();
  uint64_t before = 0;
  for (int i = 0; i < static_cast<int>(threadIdx.x); ++i) before += thread_sums[i];
  const uint64_t target = place.target;
  if (target < before || target >= before + thread_sums[threadIdx.x]) return;  // all but one
  const int last = min(first + kThreadTokens, vocab);
  for (int i = first; i < last; ++i) {
    before += SamplingUnits(powers, logits[i], largest.logit, temperature);
    if (before > target) {
      tokens[row] = i;
      return;
    }
  }
}

}  // namespace

int UnitSums(int vocab) { return (vocab + kRunTokens - 1) / kRunTokens; }

cudaError_t SumUnits(const float* logits, int rows, int vocab, const TopKey* best, int stride,
                     const TokenDraw* draws, uint64_t* sums, cudaStream_t stream) {
  return LaunchKernel(SumRunsKernel, {.grid = dim3(UnitSums(vocab), rows), .threads = kThreads},
                      stream, logits, vocab, best, stride, draws, sums);
}

cudaError_t DrawTokens(const float* logits, int rows, int vocab, const TopKey* best,
                       const TokenDraw* draws, uint64_t* sums, int32_t* tokens,
                       cudaStream_t stream) {
  const cudaError_t error = SumUnits(logits, rows, vocab, best, /*stride=*/1, draws, sums, stream);
  if (error != cudaSuccess) return error;
  return LaunchKernel(PickKernel, {.grid = dim3(rows), .threads = kThreads}, stream, logits, vocab,
                      best, draws, sums, UnitSums(vocab), tokens);
}

}  // namespace stagecoach::cuda
