#include "model/random_blocks.h"

#include <cstring>

#include "model/half.h"

namespace stagecoach {
namespace {

// Writes one block whose bytes are already random: sets the scales so that the weights get the
// standard deviation `deviation`. The block layouts are those of block_decode.h.
using ScaleSetter = void (*)(std::byte* block, float deviation, FastRandom& random);

template <typename T>
void Put(std::byte* at, T value) {
  std::memcpy(at, &value, sizeof(value));
}

void PutHalf(std::byte* at, float value) { Put(at, FloatToHalf(value)); }

// The scale of one block: near `typical`, of either sign, which makes the mean of codes that are
// not centred on 0 (such as -8..7) vanish over many blocks.
float RandomScale(float typical, FastRandom& random) {
  const float scale = typical * random.Uniform(0.8f, 1.2f);
  return random.Next() >> 63 ? scale : -scale;
}

// Standard deviations of uniform codes: sqrt((n^2 - 1) / 12) for n of them, and the root mean
// square of the 6-bit and 4-bit sub-block scales chosen below.
constexpr float kDeviation4 = 1.118f;
constexpr float kDeviation16 = 4.610f;
constexpr float kDeviation32 = 9.233f;
constexpr float kDeviation64 = 18.47f;
constexpr float kDeviation256 = 73.9f;
constexpr float kScale4Bit = 11.73f;  // of 8..15
constexpr float kScale6Bit = 48.4f;   // of 32..63
constexpr float kScaleQ3 = 43.33f;    // of (-32..31) * (-4..3)
constexpr float kScaleInt8 = 97.3f;   // of +-(64..127), about

void SetF32(std::byte* block, float deviation, FastRandom& random) {
  constexpr float kHalfWidth = 1.7320508f;  // uniform in +-sqrt(3) has deviation 1
  Put(block, deviation * random.Uniform(-kHalfWidth, kHalfWidth));
}

void SetF16(std::byte* block, float deviation, FastRandom& random) {
  float value = 0;
  SetF32(reinterpret_cast<std::byte*>(&value), deviation, random);
  Put(block, FloatToHalf(value));
}

void SetBF16(std::byte* block, float deviation, FastRandom& random) {
  float value = 0;
  SetF32(reinterpret_cast<std::byte*>(&value), deviation, random);
  Put(block, FloatToBfloat16(value));
}

template <int kCodeDeviationMilli>
void SetSymmetric(std::byte* block, float deviation, FastRandom& random) {
  PutHalf(block, RandomScale(deviation * 1000.0f / kCodeDeviationMilli, random));
}

// d, m: w = d * q + m with q in 0..codes-1.
template <int kCodes>
void SetAffine(std::byte* block, float deviation, FastRandom& random) {
  const float code_deviation = kCodes == 16 ? kDeviation16 : kDeviation32;
  const float scale = RandomScale(deviation / code_deviation, random);
  PutHalf(block, scale);
  PutHalf(block + 2, -scale * (kCodes - 1) / 2);
}

// 16 bytes of (4-bit scale, 4-bit minimum), made equal, then 64 bytes of codes 0..3, d, dmin:
// w = d * s * q - dmin * s has mean 0 with dmin = 1.5 d.
void SetQ2K(std::byte* block, float deviation, FastRandom& random) {
  for (int i = 0; i < 16; ++i) {
    const uint8_t scale = 8 | (static_cast<uint8_t>(block[i]) & 7);
    Put(block + i, static_cast<uint8_t>(scale | scale << 4));
  }
  const float scale = RandomScale(deviation / (kDeviation4 * kScale4Bit), random);
  PutHalf(block + 80, scale);
  PutHalf(block + 82, 1.5f * scale);
}

// All but the last two bytes may be anything: 6-bit scales and codes are both signed.
void SetQ3K(std::byte* block, float deviation, FastRandom& random) {
  PutHalf(block + 108, RandomScale(deviation / kScaleQ3, random));
}

// d, dmin, 12 bytes of eight 6-bit scales and eight 6-bit minima, made equal: in the first four,
// the second four bytes' low 6 bits; of the others the low nibbles in the third four bytes and
// the top 2 bits in the top bits of the first eight.
template <int kCodes>
void SetQ4KOrQ5K(std::byte* block, float deviation, FastRandom& random) {
  uint8_t packed[12];
  for (int i = 0; i < 4; ++i) {
    const uint8_t low = 32 | (static_cast<uint8_t>(block[4 + i]) & 31);
    const uint8_t high = 32 | (static_cast<uint8_t>(block[8 + i]) & 31);
    packed[i] = packed[4 + i] = low | (high >> 4) << 6;
    packed[8 + i] = (high & 15) | (high & 15) << 4;
  }
  std::memcpy(block + 4, packed, sizeof(packed));
  const float code_deviation = kCodes == 16 ? kDeviation16 : kDeviation32;
  const float scale = RandomScale(deviation / (code_deviation * kScale6Bit), random);
  PutHalf(block, scale);
  PutHalf(block + 2, scale * (kCodes - 1) / 2);
}

// 192 bytes of codes, 16 signed scales, d.
void SetQ6K(std::byte* block, float deviation, FastRandom& random) {
  for (int i = 192; i < 208; ++i) {
    const int magnitude = 64 | (static_cast<uint8_t>(block[i]) & 63);
    const bool negative = (static_cast<uint8_t>(block[i]) & 128) != 0;
    Put(block + i, static_cast<int8_t>(negative ? -magnitude : magnitude));
  }
  PutHalf(block + 208, RandomScale(deviation / (kDeviation64 * kScaleInt8), random));
}

ScaleSetter SetterOf(TensorType type) {
  switch (type) {
    case TensorType::kF32:
      return SetF32;
    case TensorType::kF16:
      return SetF16;
    case TensorType::kBF16:
      return SetBF16;
    case TensorType::kQ4_0:
      return SetSymmetric<static_cast<int>(kDeviation16 * 1000)>;
    case TensorType::kQ5_0:
      return SetSymmetric<static_cast<int>(kDeviation32 * 1000)>;
    case TensorType::kQ8_0:
      return SetSymmetric<static_cast<int>(kDeviation256 * 1000)>;
    case TensorType::kQ4_1:
      return SetAffine<16>;
    case TensorType::kQ5_1:
      return SetAffine<32>;
    case TensorType::kQ2_K:
      return SetQ2K;
    case TensorType::kQ3_K:
      return SetQ3K;
    case TensorType::kQ4_K:
      return SetQ4KOrQ5K<16>;
    case TensorType::kQ5_K:
      return SetQ4KOrQ5K<32>;
    case TensorType::kQ6_K:
      return SetQ6K;
  }
  __builtin_unreachable();
}

uint64_t SplitMix64(uint64_t* state) {
  uint64_t z = (*state += 0x9e3779b97f4a7c15);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

}  // namespace

FastRandom::FastRandom(uint64_t seed) : state_{SplitMix64(&seed), SplitMix64(&seed)} {}

uint64_t FastRandom::Next() {
  uint64_t x = state_[0];
  const uint64_t y = state_[1];
  const uint64_t sum = x + y;
  state_[0] = y;
  x ^= x << 23;
  state_[1] = x ^ y ^ (x >> 18) ^ (y >> 5);
  return sum;
}

float FastRandom::Uniform(float low, float high) {
  const float unit = static_cast<float>(Next() >> 40) * 0x1p-24f;
  return low + (high - low) * unit;
}

std::vector<std::byte> MakeRandomBlocks(TensorType type, size_t blocks, float deviation,
                                        FastRandom& random) {
  const TensorTypeInfo& info = GetTensorTypeInfo(type);
  std::vector<std::byte> bytes(blocks * info.block_bytes);
  size_t at = 0;
  for (; at + sizeof(uint64_t) <= bytes.size(); at += sizeof(uint64_t)) {
    Put(bytes.data() + at, random.Next());
  }
  for (; at < bytes.size(); ++at) bytes[at] = static_cast<std::byte>(random.Next() >> 56);
  const ScaleSetter set_scale = SetterOf(type);
  for (size_t i = 0; i < blocks; ++i) {
    set_scale(bytes.data() + i * info.block_bytes, deviation, random);
  }
  return bytes;
}

}  // namespace stagecoach
