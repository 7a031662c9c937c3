// What a user is told of a GPU that cannot be used: one line, with what to do. Pure.
#ifndef STAGECOACH_KERNELS_CUDA_DEVICE_CHECK_H_
#define STAGECOACH_KERNELS_CUDA_DEVICE_CHECK_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <string>

#include "absl/status/status.h"
#include "kernels/cuda/kernel_set.h"

namespace stagecoach::cuda {

// Versions as CUDA gives them: 13000 is 13.0; a driver of 0 is none.
struct DriverState {
  cudaError_t error = cudaSuccess;  // of counting the GPUs
  int gpus = 0;
  int driver = 0;
  int runtime = 0;
};
// Whether cuda:<index> is there. Errors: UNAVAILABLE, OUT_OF_RANGE.
absl::Status CheckDriver(const DriverState& state, int index);

inline constexpr int kLeastMajor = 8;  // compute capability that the kernels are written for

struct GpuState {
  std::string name;
  int major = 0, minor = 0;  // compute capability
  size_t shared_bytes = 0;   // that a block may have
  bool has_kernels = false;  // compiled for it, or as PTX
  KernelSet kernels = KernelSet::kBulk;
};
// Whether the program's kernels, compiled for `architectures` ("90a,100"), run on cuda:<index>.
// Errors: FAILED_PRECONDITION.
absl::Status CheckGpu(const GpuState& gpu, int index, const std::string& architectures);

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_DEVICE_CHECK_H_
