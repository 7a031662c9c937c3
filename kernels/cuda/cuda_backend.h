// The CUDA backend: weights stay quantised on the GPU, all work of all workspaces goes through one
// compute stream, uploads through two others. No CUDA header is needed to use it.
#ifndef STAGECOACH_KERNELS_CUDA_CUDA_BACKEND_H_
#define STAGECOACH_KERNELS_CUDA_CUDA_BACKEND_H_

#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace stagecoach {

struct CudaOptions {
  int device = 0;  // index among the visible GPUs
  // Steps that repeat in shape run as one CUDA graph. Off: every kernel is launched by itself (the
  // same bits; easier to profile).
  bool graphs = true;
  // Called, from the thread that noticed it, when the GPU reports an error after which no call of
  // this process will succeed again. The handler is process-wide; the last one given counts.
  std::function<void(const absl::Status&)> on_device_fault = nullptr;
};

// Thread-safe but for what Backend says of Workspace and UnitBuilder. Objects that it makes must
// not outlive it. Errors, each a line for the user: UNAVAILABLE without a driver or GPU, or with a
// driver too old; OUT_OF_RANGE for the index; FAILED_PRECONDITION for a GPU that the kernels were
// not compiled for.
absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(const CudaOptions& options);

// Bytes per second that the backend's GPU reads from its memory, measured in about 10 ms.
// `backend` must come from MakeCudaBackend.
absl::StatusOr<double> MeasureCudaReadBandwidth(Backend& backend);
// Likewise, that it copies from pinned memory.
absl::StatusOr<double> MeasureCudaCopyRate(Backend& backend);

// Multiplications and additions per second that the GPU's tensor cores do by warp-wide mma
// instructions on fragments in registers, measured in some milliseconds. `backend` as above.
struct CudaTensorPeaks {
  double int8 = 0;  // with int32 sums
  double half = 0;  // with float sums
};
absl::StatusOr<CudaTensorPeaks> MeasureCudaTensorPeaks(Backend& backend);

}  // namespace stagecoach

#endif  // STAGECOACH_KERNELS_CUDA_CUDA_BACKEND_H_
