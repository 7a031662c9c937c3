#include "kernels/cpu/attention_kernel.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cpu/matmul_kernel.h"
#include "kernels/cpu/simd_portable.h"
#include "kernels/cpu/vector_kernels.h"

namespace stagecoach::cpu {

const CpuKernels& PortableKernels() {
  using S = PortableSimd;
  static constexpr CpuKernels kKernels = {"portable",      Matmul<S>,    Quantize<S>,
                                          QuantizeRest<S>, RmsNorm<S>,   SwiGluRow<S>,
                                          Rotate<S>,       Attention<S>, ToHalf<S>};
  return kKernels;
}

}  // namespace stagecoach::cpu
