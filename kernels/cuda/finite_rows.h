// Which rows of a matrix hold finite values only.
#ifndef STAGECOACH_KERNELS_CUDA_FINITE_ROWS_H_
#define STAGECOACH_KERNELS_CUDA_FINITE_ROWS_H_

#include <cuda_runtime.h>

#include <cstdint>

namespace stagecoach::cuda {

// finite[i] = 1 if no value of row i of x [rows][columns] is NaN or infinite, else 0.
cudaError_t FindFiniteRows(const float* x, int rows, int columns, uint8_t* finite,
                           cudaStream_t stream);

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_FINITE_ROWS_H_
