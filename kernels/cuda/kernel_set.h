// Which of the program's kernels a GPU runs.
#ifndef STAGECOACH_KERNELS_CUDA_KERNEL_SET_H_
#define STAGECOACH_KERNELS_CUDA_KERNEL_SET_H_

#include <cuda_runtime.h>

#include <cstddef>

namespace stagecoach::cuda {

// Code for an architecture has one of two sets; most kernels are in both.
enum class KernelSet {
  // Compute capability 9.x to 11.x: weights come by bulk copies (stream_kernel.cuh,
  // tile_kernel.cuh), kernels overlap, blocks form clusters.
  kBulk,
  // 8.x, and 12.x and newer, whose blocks may have less shared memory: plain_kernel.cuh,
  // plain_tile_kernel.cuh, kernels in turn.
  kPlain,
};
// Of code for an architecture: 86 is 8.6.
constexpr KernelSet KernelSetFor(int architecture) {
  return architecture >= 90 && architecture < 120 ? KernelSet::kBulk : KernelSet::kPlain;
}

// Dynamic shared memory that a block needs at most.
inline constexpr size_t kMostSharedBytes = 227 * 1024;
inline constexpr size_t kMostPlainSharedBytes = 99 * 1024;
constexpr size_t SharedBytesFor(KernelSet kernels) {
  return kernels == KernelSet::kBulk ? kMostSharedBytes : kMostPlainSharedBytes;
}

// What plans and launches depend on.
struct GpuTraits {
  int multiprocessors = 0;
  KernelSet kernels = KernelSet::kBulk;
};

// The set that this program holds for the current device, in machine code or as PTX. Errors: those
// of CUDA, if it holds none.
cudaError_t ProbeKernels(KernelSet* kernels);

// The same of a device that has been probed before; looked up once. Any thread.
KernelSet CurrentKernelSet();

#ifdef __CUDA_ARCH__
inline constexpr bool kBulkCode = KernelSetFor(__CUDA_ARCH__ / 10) == KernelSet::kBulk;
#else
inline constexpr bool kBulkCode = true;  // the host's part of both
#endif

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_KERNEL_SET_H_
