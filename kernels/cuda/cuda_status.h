// CUDA error codes become absl::Status at the call.
#ifndef STAGECOACH_KERNELS_CUDA_CUDA_STATUS_H_
#define STAGECOACH_KERNELS_CUDA_CUDA_STATUS_H_

#include <cuda_runtime.h>

#include <functional>

#include "absl/status/status.h"

namespace stagecoach::cuda {

// OK, RESOURCE_EXHAUSTED if memory ran out, else INTERNAL; the message names the code, the call and
// its place. An error that has ruined the process's context (a kernel's bad access, an
// uncorrectable memory error) is also given to the device fault handler.
absl::Status CudaStatus(cudaError_t error, const char* call, const char* file, int line);

// Process-wide, as such an error is. Thread-safe. nullptr: none.
void SetDeviceFaultHandler(std::function<void(const absl::Status&)> handler);

}  // namespace stagecoach::cuda

// Returns the status of a CUDA call from the calling function unless it succeeded.
#define STAGECOACH_RETURN_IF_CUDA_ERROR(call)                                       \
  do {                                                                              \
    if (const cudaError_t cuda_error = (call); cuda_error != cudaSuccess) {         \
      return ::stagecoach::cuda::CudaStatus(cuda_error, #call, __FILE__, __LINE__); \
    }                                                                               \
  } while (false)

#endif  // STAGECOACH_KERNELS_CUDA_CUDA_STATUS_H_
