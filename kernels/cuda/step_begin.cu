#include "kernels/cuda/device_ops.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/step_begin.h"

namespace stagecoach::cuda {
namespace {

constexpr int kThreads = 128;

__device__ float2 Turn(int position, double frequency) {
  double sine, cosine;
  sincos(position * frequency, &sine, &cosine);
  return make_float2(static_cast<float>(cosine), static_cast<float>(sine));
}

// The block's words, or (from block copy_blocks on) the turns of its row. What these are made of is
// there before the kernel before this one has ended.
__global__ void BeginStepKernel(const int32_t* from, int words, int32_t* to, int copy_blocks,
                                const int32_t* positions, TurnsOfRows out) {
  if (blockIdx.x < copy_blocks) {
    const int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
    const int32_t word = i < words ? from[i] : 0;
    WaitForPreviousKernel();
    if (i < words) to[i] = word;
    return;
  }
  const size_t row = blockIdx.x - copy_blocks;
  const int position = positions[row];
  float2* const turns = out.turns + row * out.pairs;
  const int first = static_cast<int>(threadIdx.x);
  const float2 turn = first < out.pairs ? Turn(position, out.frequencies[first]) : float2();
  WaitForPreviousKernel();
  if (first < out.pairs) turns[first] = turn;
  for (int i = first + kThreads; i < out.pairs; i += kThreads) {
    turns[i] = Turn(position, out.frequencies[i]);
  }
}

}  // namespace

cudaError_t BeginStep(const int32_t* from, int words, int32_t* to, const int32_t* positions,
                      int rows, const TurnsOfRows& turns, cudaStream_t stream) {
  const int copy_blocks = (words + kThreads - 1) / kThreads;
  const int turn_blocks = turns.pairs > 0 ? rows : 0;
  const LaunchShape shape = {.grid = dim3(copy_blocks + turn_blocks), .threads = kThreads};
  return LaunchKernel(BeginStepKernel, shape, stream, from, words, to, copy_blocks, positions,
                      turns);
}

}  // namespace stagecoach::cuda
