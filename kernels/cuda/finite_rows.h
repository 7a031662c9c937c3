// Which rows of a matrix hold finite values only.
#ifndef STAGECOACH_KERNELS_CUDA_FINITE_ROWS_H_
#define STAGECOACH_KERNELS_CUDA_FINITE_ROWS_H_

#include <cuda_runtime.h>

#include <cstdint>

namespace stagecoach::cuda {

// finite[i] = 1 if no value of row i of x [rows][columns] is NaN or infinite, else 0.
cudaError_t FindFiniteRows(const float* x, int rows, int columns, uint8_t* finite,
                           cudaStream_t stream);

// What the host is told at the end of a step: finite[rows] as above, and tokens[count], which are
// drawn[count]. finite and tokens may be pinned memory.
cudaError_t EndStep(const float* x, int rows, int columns, const int32_t* drawn, int count,
                    uint8_t* finite, int32_t* tokens, cudaStream_t stream);

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_FINITE_ROWS_H_
