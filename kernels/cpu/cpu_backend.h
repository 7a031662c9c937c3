// The CPU backend: weights repacked for vector units, activations quantised to int8 per block of 32
// columns, any number of threads. Runs on any machine; fast with AVX2, faster
// with AVX-512 and its byte products (VNNI).
#ifndef STAGECOACH_KERNELS_CPU_CPU_BACKEND_H_
#define STAGECOACH_KERNELS_CPU_CPU_BACKEND_H_

#include <memory>
#include <string>

#include "kernels/backend.h"

namespace stagecoach {

struct CpuOptions {
  int threads = 0;           // 0: one per core
  std::string isa = "auto";  // auto, portable, avx2, avx512; all give the same bits
};

// Thread-safe but for what Backend says of Workspace and UnitBuilder. Objects that it makes must
// not outlive it. An isa that this machine lacks, or an unknown one, falls back to the best it has;
// see info().description.
std::unique_ptr<Backend> MakeCpuBackend(const CpuOptions& options);

}  // namespace stagecoach

#endif  // STAGECOACH_KERNELS_CPU_CPU_BACKEND_H_
