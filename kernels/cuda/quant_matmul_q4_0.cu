#include "kernels/cuda/typed_matmul.cuh"

namespace stagecoach::cuda {

template cudaError_t LaunchTypedMatmul<TensorType::kQ4_0>(const MatmulParameters&,
                                                          const DeviceLimits&, cudaStream_t);

}  // namespace stagecoach::cuda
