// Compiled for AVX2 and F16C (kernels/CMakeLists.txt). Only templates over Avx2Simd may be emitted
// here: an inline function shared with other files could be linked into them and run on a machine
// without these instructions.
#include "kernels/cpu/cpu_kernels.h"

#if defined(__AVX2__) && defined(__F16C__)

#include <cpuid.h>

#include "kernels/cpu/attention_kernel.h"
#include "kernels/cpu/matmul_kernel.h"
#include "kernels/cpu/simd_avx2.h"
#include "kernels/cpu/vector_kernels.h"

namespace stagecoach::cpu {

const CpuKernels* Avx2Kernels() {
  using S = Avx2Simd;
  static constexpr CpuKernels kKernels = {"AVX2",          Matmul<S>,    Quantize<S>,
                                          QuantizeRest<S>, RmsNorm<S>,   SwiGluRow<S>,
                                          Rotate<S>,       Attention<S>, ToHalf<S>};
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kF16c = 1u << 29;  // of leaf 1's ecx; not a name that clang 14 knows
  if (!__builtin_cpu_supports("avx2") || !__get_cpuid(1, &eax, &ebx, &ecx, &edx) ||
      (ecx & kF16c) == 0) {
    return nullptr;
  }
  return &kKernels;
}

}  // namespace stagecoach::cpu

#else

namespace stagecoach::cpu {

const CpuKernels* Avx2Kernels() { return nullptr; }

}  // namespace stagecoach::cpu

#endif
