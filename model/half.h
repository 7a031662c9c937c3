// Conversions between float and the 16-bit float formats by integer code alone, so that host and
// device agree bit for bit. Rounding is to nearest, ties to even.
#ifndef STAGECOACH_MODEL_HALF_H_
#define STAGECOACH_MODEL_HALF_H_

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define STAGECOACH_HOST_DEVICE __host__ __device__
#else
#define STAGECOACH_HOST_DEVICE
#endif

namespace stagecoach {

STAGECOACH_HOST_DEVICE inline float FloatFromBits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

STAGECOACH_HOST_DEVICE inline uint32_t FloatToBits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// IEEE binary16; exact.
STAGECOACH_HOST_DEVICE inline float HalfToFloat(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = (half >> 10) & 0x1f;
  const uint32_t mantissa = half & 0x3ff;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24, which is a normal float
    return FloatFromBits(sign | FloatToBits(static_cast<float>(mantissa) * 0x1p-24f));
  }
  const uint32_t float_exponent = exponent == 0x1f ? 0xff : exponent + (127 - 15);
  return FloatFromBits(sign | (float_exponent << 23) | (mantissa << 13));
}

// Overflow gives infinity; a NaN stays a (quiet) NaN.
STAGECOACH_HOST_DEVICE inline uint16_t FloatToHalf(float value) {
  const uint32_t bits = FloatToBits(value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds over 65504
  uint32_t result;                                                           // truncated half
  uint32_t remainder;  // what truncation cut off, against `half_unit`
  uint32_t half_unit;
  if (magnitude >= 0x38800000) {  // at least 2^-14: a normal half
    result = (magnitude - ((127u - 15u) << 23)) >> 13;
    remainder = magnitude & 0x1fff;
    half_unit = 0x1000;
  } else {
    const uint32_t shift = 126 - (magnitude >> 23);  // subnormal unit is 2^-24
    if (shift > 24) return static_cast<uint16_t>(sign);
    const uint32_t mantissa = (magnitude & 0x7fffff) | 0x800000;
    result = mantissa >> shift;
    remainder = mantissa & ((1u << shift) - 1);
    half_unit = 1u << (shift - 1);
  }
  if (remainder > half_unit || (remainder == half_unit && (result & 1))) ++result;
  return static_cast<uint16_t>(sign | result);
}

// bfloat16: the upper half of a float; exact.
STAGECOACH_HOST_DEVICE inline float Bfloat16ToFloat(uint16_t bfloat) {
  return FloatFromBits(static_cast<uint32_t>(bfloat) << 16);
}

STAGECOACH_HOST_DEVICE inline uint16_t FloatToBfloat16(float value) {
  const uint32_t bits = FloatToBits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Whether a binary16 is neither infinite nor NaN.
STAGECOACH_HOST_DEVICE inline bool HalfIsFinite(uint16_t half) { return (half & 0x7c00) != 0x7c00; }

}  // namespace stagecoach

#endif  // STAGECOACH_MODEL_HALF_H_
