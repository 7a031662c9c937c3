// From tiles to the weights themselves, in halves, in the registers of a matrix product. Every
// kernel decodes with this code, so all multiply the same bits:
//
//   weight = half(quant * scale + offset), quant exact, one rounding,
//   scale = half(d * integer scale), offset = -half(dmin * integer minimum), both times what the
//           format has them times (TileFormat) before they are rounded;
//   of blocks of 32 columns: scale = d, offset = -delta_min
//   of F16 and BF16: weight = half(weight)
//
// (model/block_decode.h), times Tile::kWeightScale. Weights that halves cannot hold are not finite:
// weight_bounds.h says which; they are refused at load.
#ifndef STAGECOACH_KERNELS_CUDA_TILE_DECODE_CUH_
#define STAGECOACH_KERNELS_CUDA_TILE_DECODE_CUH_

#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/tile_format.cuh"

namespace stagecoach::cuda {

// The bits of two halves of 1024: with an integer below 1024 in the mantissa, 1024 + that integer.
inline constexpr uint32_t kHalves1024 = 0x64006400;

__device__ inline __half2 AsHalves(uint32_t bits) {
  __half2 halves;
  memcpy(&halves, &bits, 4);
  return halves;
}
__device__ inline uint32_t BitsOf(__half2 halves) {
  uint32_t bits;
  memcpy(&bits, &halves, 4);
  return bits;
}
// (word & mask) | bits, in one instruction: the compiler would make two of it where mask and bits
// are constants.
__device__ inline uint32_t MaskAndOr(uint32_t word, uint32_t mask, uint32_t bits) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "r"(mask), "r"(bits));
  return result;
}
__device__ inline uint32_t MoveRight(uint32_t word, int bits) {
  return bits >= 0 ? word >> bits : word << -bits;
}

// What a tile holds of a pair of groups of 32 columns for one lane, as it is.
template <typename Tile>
struct TilePair {
  uint4 nibbles = {};
  uint2 crumbs = {};
  uint32_t bits = 0;
  uint4 bytes[2] = {};

  TilePair() = default;
  // p: a constant after unrolling.
  __device__ TilePair(const uint8_t* tile, int p, int lane) {
    const int place = p * 32 + lane;
    if constexpr (Tile::kHasNibbles) {
      nibbles = *reinterpret_cast<const uint4*>(tile + Tile::kNibbles + place * 16);
    }
    if constexpr (Tile::kHasCrumbs) {
      crumbs = *reinterpret_cast<const uint2*>(tile + Tile::kCrumbs + place * 8);
    }
    if constexpr (Tile::kHasBits) {
      bits = *reinterpret_cast<const uint32_t*>(tile + Tile::kBitPlane + place * 4);
    }
    if constexpr (Tile::kBits == 8) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        bytes[i] = *reinterpret_cast<const uint4*>(tile + Tile::kBytePlane +
                                                   ((2 * p + i) * 32 + lane) * 16);
      }
    }
  }

  // The quants of group i (0, 1), row r, pairs 2h and 2h + 1 (h = 0, 1), exact; of subnormal types
  // less the least quant, times 2^-22 and 2^-18.
  __device__ void Quants(int i, int r, int h, __half2 (&quants)[2]) const {
    constexpr float kLeast = Tile::kLeastQuant;
    const uint32_t nibble =
        i == 0 ? (r == 0 ? nibbles.x : nibbles.y) : (r == 0 ? nibbles.z : nibbles.w);
    if constexpr (Tile::kSubnormal) {
      static_assert(Tile::kNibbleTurn == 2);
      const uint32_t turned = __funnelshift_r(nibble, nibble, PlaceField(4, 2 * h));
      quants[0] = AsHalves(turned & 0x003c003c);
      quants[1] = AsHalves(turned & 0x03c003c0);
    } else if constexpr (Tile::kBits == 8) {
      const uint32_t word =
          h == 0 ? (r == 0 ? bytes[i].x : bytes[i].z) : (r == 0 ? bytes[i].y : bytes[i].w);
      const __half2 less = __float2half2_rn(kLeast - 1024);
      quants[0] = __hadd2_rn(AsHalves(__byte_perm(word, kHalves1024, 0x7170)), less);
      quants[1] = __hadd2_rn(AsHalves(__byte_perm(word, kHalves1024, 0x7372)), less);
    } else {
      uint32_t first = kHalves1024, second = kHalves1024;
      const auto add = [&](uint32_t plane, int width, int f, int shift) {
        const uint32_t word = MoveRight(plane, PlaceField(width, f) - shift);
        const uint32_t mask = (((1u << width) - 1) << shift) * 0x00010001u;
        first = MaskAndOr(word, mask, first);
        second = MaskAndOr(word, mask << 4, second);
      };
      if constexpr (Tile::kHasBits) add(bits, 1, i * 8 + r * 4 + 2 * h, Tile::kBitShift);
      if constexpr (Tile::kHasCrumbs) {
        add(i == 0 ? crumbs.x : crumbs.y, 2, r * 4 + 2 * h, Tile::kCrumbShift);
      }
      if constexpr (Tile::kHasNibbles) add(nibble, 4, 2 * h, 0);
      // 1024 + quant, and 1024 + 16 * quant.
      quants[0] = __hadd2_rn(AsHalves(first), __float2half2_rn(kLeast - 1024));
      quants[1] =
          __hfma2(AsHalves(second), __float2half2_rn(1.0f / 16), __float2half2_rn(kLeast - 64));
    }
  }
};

// Scales and offsets of the lane's rows in a pair of groups, as DecodeGroup wants them.
struct PairScales {
  __half2 scale[2];   // [r]: of both groups
  __half2 lower[2];   // of subnormal types, those of quants that are lower in their halves
  __half2 offset[2];  // of types with a minimum and subnormal ones
};

// Bytes of the pair p of groups among 8, as two halves, `least` added, times 2^(exponent - 10) and
// `delta`.
template <int least, int exponent = 10>
__device__ inline __half2 ScaledBytes(uint2 bytes, int p, __half2 delta) {
  static_assert(least == 0 || exponent == 10);
  constexpr float kBase = static_cast<float>(1 << exponent);
  constexpr uint32_t kBaseBits = (15u + exponent) << 10;
  const uint32_t word = p < 2 ? bytes.x : bytes.y, base = kBaseBits * 0x00010001u;
  // kBase * (1 + byte / 1024), of bytes 0 and 2 or 1 and 3
  const __half2 value =
      AsHalves(p % 2 == 0 ? MaskAndOr(word, 0x00ff00ff, base) : __byte_perm(word, base, 0x7351));
  if constexpr (least == 0) {  // in one step: kBase * delta is exact (weight_bounds.h)
    return __hfma2(value, delta, __hmul2_rn(delta, __float2half2_rn(-kBase)));
  } else {
    return __hmul2_rn(__hadd2_rn(value, __float2half2_rn(least - kBase)), delta);
  }
}

// What a tile's scales are to one lane.
template <typename Tile>
class TileScales {
 public:
  TileScales() = default;
  __device__ TileScales(const uint8_t* tile, int lane) {
    const int g = lane / 4;
    if constexpr (Tile::kFloatScales) {
#pragma unroll
      for (int i = 0; i < 2 * kPairs; ++i) {
        const int place = i / 2 * 16 + i % 2 * 8 + g;
        deltas_[i] = reinterpret_cast<const __half2*>(tile + Tile::kDeltas)[place];
        if constexpr (Tile::kHasMin) {
          delta_mins_[i] = reinterpret_cast<const __half2*>(tile + Tile::kDeltaMins)[place];
        }
      }
    } else {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint8_t* row = tile + Tile::kScales + g * 32 + r * 16;
        if constexpr (Tile::kScaling == Scaling::kInteger32) {
          const uint4 both = *reinterpret_cast<const uint4*>(row);
          scales_[r] = {both.x, both.y};
          mins_[r] = {both.z, both.w};
        } else {
          const uint2 bytes = *reinterpret_cast<const uint2*>(row + lane % 4 / 2 * 8);
          constexpr uint32_t kLow = Tile::kHasMin ? 0x0f0f0f0f : 0xffffffff;
          scales_[r] = {bytes.x & kLow, bytes.y & kLow};
          mins_[r] = {(bytes.x >> 4) & kLow, (bytes.y >> 4) & kLow};
        }
        const auto* deltas = reinterpret_cast<const __half*>(tile + Tile::kDeltas +
                                                             (g * 2 + r) * (Tile::kHasMin ? 4 : 2));
        delta_[r] = __half2half2(deltas[0]);
        if constexpr (Tile::kHasMin) minus_min_[r] = __half2half2(__hneg(deltas[1]));
      }
    }
  }

  // p: a constant after unrolling.
  __device__ PairScales Pair(int p) const {
    PairScales result;
    if constexpr (Tile::kFloatScales) {
      const __half2 *delta = deltas_ + 2 * p, *min = delta_mins_ + 2 * p;  // [group]
      result.scale[0] = __lows2half2(delta[0], delta[1]);
      result.scale[1] = __highs2half2(delta[0], delta[1]);
      if constexpr (Tile::kHasMin) {
        const __half2 factor = __float2half2_rn(-Tile::kWeightScale);
        result.offset[0] = __hmul2_rn(__lows2half2(min[0], min[1]), factor);
        result.offset[1] = __hmul2_rn(__highs2half2(min[0], min[1]), factor);
      } else if constexpr (Tile::kSubnormal) {
        const __half2 factor =
            __float2half2_rn(Tile::kLeastQuant * Tile::kWeightScale / Tile::kQuantFactor);
        for (int r = 0; r < 2; ++r) result.offset[r] = __hmul2_rn(result.scale[r], factor);
      }
    } else {
      constexpr int kMinExponent = Tile::kSubnormal ? 3 : 10;
      static_assert((1 << kMinExponent) == 1024 * Tile::kWeightScale);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        result.scale[r] = ScaledBytes<Tile::kLeastScale>(scales_[r], p, delta_[r]);
        if constexpr (Tile::kHasMin) {
          result.offset[r] = ScaledBytes<0, kMinExponent>(mins_[r], p, minus_min_[r]);
        }
      }
    }
    if constexpr (Tile::kSubnormal) {
      for (int r = 0; r < 2; ++r) {
        result.lower[r] = __hmul2_rn(result.scale[r], __float2half2_rn(Tile::kLowerFactor));
      }
    }
    return result;
  }

 private:
  __half2 deltas_[2 * kPairs] = {}, delta_mins_[2 * kPairs] = {};  // of blocks of 32 columns
  uint2 scales_[2] = {}, mins_[2] = {};                            // [r]: 8 bytes
  __half2 delta_[2] = {}, minus_min_[2] = {};
};

// Weights of one group of 32 columns: the registers of two products over 16 columns each.
struct GroupWeights {
  uint32_t bits[2][4];  // [r][j]
};

// i: which group of the pair.
template <typename Tile>
__device__ inline GroupWeights DecodeGroup(const TilePair<Tile>& pair, const PairScales& scales,
                                           int i) {
  constexpr bool kHasOffset = Tile::kHasMin || Tile::kSubnormal;
  GroupWeights result;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const auto of_group = [&](__half2 both) {
      return i == 0 ? __low2half2(both) : __high2half2(both);
    };
    const __half2 upper = of_group(scales.scale[r]);
    const __half2 lower = Tile::kSubnormal ? of_group(scales.lower[r]) : upper;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      __half2 quants[2];
      pair.Quants(i, r, h, quants);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const __half2 scale = j == 0 ? lower : upper;
        __half2 weight;
        if constexpr (kHasOffset) {
          weight = __hfma2(quants[j], scale, of_group(scales.offset[r]));
        } else {
          weight = __hmul2_rn(quants[j], scale);
        }
        result.bits[r][2 * h + j] = BitsOf(weight);
      }
    }
  }
  return result;
}

// The same of tiles of halves, where there is nothing to decode.
template <>
struct TilePair<HalfTile> {
  uint4 halves[2][2] = {};  // [group of the pair][r]

  TilePair() = default;
  __device__ TilePair(const uint8_t* tile, int p, int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      halves[i / 2][i % 2] =
          *reinterpret_cast<const uint4*>(tile + ((4 * p + i) * 32 + lane) * sizeof(uint4));
    }
  }
};
template <>
class TileScales<HalfTile> {
 public:
  TileScales() = default;
  __device__ TileScales(const uint8_t*, int) {}
  __device__ PairScales Pair(int) const { return {}; }
};
template <>
__device__ inline GroupWeights DecodeGroup(const TilePair<HalfTile>& pair, const PairScales&,
                                           int i) {
  GroupWeights result;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint4 halves = pair.halves[i][r];
    result.bits[r][0] = halves.x;
    result.bits[r][1] = halves.y;
    result.bits[r][2] = halves.z;
    result.bits[r][3] = halves.w;
  }
  return result;
}

// All that a tile holds for one lane.
template <typename Tile>
struct LoadedTile {
  TilePair<Tile> pairs[kPairs];
  TileScales<Tile> scales;

  LoadedTile() = default;
  __device__ LoadedTile(const uint8_t* tile, int lane) : scales(tile, lane) {
#pragma unroll
    for (int p = 0; p < kPairs; ++p) pairs[p] = TilePair<Tile>(tile, p, lane);
  }
};

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_TILE_DECODE_CUH_
