#include <math_constants.h>

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

// One block's words.
__device__ void CopyWords(const StepBegin& begin, int block) {
  const int i = block * kThreads + static_cast<int>(threadIdx.x);
  const int32_t word = i < begin.words ? begin.from[i] : 0;
  WaitForPreviousKernel();
  if (i < begin.words) begin.to[i] = word;
}

__device__ void MakeTurns(const StepBegin& begin, size_t row) {
  const int position = begin.positions[row], pairs = begin.turns.pairs;
  float2* const turns = begin.turns.turns + row * pairs;
  const int first = static_cast<int>(threadIdx.x);
  const float2 turn = first < pairs ? Turn(position, begin.turns.frequencies[first]) : float2();
  WaitForPreviousKernel();
  if (first < pairs) turns[first] = turn;
  for (int i = first + kThreads; i < pairs; i += kThreads) {
    turns[i] = Turn(position, begin.turns.frequencies[i]);
  }
}

// By one thread: what many read of the host's memory at one place comes one by one.
__device__ void LookAtTakenRows(const StepBegin& begin) {
  WaitForPreviousKernel();
  if (threadIdx.x > 0 || __ldcv(begin.taken.spoiled) == 0) return;
  for (int row = 0; row < begin.rows; ++row) {
    begin.taken.rows[static_cast<size_t>(row) * begin.taken.columns] = CUDART_NAN_F;
  }
}

// The next kernel starts when this one is complete, so that all before it is, too: kernels of the
// step read tables, and attention keys and values of earlier steps, before they wait.
//
// Blocks: of the words, of the turns of a row each, and one of the taken rows. What words and turns
// are made of is there before the kernel before this one has ended.
__global__ void BeginStepKernel(const __grid_constant__ StepBegin begin, int copy_blocks,
                                int turn_blocks) {
  const int block = static_cast<int>(blockIdx.x);
  if (block < copy_blocks) {
    CopyWords(begin, block);
  } else if (block < copy_blocks + turn_blocks) {
    MakeTurns(begin, block - copy_blocks);
  } else {
    LookAtTakenRows(begin);
  }
}

}  // namespace

cudaError_t BeginStep(const StepBegin& begin, cudaStream_t stream) {
  const int copy_blocks = (begin.words + kThreads - 1) / kThreads;
  const int turn_blocks = begin.turns.pairs > 0 ? begin.rows : 0;
  const int taken_blocks = begin.taken.spoiled != nullptr ? 1 : 0;
  const LaunchShape shape = {.grid = dim3(copy_blocks + turn_blocks + taken_blocks),
                             .threads = kThreads};
  return LaunchKernel(BeginStepKernel, shape, stream, begin, copy_blocks, turn_blocks);
}

}  // namespace stagecoach::cuda
