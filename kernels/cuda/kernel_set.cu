#include "kernels/cuda/kernel_set.h"

#include <array>
#include <atomic>

namespace stagecoach::cuda {
namespace {

// Says by its attributes what the others are compiled for, too.
__global__ void ProbedKernel() {}

constexpr int kMostDevices = 64;

}  // namespace

cudaError_t ProbeKernels(KernelSet* kernels) {
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, ProbedKernel);
  if (status != cudaSuccess) return status;
  // ptxVersion: of the source, where the driver made the machine code of it.
  *kernels = KernelSetFor(attributes.ptxVersion);
  return cudaSuccess;
}

KernelSet CurrentKernelSet() {
  static std::array<std::atomic<int>, kMostDevices> known{};  // 0: not yet, else the set + 1
  int device = 0;
  KernelSet kernels = KernelSet::kBulk;
  if (cudaGetDevice(&device) != cudaSuccess) return kernels;  // the launch will say so
  std::atomic<int>* const place = device < kMostDevices ? &known[device] : nullptr;
  const int found = place == nullptr ? 0 : place->load(std::memory_order_relaxed);
  if (found > 0) return static_cast<KernelSet>(found - 1);
  if (ProbeKernels(&kernels) == cudaSuccess && place != nullptr) {
    place->store(static_cast<int>(kernels) + 1, std::memory_order_relaxed);
  }
  return kernels;
}

}  // namespace stagecoach::cuda
