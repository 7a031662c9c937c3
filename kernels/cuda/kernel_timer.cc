#include "kernels/cuda/kernel_timer.h"

#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/read_all.h"
#include "model/status_macros.h"

namespace stagecoach::cuda {
namespace {

constexpr size_t kFlushFloats = size_t{64} << 20;  // 256 MiB: several times any second-level cache

absl::StatusOr<Event> NewMark() {
  cudaEvent_t event = nullptr;
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaEventCreate(&event));
  return Event(event);
}

}  // namespace

absl::StatusOr<double> TimeLaunch(const CudaDevice& device, const Launch& launch) {
  STAGECOACH_ASSIGN_OR_RETURN(const Event begin, NewMark());
  STAGECOACH_ASSIGN_OR_RETURN(const Event end, NewMark());
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaEventRecord(begin.get(), device.compute()));
  STAGECOACH_RETURN_IF_CUDA_ERROR(launch());
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaEventRecord(end.get(), device.compute()));
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaEventSynchronize(end.get()));
  float ms = 0;
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaEventElapsedTime(&ms, begin.get(), end.get()));
  return 1e-3 * ms;
}

absl::Status TimeColdLaunches(const CudaDevice& device, const Launch& launch, OpTimer& timer) {
  STAGECOACH_ASSIGN_OR_RETURN(const DeviceBuffer<float> flush,
                              device.NewBuffer<float>(kFlushFloats));
  STAGECOACH_RETURN_IF_CUDA_ERROR(
      cudaMemsetAsync(flush.data(), 0, flush.bytes(), device.compute()));
  STAGECOACH_RETURN_IF_ERROR(TimeLaunch(device, launch).status());  // loads the kernels
  while (!timer.Enough()) {
    // It runs while the host launches what follows, so that the device never waits in between.
    STAGECOACH_RETURN_IF_CUDA_ERROR(ReadAll(flush.data(), kFlushFloats, device.multiprocessors(),
                                            /*never=*/1, flush.data(), device.compute()));
    STAGECOACH_ASSIGN_OR_RETURN(const double seconds, TimeLaunch(device, launch));
    timer.Add(seconds);
  }
  return absl::OkStatus();
}

}  // namespace stagecoach::cuda
