// exp and log with the same bits on every machine: IEEE additions, multiplications and divisions in
// a fixed order. The C library's may differ in the last bit between versions and processors, and a
// sampled token must not depend on which worker drew it. Relative error below 1e-15.
#ifndef STAGECOACH_KERNELS_PORTABLE_MATH_H_
#define STAGECOACH_KERNELS_PORTABLE_MATH_H_

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "model/half.h"

namespace stagecoach {
namespace portable_math_internal {

inline constexpr int kTableBits = 6;
inline constexpr int kTableSize = 1 << kTableBits;
inline constexpr double kLn2 = 0x1.62e42fefa39efp-1;

// 2^(i / kTableSize), by the Taylor series of exp.
constexpr std::array<double, kTableSize> MakePowerTable() {
  std::array<double, kTableSize> table = {};
  for (int i = 0; i < kTableSize; ++i) {
    const double x = kLn2 * i / kTableSize;
    double sum = 1;
    for (int k = 20; k >= 1; --k) sum = 1 + sum * x / k;
    table[i] = sum;
  }
  return table;
}
inline constexpr std::array<double, kTableSize> kPowerTable = MakePowerTable();

}  // namespace portable_math_internal

// PortableExp with its table of powers, kTableSize of them, where the caller has it.
STAGECOACH_HOST_DEVICE inline double PortableExpFrom(const double* powers, double x) {
  using namespace portable_math_internal;
  if (!(x >= -708)) return x < -708 ? 0 : x;
  if (x > 709) return std::numeric_limits<double>::infinity();
  // x = n ln2 / 64 + r with |r| <= ln2 / 128, so exp(x) = 2^(n / 64) exp(r). ln2 / 64 comes in two
  // parts, so that n times the first is exact; adding and subtracting kRound rounds to an integer.
  constexpr double kRound = 0x1.8p52;
  constexpr double kStepHigh = 0x1.62e42feep-1 / kTableSize;
  constexpr double kStepLow = 0x1.a39ef35793c76p-33 / kTableSize;
  const double n = (x * (kTableSize / kLn2) + kRound) - kRound;
  const double r = (x - n * kStepHigh) - n * kStepLow;
  const double r2 = r * r;
  const double tail = (1.0 / 2 + r * (1.0 / 6)) + r2 * ((1.0 / 24 + r * (1.0 / 120)) + r2 / 720);
  const auto steps = static_cast<int64_t>(n);
  const double power =
      std::bit_cast<double>(static_cast<uint64_t>((steps >> kTableBits) + 1023) << 52);
  const double root = powers[steps & (kTableSize - 1)];
  return (root + root * (r + r2 * tail)) * power;
}

// For x < -708, about the smallest normal result: 0. For x > 709: infinity. NaN stays NaN.
inline double PortableExp(double x) {
  return PortableExpFrom(portable_math_internal::kPowerTable.data(), x);
}

// For finite x > 0.
inline double PortableLog(double x) {
  int exponent;
  double mantissa = std::frexp(x, &exponent);  // [0.5, 1)
  if (mantissa < 0x1.6a09e667f3bcdp-1) {       // sqrt(1/2): centre the interval on 1
    mantissa *= 2;
    --exponent;
  }
  // log m = 2 atanh(s) = 2 (s + s^3 / 3 + s^5 / 5 + ...), |s| <= 0.172.
  const double s = (mantissa - 1) / (mantissa + 1);
  const double s2 = s * s;
  double sum = 0;
  for (int i = 23; i >= 1; i -= 2) sum = sum * s2 + 1.0 / i;
  return 2 * s * sum + exponent * portable_math_internal::kLn2;
}

}  // namespace stagecoach

#endif  // STAGECOACH_KERNELS_PORTABLE_MATH_H_
