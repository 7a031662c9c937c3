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
  // The same of the launch of this kernel that needs most; 0: none needs more than any kernel may
  // have (48 KiB).
  size_t most_shared_bytes = 0;
  int cluster = 1;      // blocks along x per cluster; grid.x is a multiple
  bool overlap = true;  // with the kernel before it (quant_matmul.h), of the bulk set
};

template <typename... Parameters, typename... Arguments>
cudaError_t LaunchKernel(void (*kernel)(Parameters...), const LaunchShape& shape,
                         cudaStream_t stream, Arguments... arguments) {
  if (shape.most_shared_bytes > 0) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shape.most_shared_bytes));
    if (status != cudaSuccess) return status;
  }
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

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_LAUNCH_CUH_
