#include "kernels/cpu/cpu_kernels.h"

namespace stagecoach::cpu {

const CpuKernels& KernelsFor(std::string_view isa) {
  if (isa == "portable") return PortableKernels();
  const CpuKernels* best = isa == "avx2" ? nullptr : Avx512Kernels();
  if (best == nullptr) best = Avx2Kernels();
  return best != nullptr ? *best : PortableKernels();
}

}  // namespace stagecoach::cpu
