// Times kernels on the device's own clock.
#ifndef STAGECOACH_KERNELS_CUDA_KERNEL_TIMER_H_
#define STAGECOACH_KERNELS_CUDA_KERNEL_TIMER_H_

#include <cuda_runtime.h>

#include <functional>

#include "absl/status/statusor.h"
#include "kernels/cuda/cuda_device.h"
#include "kernels/op_timer.h"

namespace stagecoach::cuda {

using Launch = std::function<cudaError_t()>;  // on the compute stream

// Seconds that one run of `launch` takes; waits for it. Two or three microseconds more than the
// kernels alone: what the clock's own marks in the stream take.
absl::StatusOr<double> TimeLaunch(const CudaDevice& device, const Launch& launch);

// Runs `launch` until the timer has enough, each time after reading so much other memory that
// nothing of its data is left in the second-level cache.
absl::Status TimeColdLaunches(const CudaDevice& device, const Launch& launch, OpTimer& timer);

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_KERNEL_TIMER_H_
