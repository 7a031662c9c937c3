// The arithmetic of a draw, on the host and on a GPU: integers, so that sums have the same bits in
// any order.
#ifndef STAGECOACH_KERNELS_SAMPLING_UNITS_H_
#define STAGECOACH_KERNELS_SAMPLING_UNITS_H_

#include <cstdint>

#include "kernels/portable_math.h"

namespace stagecoach {

// What a token weighs: the best one 2^40, one of less than 2^-40 of its probability nothing. The
// sum over 2^23 tokens does not overflow. powers: see PortableExpFrom.
STAGECOACH_HOST_DEVICE inline uint64_t SamplingUnits(const double* powers, float logit, float best,
                                                     double temperature) {
  const double x = (static_cast<double>(logit) - static_cast<double>(best)) / temperature;
  return static_cast<uint64_t>(PortableExpFrom(powers, x) * 0x1p40);
}

// uniform in [0, 1): the token chosen is the first whose units, with those of all before it, exceed
// the target. total > 0.
STAGECOACH_HOST_DEVICE inline uint64_t DrawTarget(uint64_t total, double uniform) {
  const auto target = static_cast<uint64_t>(uniform * static_cast<double>(total));
  return target < total ? target : total - 1;
}

}  // namespace stagecoach

#endif  // STAGECOACH_KERNELS_SAMPLING_UNITS_H_
