// Which rows of a matrix hold finite values only, and what else a step ends with.
#ifndef STAGECOACH_KERNELS_CUDA_FINITE_ROWS_H_
#define STAGECOACH_KERNELS_CUDA_FINITE_ROWS_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/top_logits.h"

namespace stagecoach::cuda {

// finite[i] = 1 if no value of row i of x [rows][columns] is NaN or infinite, else 0.
cudaError_t FindFiniteRows(const float* x, int rows, int columns, uint8_t* finite,
                           cudaStream_t stream);

// The picks of a step, on the device.
struct StepPicks {
  int count = 0;             // up to the step's rows
  int32_t* drawn = nullptr;  // [count]
  // If not null, picks are greedy and still to be made: [count][runs], of FindLargest. EndStep sets
  // drawn to the best one's token, or -1 if its logit is not finite.
  const TopKey* largest = nullptr;
  int runs = 0;
};

// What the host is told at the end of a step: finite[rows] as above, and tokens[picks.count], which
// are picks.drawn. finite and tokens may be pinned memory.
cudaError_t EndStep(const float* x, int rows, int columns, const StepPicks& picks, uint8_t* finite,
                    int32_t* tokens, cudaStream_t stream);

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_FINITE_ROWS_H_
