// The block formats of GGUF tensors, written once for host and device code (facts of ggml's public
// format; all integers little-endian).
//
// Every quantised block is `kElements` consecutive elements of a row, in groups of `kGroup` that
// share an integer scale and minimum:
//
//   value(i) = delta() * scale(g) * quant(i) - delta_min() * min(g)       with g = i / kGroup
//
// quant, scale and min are small integers (quant and scale may be negative), delta and delta_min
// are halves in the file. Formats without a part answer scale = 1, min = 0 or delta_min = 0.
#ifndef STAGECOACH_MODEL_BLOCK_DECODE_H_
#define STAGECOACH_MODEL_BLOCK_DECODE_H_

#include <cstdint>

#include "model/half.h"
#include "model/tensor_type.h"

namespace stagecoach {

struct BlockF32 {
  static constexpr int kElements = 1;
  float element;
  STAGECOACH_HOST_DEVICE float value() const { return element; }
};
static_assert(sizeof(BlockF32) == 4);

struct BlockF16 {
  static constexpr int kElements = 1;
  uint16_t bits;
  STAGECOACH_HOST_DEVICE float value() const { return HalfToFloat(bits); }
};
static_assert(sizeof(BlockF16) == 2);

struct BlockBF16 {
  static constexpr int kElements = 1;
  uint16_t bits;
  STAGECOACH_HOST_DEVICE float value() const { return Bfloat16ToFloat(bits); }
};
static_assert(sizeof(BlockBF16) == 2);

// --- Blocks of 32 with one scale. Nibbles: element i < 16 is the low half of byte i, element
// i >= 16 the high half of byte i - 16.

struct BlockQ4_0 {
  static constexpr int kElements = 32, kGroup = 32;
  uint16_t d;
  uint8_t nibbles[16];

  STAGECOACH_HOST_DEVICE float delta() const { return HalfToFloat(d); }
  STAGECOACH_HOST_DEVICE float delta_min() const { return 0; }
  STAGECOACH_HOST_DEVICE int scale(int) const { return 1; }
  STAGECOACH_HOST_DEVICE int min(int) const { return 0; }
  STAGECOACH_HOST_DEVICE int quant(int i) const {
    return ((nibbles[i % 16] >> (i / 16 * 4)) & 0xf) - 8;
  }
};
static_assert(sizeof(BlockQ4_0) == 18);

struct BlockQ4_1 {
  static constexpr int kElements = 32, kGroup = 32;
  uint16_t d;
  uint16_t m;  // added, hence delta_min() is its negative
  uint8_t nibbles[16];

  STAGECOACH_HOST_DEVICE float delta() const { return HalfToFloat(d); }
  STAGECOACH_HOST_DEVICE float delta_min() const { return -HalfToFloat(m); }
  STAGECOACH_HOST_DEVICE int scale(int) const { return 1; }
  STAGECOACH_HOST_DEVICE int min(int) const { return 1; }
  STAGECOACH_HOST_DEVICE int quant(int i) const { return (nibbles[i % 16] >> (i / 16 * 4)) & 0xf; }
};
static_assert(sizeof(BlockQ4_1) == 20);

struct BlockQ5_0 {
  static constexpr int kElements = 32, kGroup = 32;
  uint16_t d;
  uint8_t high_bits[4];  // bit i: fifth bit of element i
  uint8_t nibbles[16];

  STAGECOACH_HOST_DEVICE float delta() const { return HalfToFloat(d); }
  STAGECOACH_HOST_DEVICE float delta_min() const { return 0; }
  STAGECOACH_HOST_DEVICE int scale(int) const { return 1; }
  STAGECOACH_HOST_DEVICE int min(int) const { return 0; }
  STAGECOACH_HOST_DEVICE int quant(int i) const {
    const int high = (high_bits[i / 8] >> (i % 8)) & 1;
    return (((nibbles[i % 16] >> (i / 16 * 4)) & 0xf) | (high << 4)) - 16;
  }
};
static_assert(sizeof(BlockQ5_0) == 22);

struct BlockQ5_1 {
  static constexpr int kElements = 32, kGroup = 32;
  uint16_t d;
  uint16_t m;            // added, as in BlockQ4_1
  uint8_t high_bits[4];  // as in BlockQ5_0
  uint8_t nibbles[16];

  STAGECOACH_HOST_DEVICE float delta() const { return HalfToFloat(d); }
  STAGECOACH_HOST_DEVICE float delta_min() const { return -HalfToFloat(m); }
  STAGECOACH_HOST_DEVICE int scale(int) const { return 1; }
  STAGECOACH_HOST_DEVICE int min(int) const { return 1; }
  STAGECOACH_HOST_DEVICE int quant(int i) const {
    const int high = (high_bits[i / 8] >> (i % 8)) & 1;
    return ((nibbles[i % 16] >> (i / 16 * 4)) & 0xf) | (high << 4);
  }
};
static_assert(sizeof(BlockQ5_1) == 24);

struct BlockQ8_0 {
  static constexpr int kElements = 32, kGroup = 32;
  uint16_t d;
  int8_t quants[32];

  STAGECOACH_HOST_DEVICE float delta() const { return HalfToFloat(d); }
  STAGECOACH_HOST_DEVICE float delta_min() const { return 0; }
  STAGECOACH_HOST_DEVICE int scale(int) const { return 1; }
  STAGECOACH_HOST_DEVICE int min(int) const { return 0; }
  STAGECOACH_HOST_DEVICE int quant(int i) const { return quants[i]; }
};
static_assert(sizeof(BlockQ8_0) == 34);

// --- Blocks of 256 (K-quants): halves of 128 elements; within a half, the bits of element l of
// each run of 32 lie in the same byte l.

struct BlockQ2_K {
  static constexpr int kElements = 256, kGroup = 16;
  uint8_t scales[16];  // low nibble: scale, high nibble: min
  uint8_t crumbs[64];  // two bits each
  uint16_t d;
  uint16_t dmin;

  STAGECOACH_HOST_DEVICE float delta() const { return HalfToFloat(d); }
  STAGECOACH_HOST_DEVICE float delta_min() const { return HalfToFloat(dmin); }
  STAGECOACH_HOST_DEVICE int scale(int g) const { return scales[g] & 0xf; }
  STAGECOACH_HOST_DEVICE int min(int g) const { return scales[g] >> 4; }
  STAGECOACH_HOST_DEVICE int quant(int i) const {
    return (crumbs[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2)) & 3;
  }
};
static_assert(sizeof(BlockQ2_K) == 84);

struct BlockQ3_K {
  static constexpr int kElements = 256, kGroup = 16;
  uint8_t high_bits[32];  // bit i / 32 of byte i % 32; set: quant is 0..3, clear: -4..-1
  uint8_t crumbs[64];     // as in BlockQ2_K
  uint8_t scales[12];     // 16 scales of 6 bits: low nibbles in [0, 8), upper two bits in [8, 12)
  uint16_t d;

  STAGECOACH_HOST_DEVICE float delta() const { return HalfToFloat(d); }
  STAGECOACH_HOST_DEVICE float delta_min() const { return 0; }
  STAGECOACH_HOST_DEVICE int scale(int g) const {
    const int low = (scales[g % 8] >> (g / 8 * 4)) & 0xf;
    const int high = (scales[8 + g % 4] >> (g / 4 * 2)) & 3;
    return (low | (high << 4)) - 32;
  }
  STAGECOACH_HOST_DEVICE int min(int) const { return 0; }
  STAGECOACH_HOST_DEVICE int quant(int i) const {
    const int low = (crumbs[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2)) & 3;
    const int high = (high_bits[i % 32] >> (i / 32)) & 1;
    return (low | (high << 2)) - 4;
  }
};
static_assert(sizeof(BlockQ3_K) == 110);

// The 8 scales and 8 minimums of 6 bits that Q4_K and Q5_K keep in 12 bytes.
STAGECOACH_HOST_DEVICE inline int PackedScale(const uint8_t packed[12], int g) {
  if (g < 4) return packed[g] & 0x3f;
  return (packed[g + 4] & 0xf) | ((packed[g - 4] >> 6) << 4);
}
STAGECOACH_HOST_DEVICE inline int PackedMin(const uint8_t packed[12], int g) {
  if (g < 4) return packed[g + 4] & 0x3f;
  return (packed[g + 4] >> 4) | ((packed[g] >> 6) << 4);
}

struct BlockQ4_K {
  static constexpr int kElements = 256, kGroup = 32;
  uint16_t d;
  uint16_t dmin;
  uint8_t scales[12];
  uint8_t nibbles[128];  // low halves of 32 bytes: one group; high halves: the next group

  STAGECOACH_HOST_DEVICE float delta() const { return HalfToFloat(d); }
  STAGECOACH_HOST_DEVICE float delta_min() const { return HalfToFloat(dmin); }
  STAGECOACH_HOST_DEVICE int scale(int g) const { return PackedScale(scales, g); }
  STAGECOACH_HOST_DEVICE int min(int g) const { return PackedMin(scales, g); }
  STAGECOACH_HOST_DEVICE int quant(int i) const {
    return (nibbles[i / 64 * 32 + i % 32] >> (i % 64 / 32 * 4)) & 0xf;
  }
};
static_assert(sizeof(BlockQ4_K) == 144);

struct BlockQ5_K {
  static constexpr int kElements = 256, kGroup = 32;
  uint16_t d;
  uint16_t dmin;
  uint8_t scales[12];
  uint8_t high_bits[32];  // bit i / 32 of byte i % 32: fifth bit of element i
  uint8_t nibbles[128];   // as in BlockQ4_K

  STAGECOACH_HOST_DEVICE float delta() const { return HalfToFloat(d); }
  STAGECOACH_HOST_DEVICE float delta_min() const { return HalfToFloat(dmin); }
  STAGECOACH_HOST_DEVICE int scale(int g) const { return PackedScale(scales, g); }
  STAGECOACH_HOST_DEVICE int min(int g) const { return PackedMin(scales, g); }
  STAGECOACH_HOST_DEVICE int quant(int i) const {
    const int low = (nibbles[i / 64 * 32 + i % 32] >> (i % 64 / 32 * 4)) & 0xf;
    const int high = (high_bits[i % 32] >> (i / 32)) & 1;
    return low | (high << 4);
  }
};
static_assert(sizeof(BlockQ5_K) == 176);

struct BlockQ6_K {
  static constexpr int kElements = 256, kGroup = 16;
  uint8_t nibbles[128];  // 64 bytes per half: low halves its elements 0..63, high halves 64..127
  uint8_t crumbs[64];    // upper two bits, as in BlockQ2_K
  int8_t scales[16];
  uint16_t d;

  STAGECOACH_HOST_DEVICE float delta() const { return HalfToFloat(d); }
  STAGECOACH_HOST_DEVICE float delta_min() const { return 0; }
  STAGECOACH_HOST_DEVICE int scale(int g) const { return scales[g]; }
  STAGECOACH_HOST_DEVICE int min(int) const { return 0; }
  STAGECOACH_HOST_DEVICE int quant(int i) const {
    const int low = (nibbles[i / 128 * 64 + i % 64] >> (i % 128 / 64 * 4)) & 0xf;
    const int high = (crumbs[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2)) & 3;
    return (low | (high << 4)) - 32;
  }
};
static_assert(sizeof(BlockQ6_K) == 210);

// BlockOf<TensorType::kQ4_K> is BlockQ4_K, and so on.
template <TensorType type>
struct BlockOfType;
// clang-format off
template <> struct BlockOfType<TensorType::kF32> { using Block = BlockF32; };
template <> struct BlockOfType<TensorType::kF16> { using Block = BlockF16; };
template <> struct BlockOfType<TensorType::kBF16> { using Block = BlockBF16; };
template <> struct BlockOfType<TensorType::kQ4_0> { using Block = BlockQ4_0; };
template <> struct BlockOfType<TensorType::kQ4_1> { using Block = BlockQ4_1; };
template <> struct BlockOfType<TensorType::kQ5_0> { using Block = BlockQ5_0; };
template <> struct BlockOfType<TensorType::kQ5_1> { using Block = BlockQ5_1; };
template <> struct BlockOfType<TensorType::kQ8_0> { using Block = BlockQ8_0; };
template <> struct BlockOfType<TensorType::kQ2_K> { using Block = BlockQ2_K; };
template <> struct BlockOfType<TensorType::kQ3_K> { using Block = BlockQ3_K; };
template <> struct BlockOfType<TensorType::kQ4_K> { using Block = BlockQ4_K; };
template <> struct BlockOfType<TensorType::kQ5_K> { using Block = BlockQ5_K; };
template <> struct BlockOfType<TensorType::kQ6_K> { using Block = BlockQ6_K; };
// clang-format on
template <TensorType type>
using BlockOf = typename BlockOfType<type>::Block;

// out: [Block::kElements]. In float32, in the order of the formula above.
template <typename Block>
STAGECOACH_HOST_DEVICE inline void DecodeBlock(const Block& block, float* out) {
  if constexpr (Block::kElements == 1) {
    out[0] = block.value();
  } else {
    for (int g = 0; g < Block::kElements / Block::kGroup; ++g) {
      const float scale = block.delta() * static_cast<float>(block.scale(g));
      const float min = block.delta_min() * static_cast<float>(block.min(g));
      for (int i = g * Block::kGroup; i < (g + 1) * Block::kGroup; ++i) {
        out[i] = scale * static_cast<float>(block.quant(i)) - min;
      }
    }
  }
}

// Whether no value of the block is infinite or NaN, judged by its scales alone.
template <typename Block>
STAGECOACH_HOST_DEVICE inline bool HasFiniteScales(const Block& block) {
  constexpr uint32_t kExponent = 0x7f800000;
  if constexpr (Block::kElements == 1) {
    return (FloatToBits(block.value()) & kExponent) != kExponent;
  } else {
    return (FloatToBits(block.delta()) & kExponent) != kExponent &&
           (FloatToBits(block.delta_min()) & kExponent) != kExponent;
  }
}

// Calls visit.template operator()<Block>() with the block struct of `type`: the one place where a
// run-time type becomes a compile-time one.
template <typename Visitor>
auto VisitBlockType(TensorType type, Visitor&& visit) {
  // clang-format off
  switch (type) {
    case TensorType::kF32: return visit.template operator()<BlockF32>();
    case TensorType::kF16: return visit.template operator()<BlockF16>();
    case TensorType::kBF16: return visit.template operator()<BlockBF16>();
    case TensorType::kQ4_0: return visit.template operator()<BlockQ4_0>();
    case TensorType::kQ4_1: return visit.template operator()<BlockQ4_1>();
    case TensorType::kQ5_0: return visit.template operator()<BlockQ5_0>();
    case TensorType::kQ5_1: return visit.template operator()<BlockQ5_1>();
    case TensorType::kQ8_0: return visit.template operator()<BlockQ8_0>();
    case TensorType::kQ2_K: return visit.template operator()<BlockQ2_K>();
    case TensorType::kQ3_K: return visit.template operator()<BlockQ3_K>();
    case TensorType::kQ4_K: return visit.template operator()<BlockQ4_K>();
    case TensorType::kQ5_K: return visit.template operator()<BlockQ5_K>();
    case TensorType::kQ6_K: return visit.template operator()<BlockQ6_K>();
  }
  // clang-format on
  __builtin_unreachable();  // a TensorType always comes from FindTensorType
}

}  // namespace stagecoach

#endif  // STAGECOACH_MODEL_BLOCK_DECODE_H_
