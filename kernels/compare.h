// How far two float arrays are apart. A value that is not finite never counts as close.
#ifndef STAGECOACH_KERNELS_COMPARE_H_
#define STAGECOACH_KERNELS_COMPARE_H_

#include <cstddef>
#include <span>
#include <string>

namespace stagecoach {

struct Comparison {
  size_t count = 0;
  size_t non_finite = 0;    // elements infinite or NaN in either array; left out of the figures
  double relative_rms = 0;  // |actual - expected| / |expected|, Euclidean norms over the rest;
                            // infinite if expected is all zero and actual is not (and no floor)
  double max_abs = 0;       // largest |actual - expected|
  size_t max_abs_index = 0;

  // Written so that a NaN fails. An empty comparison proves nothing and fails too.
  bool Within(double relative_rms_tolerance) const {
    return count > 0 && non_finite == 0 && relative_rms <= relative_rms_tolerance;
  }
};

// Arrays of different length: every element counts as non-finite. typical: the magnitude of a usual
// element; |expected| counts as at least that of as many typical ones, so that the error of a few
// sums that happen to cancel is not measured against nearly nothing.
Comparison Compare(std::span<const float> actual, std::span<const float> expected,
                   double typical = 0);

// Whether both have the same length and the same bits (so a NaN equals the same NaN, 0 not -0).
bool SameBits(std::span<const float> a, std::span<const float> b);

// "relative RMS 1.2e-03, largest error 0.0123 at 77 of 4096, 0 not finite".
std::string ToString(const Comparison& comparison);

}  // namespace stagecoach

#endif  // STAGECOACH_KERNELS_COMPARE_H_
