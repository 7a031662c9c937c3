#include "kernels/cuda/typed_matmul.cuh"

namespace stagecoach::cuda {

template cudaError_t LaunchTypedMatmul<TensorType::kF16>(const MatmulParameters&,
                                                         const DeviceLimits&, cudaStream_t);
template cudaError_t LaunchTypedMatmul<TensorType::kBF16>(const MatmulParameters&,
                                                          const DeviceLimits&, cudaStream_t);

}  // namespace stagecoach::cuda
