// Whether the products on this device are right: against float64, with the very halves that the
// device should multiply and with the weights themselves, and bit for bit between the kernels for
// few and for many rows.
#ifndef STAGECOACH_KERNELS_CUDA_QUANT_MATMUL_CHECK_H_
#define STAGECOACH_KERNELS_CUDA_QUANT_MATMUL_CHECK_H_

#include <span>

#include "model/tensor_type.h"

namespace stagecoach::cuda {

// Shapes and rows to check. Every count of rows is compared with the largest bit by bit, and that
// one with float64.
struct MatmulCheck {
  TensorType type = TensorType::kF32;
  int n = 0;  // of the first term; a second one of the same type has n / 3 + 1
  int k = 0;
  std::span<const int> rows;  // the largest last
};

// Prints one line; false if anything is wrong, device errors included.
bool RunMatmulCheck(const MatmulCheck& check);

// Conversion of norms and SwiGLU against float64. Prints one line per form.
bool RunActivationCheck();

// Whether fused gates give the bits of the kernels that they stand for. Prints one line.
bool RunFusionCheck(TensorType type, int k);

// All types over shapes that reach every kernel. small: shapes for a slow device.
bool RunAllMatmulChecks(bool small);

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_QUANT_MATMUL_CHECK_H_
