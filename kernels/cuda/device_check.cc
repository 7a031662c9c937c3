#include "kernels/cuda/device_check.h"

#include "fmt/format.h"

namespace stagecoach::cuda {
namespace {

std::string Version(int cuda) { return fmt::format("{}.{}", cuda / 1000, cuda % 1000 / 10); }

}  // namespace

absl::Status CheckDriver(const DriverState& state, int index) {
  const bool too_old = state.driver < state.runtime;
  if (state.error == cudaErrorInsufficientDriver || (state.error != cudaSuccess && too_old)) {
    if (state.driver == 0) {
      return absl::UnavailableError(
          "no NVIDIA driver is installed; install one, or use --device cpu");
    }
    return absl::UnavailableError(
        fmt::format("the NVIDIA driver knows CUDA {}, but {} is needed: update the driver",
                    Version(state.driver), Version(state.runtime)));
  }
  if (state.error == cudaErrorNoDevice || (state.error == cudaSuccess && state.gpus == 0)) {
    return absl::UnavailableError(
        "no CUDA GPU is visible; see nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu");
  }
  if (state.error != cudaSuccess) {
    return absl::UnavailableError(fmt::format("CUDA does not start: {} ({}); does nvidia-smi work?",
                                              cudaGetErrorString(state.error),
                                              cudaGetErrorName(state.error)));
  }
  if (index < 0 || index >= state.gpus) {
    return absl::OutOfRangeError(
        state.gpus == 1
            ? fmt::format("there is no cuda:{}: one GPU is visible; use cuda:0", index)
            : fmt::format("there is no cuda:{}: {} GPUs are visible; use cuda:0 to cuda:{}", index,
                          state.gpus, state.gpus - 1));
  }
  return absl::OkStatus();
}

absl::Status CheckGpu(const GpuState& gpu, int index, const std::string& architectures) {
  const std::string what =
      fmt::format("cuda:{} ({}, compute capability {}.{})", index, gpu.name, gpu.major, gpu.minor);
  if (gpu.major < kLeastMajor) {
    return absl::FailedPreconditionError(
        fmt::format("{} is too old: the kernels need compute capability {}.0; use another GPU or "
                    "--device cpu",
                    what, kLeastMajor));
  }
  // Of too little shared memory: PTX for another kind of GPU.
  if (!gpu.has_kernels || gpu.shared_bytes < SharedBytesFor(gpu.kernels)) {
    return absl::FailedPreconditionError(
        fmt::format("this program has no kernels for {}, only for {}; build it with "
                    "-DSTAGECOACH_CUDA_ARCHITECTURES={}{}{}, or use --device cpu",
                    what, architectures, gpu.major, gpu.minor, gpu.major == 9 ? "a" : ""));
  }
  return absl::OkStatus();
}

}  // namespace stagecoach::cuda
