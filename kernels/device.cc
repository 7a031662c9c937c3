#include "kernels/device.h"

#include <algorithm>
#include <charconv>
#include <optional>
#include <thread>

#include "fmt/format.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/multiply_peak.h"
#include "kernels/cpu/read_bandwidth.h"
#ifdef STAGECOACH_HAVE_CUDA
#include "kernels/cuda/cuda_backend.h"
#endif

namespace stagecoach {
namespace {

// A pass takes some milliseconds, about as long as the system leaves a core to another process:
// where several workers start at once, the best of a few passes may be far below the machine's
// rate.
constexpr uint64_t kBandwidthBytes = 64 << 20;
constexpr int kBandwidthPasses = 16;

// N of "cuda:N".
std::optional<int> CudaIndex(const std::string& name) {
  if (name == "cuda") return 0;
  if (!name.starts_with("cuda:")) return std::nullopt;
  const char* const first = name.data() + 5;
  const char* const last = name.data() + name.size();
  int index = 0;
  const auto [end, error] = std::from_chars(first, last, index);
  if (error != std::errc() || end != last || index < 0) return std::nullopt;
  return index;
}

int AllCoresIfZero(int threads) {
  return threads > 0 ? threads
                     : static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

absl::StatusOr<std::unique_ptr<Backend>> OpenCuda([[maybe_unused]] int index,
                                                  [[maybe_unused]] const DeviceOptions& options) {
#ifdef STAGECOACH_HAVE_CUDA
  return MakeCudaBackend({.device = index, .on_device_fault = options.on_device_fault});
#else
  return absl::UnavailableError("this program was built without CUDA (-DSTAGECOACH_CUDA=ON)");
#endif
}

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> OpenDevice(const std::string& name,
                                                    const DeviceOptions& options) {
  if (name == "auto") {
    absl::StatusOr<std::unique_ptr<Backend>> gpu = OpenCuda(0, options);
    if (gpu.ok()) return gpu;
  } else if (name != "cpu") {
    const std::optional<int> index = CudaIndex(name);
    if (index) return OpenCuda(*index, options);
    return absl::InvalidArgumentError(
        fmt::format("there is no device '{}'; use cpu, cuda:N or auto", name));
  }
  return MakeCpuBackend({.threads = options.threads, .isa = options.isa});
}

absl::StatusOr<double> MeasureDeviceBandwidth([[maybe_unused]] Backend& backend, int threads) {
#ifdef STAGECOACH_HAVE_CUDA
  if (backend.info().kind == "cuda") return MeasureCudaReadBandwidth(backend);
#endif
  return MeasureReadBandwidth(AllCoresIfZero(threads), kBandwidthBytes, kBandwidthPasses);
}

absl::StatusOr<DevicePeaks> MeasureDevicePeaks([[maybe_unused]] Backend& backend, int threads) {
#ifdef STAGECOACH_HAVE_CUDA
  if (backend.info().kind == "cuda") {
    const absl::StatusOr<CudaTensorPeaks> peaks = MeasureCudaTensorPeaks(backend);
    if (!peaks.ok()) return peaks.status();
    return DevicePeaks{.int8 = peaks->int8, .floats = peaks->half};
  }
#endif
  const MultiplyPeaks peaks = MeasureMultiplyPeaks(AllCoresIfZero(threads));
  return DevicePeaks{.int8 = peaks.int8, .floats = peaks.float32};
}

absl::StatusOr<double> MeasureDeviceCopyRate([[maybe_unused]] Backend& backend) {
#ifdef STAGECOACH_HAVE_CUDA
  if (backend.info().kind == "cuda") return MeasureCudaCopyRate(backend);
#endif
  return 0;
}

}  // namespace stagecoach
