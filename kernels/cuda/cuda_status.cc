#include "kernels/cuda/cuda_status.h"

#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "fmt/format.h"

namespace stagecoach::cuda {
namespace {

struct FaultHandler {
  absl::Mutex mu;
  std::function<void(const absl::Status&)> call ABSL_GUARDED_BY(mu);
};

FaultHandler& Handler() {
  static auto& handler = *new FaultHandler;
  return handler;
}

// Errors that every later call will report, too.
bool RuinsContext(cudaError_t error) {
  switch (error) {
    case cudaErrorIllegalAddress:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorHardwareStackError:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
    case cudaErrorContained:
      return true;
    default:
      return false;
  }
}

}  // namespace

absl::Status CudaStatus(cudaError_t error, const char* call, const char* file, int line) {
  if (error == cudaSuccess) return absl::OkStatus();
  const std::string message = fmt::format("{}: {} ({}) at {}:{}", cudaGetErrorName(error),
                                          cudaGetErrorString(error), call, file, line);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // forget it: the next launch must not report it again
    return absl::ResourceExhaustedError(message);
  }
  const absl::Status status = absl::InternalError(message);
  if (RuinsContext(error)) {
    std::function<void(const absl::Status&)> handler;
    {
      absl::MutexLock lock(&Handler().mu);
      handler = Handler().call;
    }
    if (handler) handler(status);
  }
  return status;
}

void SetDeviceFaultHandler(std::function<void(const absl::Status&)> handler) {
  absl::MutexLock lock(&Handler().mu);
  Handler().call = std::move(handler);
}

}  // namespace stagecoach::cuda
