// What reading memory costs, for measurements.
#ifndef STAGECOACH_KERNELS_CUDA_READ_ALL_H_
#define STAGECOACH_KERNELS_CUDA_READ_ALL_H_

#include <cuda_runtime.h>

#include <cstddef>

namespace stagecoach::cuda {

// Reads `count` (a multiple of 4) floats once; writes *out only if some of them add up to `never`.
cudaError_t ReadAll(const float* data, size_t count, int multiprocessors, float never, float* out,
                    cudaStream_t stream);

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_READ_ALL_H_
