// Whether the products on this device are right: against float64, with the very halves that the
// device should multiply and with the weights themselves, and bit for bit between the kernels for
// few and for many rows, between terms together and alone, and between what is fused and what is
// not. Each check prints a line; device errors end the process.
#ifndef STAGECOACH_KERNELS_CUDA_QUANT_MATMUL_CHECK_H_
#define STAGECOACH_KERNELS_CUDA_QUANT_MATMUL_CHECK_H_

namespace stagecoach::cuda {

// All types over shapes that reach every kernel. False if anything is wrong.
bool RunAllMatmulChecks();

// Those of them that compare products with each other: types together, norms and SwiGLU fused.
bool RunFusionChecks();

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_QUANT_MATMUL_CHECK_H_
