// Rotary position embedding from precomputed tables.
#ifndef STAGECOACH_KERNELS_CPU_ROPE_H_
#define STAGECOACH_KERNELS_CPU_ROPE_H_

#include <vector>

#include "kernels/cpu/cpu_kernels.h"
#include "model/model_file.h"

namespace stagecoach::cpu {

// Cosines and sines per position, computed in double and rounded to float. Pair i of position p
// turns by p * freq_scale * base^(-2i / rope_dims) / freq_factors[i]. Not thread-safe while
// growing.
class RopeTable {
 public:
  explicit RopeTable(const ModelParams& params);

  // Makes positions [0, count) available.
  void Grow(int count);
  // Rotates `heads` heads of `head_dim` values at x in place. Requires position < a grown count.
  void Rotate(const CpuKernels& kernels, float* x, int heads, int head_dim, int position) const;

 private:
  std::vector<double> frequencies_;  // [rope_dims / 2]
  std::vector<float> table_;         // [position][rope_dims / 2][cos, sin]
  int positions_ = 0;
};

}  // namespace stagecoach::cpu

#endif  // STAGECOACH_KERNELS_CPU_ROPE_H_
