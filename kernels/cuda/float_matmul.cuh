// Products with F32 weights and activations: correct, not fast.
#ifndef STAGECOACH_KERNELS_CUDA_FLOAT_MATMUL_CUH_
#define STAGECOACH_KERNELS_CUDA_FLOAT_MATMUL_CUH_

#include "kernels/cuda/quant_matmul.h"

namespace stagecoach::cuda {

// One term with the contract of LaunchMatmul; x.form is kFloat.
cudaError_t LaunchFloatMatmul(const MatmulTerm& term, const Activations& x, cudaStream_t stream);

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_FLOAT_MATMUL_CUH_
