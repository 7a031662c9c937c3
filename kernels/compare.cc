#include "kernels/compare.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "fmt/format.h"

namespace stagecoach {

Comparison Compare(std::span<const float> actual, std::span<const float> expected, double typical) {
  Comparison result;
  result.count = std::max(actual.size(), expected.size());
  if (actual.size() != expected.size()) {
    result.non_finite = result.count;
    result.relative_rms = std::numeric_limits<double>::infinity();
    return result;
  }
  double error_squares = 0;
  double expected_squares = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    if (!std::isfinite(actual[i]) || !std::isfinite(expected[i])) {
      ++result.non_finite;
      continue;
    }
    const double error = std::abs(double{actual[i]} - double{expected[i]});
    error_squares += error * error;
    expected_squares += double{expected[i]} * double{expected[i]};
    if (error > result.max_abs) {
      result.max_abs = error;
      result.max_abs_index = i;
    }
  }
  expected_squares = std::max(
      expected_squares, typical * typical * static_cast<double>(result.count - result.non_finite));
  // 0 / 0 is agreement on zero.
  if (error_squares > 0) result.relative_rms = std::sqrt(error_squares / expected_squares);
  return result;
}

bool SameBits(std::span<const float> a, std::span<const float> b) {
  return a.size() == b.size() && (a.empty() || memcmp(a.data(), b.data(), a.size_bytes()) == 0);
}

std::string ToString(const Comparison& comparison) {
  return fmt::format("relative RMS {:.2e}, largest error {:.3g} at {} of {}, {} not finite",
                     comparison.relative_rms, comparison.max_abs, comparison.max_abs_index,
                     comparison.count, comparison.non_finite);
}

}  // namespace stagecoach
