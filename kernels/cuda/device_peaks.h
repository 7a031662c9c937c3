// What a GPU can do at best, measured: the ceilings that kernels are held against.
#ifndef STAGECOACH_KERNELS_CUDA_DEVICE_PEAKS_H_
#define STAGECOACH_KERNELS_CUDA_DEVICE_PEAKS_H_

#include "absl/status/statusor.h"
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/tensor_peak.h"

namespace stagecoach::cuda {

// Bytes per second of reading memory that no cache holds.
absl::StatusOr<double> MeasureReadBandwidth(const CudaDevice& device);
// Operations per second of the tensor cores.
absl::StatusOr<double> MeasureTensorPeak(const CudaDevice& device, PeakInput input);

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_DEVICE_PEAKS_H_
