// One way to launch a kernel.
#ifndef STAGECOACH_KERNELS_CUDA_LAUNCH_CUH_
#define STAGECOACH_KERNELS_CUDA_LAUNCH_CUH_

#include <cuda_runtime.h>

#include <cstddef>

#include "kernels/cuda/kernel_set.h"

namespace stagecoach::cuda {

struct LaunchShape {
  dim3 grid;
  int threads = 0;
  size_t shared_bytes = 0;  // dynamic
  int cluster = 1;          // blocks along x per cluster; grid.x is a multiple
  bool overlap = true;      // with the kernel before it (quant_matmul.h), of the bulk set
};

// The kernel must have been allowed its shared memory (AllowSharedMemory).
template <typename... Parameters, typename... Arguments>
cudaError_t LaunchKernel(void (*kernel)(Parameters...), const LaunchShape& shape,
                         cudaStream_t stream, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (shape.overlap && CurrentKernelSet() == KernelSet::kBulk) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = shape.cluster;
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

// Lets the kernel have as much dynamic shared memory as a block may have.
template <typename... Parameters>
cudaError_t AllowSharedMemory(void (*kernel)(Parameters...), size_t bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(bytes));
}

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_LAUNCH_CUH_
