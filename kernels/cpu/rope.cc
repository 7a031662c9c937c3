#include "kernels/cpu/rope.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

namespace stagecoach::cpu {

RopeTable::RopeTable(const ModelParams& params) {
  for (int i = 0; i < params.rope_dims / 2; ++i) {
    const double power = -2.0 * i / params.rope_dims;
    const double factor = params.rope_freq_factors.empty() ? 1.0 : params.rope_freq_factors[i];
    frequencies_.push_back(params.rope_freq_scale * std::pow(params.rope_freq_base, power) /
                           factor);
  }
}

void RopeTable::Grow(int count) {
  if (count <= positions_) return;
  const int wanted = std::max(count, std::min(2 * positions_, count + 65536));
  table_.reserve(static_cast<size_t>(wanted) * frequencies_.size() * 2);
  for (; positions_ < wanted; ++positions_) {
    for (const double frequency : frequencies_) {
      table_.push_back(static_cast<float>(std::cos(positions_ * frequency)));
      table_.push_back(static_cast<float>(std::sin(positions_ * frequency)));
    }
  }
}

void RopeTable::Rotate(const CpuKernels& kernels, float* x, int heads, int head_dim,
                       int position) const {
  const size_t columns = 2 * frequencies_.size();
  kernels.rotate(table_.data() + position * columns, static_cast<int>(columns), heads, head_dim, x);
}

}  // namespace stagecoach::cpu
