#include "kernels/cuda/device_peaks.h"

#include <algorithm>

#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/kernel_timer.h"
#include "kernels/cuda/read_all.h"
#include "model/status_macros.h"

namespace stagecoach::cuda {
namespace {

constexpr int kPasses = 6;

template <typename Launch>
absl::StatusOr<double> BestSeconds(const CudaDevice& device, const Launch& launch) {
  double best = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    STAGECOACH_ASSIGN_OR_RETURN(const double seconds, TimeLaunch(device, launch));
    best = pass == 0 ? seconds : std::min(best, seconds);
  }
  return best;
}

}  // namespace

absl::StatusOr<double> MeasureReadBandwidth(const CudaDevice& device) {
  STAGECOACH_RETURN_IF_ERROR(device.MakeCurrent());
  constexpr size_t kFloats = size_t{256} << 20;  // 1 GiB, many times the cache
  STAGECOACH_ASSIGN_OR_RETURN(const DeviceBuffer<float> data, device.NewBuffer<float>(kFloats));
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaMemsetAsync(data.data(), 0, data.bytes(), device.compute()));
  STAGECOACH_ASSIGN_OR_RETURN(const double best, BestSeconds(device, [&] {
                                return ReadAll(data.data(), kFloats, device.multiprocessors(),
                                               /*never=*/1, data.data(), device.compute());
                              }));
  return static_cast<double>(data.bytes()) / best;
}

absl::StatusOr<double> MeasureTensorPeak(const CudaDevice& device, PeakInput input) {
  STAGECOACH_RETURN_IF_ERROR(device.MakeCurrent());
  const int multiprocessors = device.multiprocessors();
  STAGECOACH_ASSIGN_OR_RETURN(const DeviceBuffer<float> out, device.NewBuffer<float>(1));
  STAGECOACH_ASSIGN_OR_RETURN(const double best, BestSeconds(device, [&] {
                                return RunTensorCores(input, multiprocessors, /*never=*/0.5f,
                                                      out.data(), device.compute());
                              }));
  return static_cast<double>(TensorOps(input, multiprocessors)) / best;
}

}  // namespace stagecoach::cuda
