// Backends by the names that users give to --device.
#ifndef STAGECOACH_KERNELS_DEVICE_H_
#define STAGECOACH_KERNELS_DEVICE_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace stagecoach {

struct DeviceOptions {
  int threads = 0;           // of the CPU; 0 = one per core
  std::string isa = "auto";  // of the CPU; see CpuOptions
  // See CudaOptions::on_device_fault.
  std::function<void(const absl::Status&)> on_device_fault = nullptr;
};

// "cpu"; "cuda:N", the Nth visible GPU ("cuda" is the first); or "auto": the first GPU if it can be
// used, else the CPU. Errors, each a line for the user: INVALID_ARGUMENT for any other name;
// UNAVAILABLE in a program built without CUDA; those of MakeCudaBackend.
absl::StatusOr<std::unique_ptr<Backend>> OpenDevice(const std::string& name,
                                                    const DeviceOptions& options);

// Bytes per second that `backend`, from OpenDevice, reads from its memory: measured now.
// `threads`: of the CPU, as in DeviceOptions.
absl::StatusOr<double> MeasureDeviceBandwidth(Backend& backend, int threads);

// Bytes per second that `backend`, from OpenDevice, copies from direct host memory to its own:
// measured now. 0 if it has no memory of its own.
absl::StatusOr<double> MeasureDeviceCopyRate(Backend& backend);

// Multiplications and additions per second that it does at most, measured now: of bytes, and of
// floats (on a GPU, of halves by its tensor cores). 0: not known for this machine.
struct DevicePeaks {
  double int8 = 0;
  double floats = 0;
};
absl::StatusOr<DevicePeaks> MeasureDevicePeaks(Backend& backend, int threads);

}  // namespace stagecoach

#endif  // STAGECOACH_KERNELS_DEVICE_H_
