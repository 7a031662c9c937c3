// Compiled for AVX-512 with byte products (kernels/CMakeLists.txt). Only templates over Avx512Simd
// may be emitted here; see kernels_avx2.cc.
#include "kernels/cpu/cpu_kernels.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

#include "kernels/cpu/attention_kernel.h"
#include "kernels/cpu/matmul_kernel.h"
#include "kernels/cpu/simd_avx512.h"
#include "kernels/cpu/vector_kernels.h"

namespace stagecoach::cpu {
namespace {

void WideAttention(const AttentionTask& task) {
  static const CpuKernels* const avx2 = Avx2Kernels();
  if (task.value_length % Avx512Simd::kLanes != 0) return avx2->attention(task);
  Attention<Avx512Simd>(task);
}

}  // namespace

const CpuKernels* Avx512Kernels() {
  if (Avx2Kernels() == nullptr || !__builtin_cpu_supports("avx512f") ||
      !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512vnni")) {
    return nullptr;
  }
  using S = Avx512Simd;
  static constexpr CpuKernels kKernels = {"AVX-512",       Matmul<S>,     Quantize<S>,
                                          QuantizeRest<S>, RmsNorm<S>,    SwiGluRow<S>,
                                          Rotate<S>,       WideAttention, ToHalf<S>};
  return &kKernels;
}

}  // namespace stagecoach::cpu

#else

namespace stagecoach::cpu {

const CpuKernels* Avx512Kernels() { return nullptr; }

}  // namespace stagecoach::cpu

#endif
