// What the tensor cores do at most, for measurements.
#ifndef STAGECOACH_KERNELS_CUDA_TENSOR_PEAK_H_
#define STAGECOACH_KERNELS_CUDA_TENSOR_PEAK_H_

#include <cuda_runtime.h>

#include <cstdint>

namespace stagecoach::cuda {

enum class PeakInput { kInt8, kHalf };  // with int32 and float sums

// Multiplies fragments in registers on all multiprocessors: TensorOps() multiplications and
// additions, by the warp-wide mma instructions that the products use. Writes *out only if a sum is
// `never`.
cudaError_t RunTensorCores(PeakInput input, int multiprocessors, float never, float* out,
                           cudaStream_t stream);
uint64_t TensorOps(PeakInput input, int multiprocessors);

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_TENSOR_PEAK_H_
