// How quantised weights lie in device memory: tiles of 16 rows x 256 columns, in the order in which
// the lanes of a warp feed them to its matrix products (device_ops.cuh). A matrix is
// [ceil(n / 16)][ceil(k / 256)] tiles, rows and columns beyond n and k zero. A tile is these
// planes, each only if its type has it, with p = pair of groups of 32 columns (0..3), g = lane / 4:
//
//   nibbles [p][lane] 16 bytes  words (group 2p: first, second 16 columns; group 2p + 1: the same);
//                               byte i of a word: columns 4t + i; low half row g, high half row g +
//                               8
//   crumbs  [p][lane] 8 bytes   one word per group; bits 2j.. of byte i: register a[j], column i
//   bits    [p][lane] 4 bytes   bit j (group 2p) or 4 + j (group 2p + 1) of byte i: the same
//   bytes   [p][group][lane] 16 bytes  registers a[0] .. a[3] as they are
//   scales  [g][row g, row g + 8]:  8 scales and 8 minimums of 32 columns each,
//                                   or 16 scales of 16 columns (Q2_K: low half scale, high half
//                                   minimum)
//   deltas  [g] halves d (, dmin) of row g, then of row g + 8
//   or, for blocks of 32 columns: deltas [group][g] halves of row g and row g + 8; delta mins alike
//
// A quant of b bits is stored as its b lowest bits, the lowest in the plane named first: nibbles
// and bits (5), nibbles and crumbs (6), crumbs and bits (3).
#ifndef STAGECOACH_KERNELS_CUDA_TILE_FORMAT_CUH_
#define STAGECOACH_KERNELS_CUDA_TILE_FORMAT_CUH_

#include <cstdint>

#include "model/tensor_type.h"

namespace stagecoach::cuda {

inline constexpr int kTileRows = 16;
inline constexpr int kTileColumns = 256;
inline constexpr int kPairs = 4;  // of groups of 32 columns

enum class Scaling {
  kInteger32,  // integer scales of 32 columns, one delta for 256
  kInteger16,  // integer scales of 16 columns, one delta for 256
  kFloat32,    // one delta for 32 columns
};

template <int bits, bool is_signed, Scaling scaling, bool has_min>
struct TileFormat {
  static constexpr int kBits = bits;
  static constexpr bool kSigned = is_signed;
  static constexpr Scaling kScaling = scaling;
  static constexpr bool kHasMin = has_min;
  static constexpr bool kFloatScales = scaling == Scaling::kFloat32;

  static constexpr int kNibbles = 0;
  static constexpr bool kHasNibbles = bits == 4 || bits == 5 || bits == 6;
  static constexpr int kCrumbs = kNibbles + (kHasNibbles ? 2048 : 0);
  static constexpr bool kHasCrumbs = bits == 2 || bits == 3 || bits == 6;
  static constexpr int kBitPlane = kCrumbs + (kHasCrumbs ? 1024 : 0);
  static constexpr bool kHasBits = bits == 3 || bits == 5;
  static constexpr int kBytePlane = kBitPlane + (kHasBits ? 512 : 0);
  static constexpr int kScales = kBytePlane + (bits == 8 ? 4096 : 0);
  static constexpr int kDeltas = kScales + (kFloatScales ? 0 : 256);
  static constexpr int kDeltaMins = kDeltas + 256;  // kFloatScales only
  static constexpr int kBytes =
      kDeltas + (kFloatScales ? (has_min ? 512 : 256) : (has_min ? 64 : 32));
  static_assert(kBytes % 16 == 0);

  // A register of ReadPair holds quants times these: a[0] and a[2], a[1] and a[3].
  static constexpr float kLowFactor = is_signed ? static_cast<float>(1 << (8 - bits)) : 1.0f;
  static constexpr float kHighFactor = !is_signed && bits == 4 ? 16.0f : kLowFactor;
};

template <int bits, bool is_signed, Scaling scaling, bool has_min>
struct HasTile {
  using Tile = TileFormat<bits, is_signed, scaling, has_min>;
};
// clang-format off
template <TensorType type> struct TileOfType;
template <> struct TileOfType<TensorType::kQ4_0> : HasTile<4, true, Scaling::kFloat32, false> {};
template <> struct TileOfType<TensorType::kQ4_1> : HasTile<4, false, Scaling::kFloat32, true> {};
template <> struct TileOfType<TensorType::kQ5_0> : HasTile<5, true, Scaling::kFloat32, false> {};
template <> struct TileOfType<TensorType::kQ5_1> : HasTile<5, false, Scaling::kFloat32, true> {};
template <> struct TileOfType<TensorType::kQ8_0> : HasTile<8, true, Scaling::kFloat32, false> {};
template <> struct TileOfType<TensorType::kQ2_K> : HasTile<2, false, Scaling::kInteger16, true> {};
template <> struct TileOfType<TensorType::kQ3_K> : HasTile<3, true, Scaling::kInteger16, false> {};
template <> struct TileOfType<TensorType::kQ4_K> : HasTile<4, false, Scaling::kInteger32, true> {};
template <> struct TileOfType<TensorType::kQ5_K> : HasTile<5, false, Scaling::kInteger32, true> {};
template <> struct TileOfType<TensorType::kQ6_K> : HasTile<6, true, Scaling::kInteger16, false> {};
// clang-format on
template <TensorType type>
using TileOf = typename TileOfType<type>::Tile;

// Calls visit.template operator()<type>() for a quantised type, or returns `otherwise`.
template <typename Result, typename Visitor>
Result VisitTileType(TensorType type, Result otherwise, Visitor&& visit) {
  // clang-format off
  switch (type) {
    case TensorType::kQ4_0: return visit.template operator()<TensorType::kQ4_0>();
    case TensorType::kQ4_1: return visit.template operator()<TensorType::kQ4_1>();
    case TensorType::kQ5_0: return visit.template operator()<TensorType::kQ5_0>();
    case TensorType::kQ5_1: return visit.template operator()<TensorType::kQ5_1>();
    case TensorType::kQ8_0: return visit.template operator()<TensorType::kQ8_0>();
    case TensorType::kQ2_K: return visit.template operator()<TensorType::kQ2_K>();
    case TensorType::kQ3_K: return visit.template operator()<TensorType::kQ3_K>();
    case TensorType::kQ4_K: return visit.template operator()<TensorType::kQ4_K>();
    case TensorType::kQ5_K: return visit.template operator()<TensorType::kQ5_K>();
    case TensorType::kQ6_K: return visit.template operator()<TensorType::kQ6_K>();
    default: return otherwise;
  }
  // clang-format on
}

// The bytes `mask` of word, moved `left` bits (negative: right).
__device__ inline uint32_t MoveBits(uint32_t word, int left, uint32_t mask) {
  return (left >= 0 ? word << left : word >> -left) & mask;
}

// The registers of groups 2p and 2p + 1 of a tile, for this lane. p: a constant after unrolling.
template <typename Tile>
__device__ inline void ReadPair(const uint8_t* tile, int p, int lane, uint32_t (&a)[2][4]) {
  uint4 nibbles = {};
  uint2 crumbs = {};
  uint32_t bits = 0;
  if constexpr (Tile::kHasNibbles) {
    nibbles = *reinterpret_cast<const uint4*>(tile + Tile::kNibbles + (p * 32 + lane) * 16);
  }
  if constexpr (Tile::kHasCrumbs) {
    crumbs = *reinterpret_cast<const uint2*>(tile + Tile::kCrumbs + (p * 32 + lane) * 8);
  }
  if constexpr (Tile::kHasBits) {
    bits = *reinterpret_cast<const uint32_t*>(tile + Tile::kBitPlane + (p * 32 + lane) * 4);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint4 bytes = {};
    if constexpr (Tile::kBits == 8) {
      bytes =
          *reinterpret_cast<const uint4*>(tile + Tile::kBytePlane + ((p * 2 + i) * 32 + lane) * 16);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t nibble = i == 0 ? (j < 2 ? nibbles.x : nibbles.y)
                                     : (j < 2 ? nibbles.z : nibbles.w);  // of both rows
      const int half = j % 2 * 4;  // where this row's bits begin
      const uint32_t crumb = i == 0 ? crumbs.x : crumbs.y;
      const int bit = i * 4 + j;
      if constexpr (Tile::kBits == 8) {
        a[i][j] = j == 0 ? bytes.x : j == 1 ? bytes.y : j == 2 ? bytes.z : bytes.w;
      } else if constexpr (Tile::kBits == 4 && Tile::kSigned) {
        a[i][j] = MoveBits(nibble, 4 - half, 0xf0f0f0f0);
      } else if constexpr (Tile::kBits == 4) {
        a[i][j] = nibble & (half ? 0xf0f0f0f0 : 0x0f0f0f0f);
      } else if constexpr (Tile::kBits == 5 && Tile::kSigned) {
        a[i][j] = MoveBits(nibble, 3 - half, 0x78787878) | MoveBits(bits, 7 - bit, 0x80808080);
      } else if constexpr (Tile::kBits == 5) {
        a[i][j] = MoveBits(nibble, -half, 0x0f0f0f0f) | MoveBits(bits, 4 - bit, 0x10101010);
      } else if constexpr (Tile::kBits == 6) {
        a[i][j] = MoveBits(nibble, 2 - half, 0x3c3c3c3c) | MoveBits(crumb, 6 - 2 * j, 0xc0c0c0c0);
      } else if constexpr (Tile::kBits == 3) {
        a[i][j] = MoveBits(crumb, 5 - 2 * j, 0x60606060) | MoveBits(bits, 7 - bit, 0x80808080);
      } else {
        static_assert(Tile::kBits == 2 || Tile::kBits == 8);
        a[i][j] = MoveBits(crumb, -2 * j, 0x03030303);
      }
    }
  }
}

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_TILE_FORMAT_CUH_
