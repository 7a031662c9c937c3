// Unsigned arithmetic on sizes that come from outside: nullopt instead of wrapping round.
#ifndef STAGECOACH_MODEL_CHECKED_MATH_H_
#define STAGECOACH_MODEL_CHECKED_MATH_H_

#include <cstdint>
#include <optional>

namespace stagecoach {

constexpr std::optional<uint64_t> CheckedAdd(uint64_t a, uint64_t b) {
  uint64_t sum = 0;
  if (__builtin_add_overflow(a, b, &sum)) return std::nullopt;
  return sum;
}

constexpr std::optional<uint64_t> CheckedMul(uint64_t a, uint64_t b) {
  uint64_t product = 0;
  if (__builtin_mul_overflow(a, b, &product)) return std::nullopt;
  return product;
}

// The first multiple of `alignment` (a power of two) at or after `value`.
constexpr std::optional<uint64_t> CheckedAlignUp(uint64_t value, uint64_t alignment) {
  const std::optional<uint64_t> padded = CheckedAdd(value, alignment - 1);
  if (!padded) return std::nullopt;
  return *padded & ~(alignment - 1);
}

}  // namespace stagecoach

#endif  // STAGECOACH_MODEL_CHECKED_MATH_H_
