// How weights lie in device memory: tiles of 16 rows x 256 columns, in the order in which
// the lanes of a warp feed them to its matrix products (device_ops.cuh). A matrix is
// [ceil(n / 16)][ceil(k / 256)] tiles, rows and columns beyond n and k zero. With g = lane / 4 and
// t = lane % 4, a lane has rows g and g + 8 (r = 0, 1) and in each group of 32 columns columns 8t
// .. 8t + 7, in pairs of neighbours (j = 0 .. 3): a register of two halves each. A tile is these
// planes, each only if its type has it, with p = pair of groups (0 .. 3):
//
//   nibbles [p][lane][group of p][r] words   4 bits of the pairs j; words of subnormal types
//                                            (below) turned left by kNibbleTurn bits
//   crumbs  [p][lane][group of p] words      2 bits of the pairs (r, j)
//   bits    [p][lane] words                  1 bit of the pairs (group of p, r, j)
//   bytes   [group][lane][r] 8 bytes         the columns, 128 added to each
//   scales  [g][r][16] bytes   8 scales of 32 columns, then 8 minimums; or 16 scales of 16 columns,
//                              those of the first halves of groups before those of the second
//                              (Q2_K: low half scale, high half minimum); each 8 lie as PlaceScale
//                              says
//   deltas  [g][r] halves d * kQuantFactor (, dmin)
//   or, for blocks of 32 columns: deltas [group][g][r] halves d * kQuantFactor, and then, in the
//                              same order, the minimums as they are
//
// Weights of F16 and BF16 are halves [group][r][lane][8 columns], and nothing else.
//
// In a word the lower half has the first column of each pair, the upper half the second one; where
// in a half, PlaceField says. A quant is stored as its lowest bits, less the least quant of its
// type; the lowest are in the plane named first: nibbles and bits (5), nibbles and crumbs (6),
// crumbs and bits (3). Signed scales have their least value taken off, too.
#ifndef STAGECOACH_KERNELS_CUDA_TILE_FORMAT_CUH_
#define STAGECOACH_KERNELS_CUDA_TILE_FORMAT_CUH_

#include <cstdint>

#include "model/tensor_type.h"

namespace stagecoach::cuda {

inline constexpr int kTileRows = 16;
inline constexpr int kTileColumns = 256;
inline constexpr int kPairs = 4;  // of groups of 32 columns
inline constexpr int kGroups = 2 * kPairs;

// Bytes of so many rows of activations (halves) of one superblock.
__host__ __device__ constexpr int ActivationBlockBytes(int rows) { return kGroups * rows * 64; }

enum class Scaling {
  kInteger32,  // integer scales of 32 columns, one delta for 256
  kInteger16,  // integer scales of 16 columns, one delta for 256
  kFloat32,    // one delta for 32 columns
};

// least_scale: the least integer scale.
template <int bits, int least_quant, Scaling scaling, int least_scale, bool has_min>
struct TileFormat {
  static constexpr int kParts = 1;  // rows of halves that make a row of activations
  static constexpr int kBits = bits;
  static constexpr int kLeastQuant = least_quant;
  static constexpr Scaling kScaling = scaling;
  static constexpr int kLeastScale = least_scale;
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

  // Four bits of a half's mantissa, and nothing else, are a (subnormal) half themselves: the quant
  // times 2^-18 at its upper end, where scales are taken times kQuantFactor, so that weights are
  // 128 times too small; 2^-22, where they are below those, with scales kLowerFactor times as
  // large. So a word has four of its eight quants where they are wanted, and the other four when it
  // is turned by a byte.
  static constexpr bool kSubnormal = bits == 4;
  static constexpr float kQuantFactor = kSubnormal ? 2048 : 1;
  static constexpr float kLowerFactor = 16;
  static constexpr float kWeightScale = kSubnormal ? 1.0f / 128 : 1.0f;
  static constexpr int kNibbleTurn = kSubnormal ? 2 : 0;

  static constexpr int kCrumbShift = kHasNibbles ? 4 : 0;  // the quant's first bit in this plane
  static constexpr int kBitShift = bits - 1;
};

// Weights that are halves as they are.
struct HalfTile {
  static constexpr int kParts = 2;
  static constexpr int kBytes = kTileRows * kTileColumns * 2;
  static constexpr float kWeightScale = 1;
};

// Where in a half-word field f lies, of `width` bits: such that fields 2m and 2m + 1 are 4 bits
// apart.
__host__ __device__ constexpr int PlaceField(int width, int f) {
  return f / 2 % (4 / width) * width + f / 2 / (4 / width) * 8 + f % 2 * 4;
}

// Where among its neighbours scale j lies: the two of a pair of groups where the halves of a word
// are, so that one mask takes both.
__host__ __device__ constexpr int PlaceScale(int j) { return j / 4 * 4 + j % 2 * 2 + j / 2 % 2; }

template <int bits, int least_quant, Scaling scaling, int least_scale, bool has_min>
struct HasTile {
  using Tile = TileFormat<bits, least_quant, scaling, least_scale, has_min>;
};
// clang-format off
template <TensorType type> struct TileOfType;
template <> struct TileOfType<TensorType::kF16> { using Tile = HalfTile; };
template <> struct TileOfType<TensorType::kBF16> { using Tile = HalfTile; };
template <> struct TileOfType<TensorType::kQ4_0> : HasTile<4, -8, Scaling::kFloat32, 0, false> {};
template <> struct TileOfType<TensorType::kQ4_1> : HasTile<4, 0, Scaling::kFloat32, 0, true> {};
template <> struct TileOfType<TensorType::kQ5_0> : HasTile<5, -16, Scaling::kFloat32, 0, false> {};
template <> struct TileOfType<TensorType::kQ5_1> : HasTile<5, 0, Scaling::kFloat32, 0, true> {};
template <> struct TileOfType<TensorType::kQ8_0> : HasTile<8, -128, Scaling::kFloat32, 0, false> {};
template <> struct TileOfType<TensorType::kQ2_K> : HasTile<2, 0, Scaling::kInteger16, 0, true> {};
template <> struct TileOfType<TensorType::kQ3_K>
    : HasTile<3, -4, Scaling::kInteger16, -32, false> {};
template <> struct TileOfType<TensorType::kQ4_K> : HasTile<4, 0, Scaling::kInteger32, 0, true> {};
template <> struct TileOfType<TensorType::kQ5_K> : HasTile<5, 0, Scaling::kInteger32, 0, true> {};
template <> struct TileOfType<TensorType::kQ6_K>
    : HasTile<6, -32, Scaling::kInteger16, -128, false> {};
// clang-format on
template <TensorType type>
using TileOf = typename TileOfType<type>::Tile;

// Calls visit.template operator()<type>() for a type in tiles, all but F32, or returns `otherwise`.
template <typename Result, typename Visitor>
Result VisitTileType(TensorType type, Result otherwise, Visitor&& visit) {
  // clang-format off
  switch (type) {
    case TensorType::kF16: return visit.template operator()<TensorType::kF16>();
    case TensorType::kBF16: return visit.template operator()<TensorType::kBF16>();
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

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_TILE_FORMAT_CUH_
