// The arithmetic of one tile of weights and up to 64 columns of activations: the same code, hence
// the same bits, in every kernel.
#ifndef STAGECOACH_KERNELS_CUDA_SUPERBLOCK_SUM_CUH_
#define STAGECOACH_KERNELS_CUDA_SUPERBLOCK_SUM_CUH_

#include <cstdint>

#include "kernels/cuda/device_ops.cuh"
#include "kernels/cuda/tile_format.cuh"

namespace stagecoach::cuda {

// Activations of one superblock in shared memory, kColumns rows of x (columns of the products).
template <typename Tile, int kColumns>
struct SuperblockActivations {
  static constexpr int kColumnTiles = kColumns < 8 ? 1 : kColumns / 8;
  static constexpr int kScaleStride = kColumns < 4 ? 4 : kColumns;  // whole copies of 16 bytes
  static constexpr int kScaleBlocks = Tile::kFloatScales ? 8 : 1;
  static constexpr int kQuantBytes = kColumns * kTileColumns;
  static constexpr int kSumBytes = kColumns * 16;
  static constexpr int kScaleBytes = kScaleBlocks * kScaleStride * 4;

  const uint8_t* quants;  // [8 groups][kColumns][32], as in Activations
  const uint8_t* sums;    // [kColumns][8 groups] int16
  const float* scales;    // [kScaleBlocks][kScaleStride]

  // With few columns the lanes beyond them repeat column 0; nobody reads what they compute.
  static __device__ int Column(int tile, int column) {
    return kColumns >= 8 ? tile * 8 + column : column < kColumns ? column : 0;
  }
  __device__ uint2 Quants(int group, int column_tile, int lane) const {
    const int column = Column(column_tile, lane / 4);
    return *reinterpret_cast<const uint2*>(quants + (group * kColumns + column) * 32 +
                                           lane % 4 * 8);
  }
  __device__ uint4 Sums(int column) const {
    return *reinterpret_cast<const uint4*>(sums + column * 16);
  }
};

__device__ inline uint32_t WordOf(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}
__device__ inline int UnsignedByte(const uint4& v, int i) {
  return static_cast<int>((WordOf(v, i / 4) >> (i % 4 * 8)) & 0xff);
}
__device__ inline int SignedByte(const uint4& v, int i) {
  return static_cast<int8_t>(WordOf(v, i / 4) >> (i % 4 * 8));
}

// sum over 8 groups of a group's sum of activations times its minimum. mins: 8 bytes below 128.
__device__ inline int MinimumSum(const uint4& sums, uint32_t mins_low, uint32_t mins_high) {
  int result = __dp2a_lo(static_cast<int>(sums.x), static_cast<int>(mins_low), 0);
  result = __dp2a_hi(static_cast<int>(sums.y), static_cast<int>(mins_low), result);
  result = __dp2a_lo(static_cast<int>(sums.z), static_cast<int>(mins_high), result);
  return __dp2a_hi(static_cast<int>(sums.w), static_cast<int>(mins_high), result);
}

// The lane's share of a tile's deltas, one per superblock: rows g and g + 8.
template <typename Tile>
struct RowDeltas {
  float delta[2];
  float delta_min[2];

  __device__ RowDeltas(const uint8_t* tile, int g) {
    if constexpr (Tile::kHasMin) {
      const uint2 halves = *reinterpret_cast<const uint2*>(tile + Tile::kDeltas + g * 8);
      delta[0] = HalfBitsToFloat(halves.x & 0xffff);
      delta[1] = HalfBitsToFloat(halves.y & 0xffff);
      delta_min[0] = HalfBitsToFloat(halves.x >> 16);
      delta_min[1] = HalfBitsToFloat(halves.y >> 16);
    } else {
      const uint32_t halves = *reinterpret_cast<const uint32_t*>(tile + Tile::kDeltas + g * 4);
      delta[0] = HalfBitsToFloat(halves & 0xffff);
      delta[1] = HalfBitsToFloat(halves >> 16);
      delta_min[0] = delta_min[1] = 0;
    }
    delta[0] *= 1 / Tile::kLowFactor;
    delta[1] *= 1 / Tile::kHighFactor;
  }
};

// sums[2 * row + c] += scale[row] * product[2 * row + c].
template <bool kOneColumn>
__device__ inline void AddScaled(const int (&product)[4], int scale0, int scale1, int (&sums)[4]) {
  sums[0] += scale0 * product[0];
  sums[2] += scale1 * product[2];
  if constexpr (!kOneColumn) {
    sums[1] += scale0 * product[1];
    sums[3] += scale1 * product[3];
  }
}

// Types with integer scales: column tiles [first, first + kTiles) of one superblock. acc[i] of a
// column tile: rows g (i < 2) and g + 8, columns 2t + i % 2.
template <typename Tile, int kColumns, int kTiles>
__device__ inline void AddIntegerScaled(const uint8_t* tile,
                                        const SuperblockActivations<Tile, kColumns>& x, int lane,
                                        int first, float (*acc)[4]) {
  constexpr bool kOneColumn = kColumns == 1;
  constexpr bool kMinByProduct = Tile::kScaling == Scaling::kInteger16 && Tile::kHasMin;
  const int g = lane / 4, t = lane % 4;
  const auto* packed = reinterpret_cast<const uint4*>(tile + Tile::kScales + g * 32);
  const uint4 scales0 = packed[0], scales1 = packed[1];
  int sums[kTiles][4] = {};
  int mins[kTiles][4] = {};
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    uint32_t a[2][4];
    ReadPair<Tile>(tile, p, lane, a);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int group = 2 * p + i;
      int product[4];
      if constexpr (Tile::kScaling == Scaling::kInteger32) {
        const int s0 = UnsignedByte(scales0, group), s1 = UnsignedByte(scales1, group);
#pragma unroll
        for (int c = 0; c < kTiles; ++c) {
          MultiplyK32<Tile::kSigned>(product, a[i], x.Quants(group, first + c, lane));
          AddScaled<kOneColumn>(product, s0, s1, sums[c]);
        }
      } else {
        int s0[2], s1[2];
        uint32_t m0[2], m1[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if constexpr (Tile::kHasMin) {
            const int b0 = UnsignedByte(scales0, 2 * group + h);
            const int b1 = UnsignedByte(scales1, 2 * group + h);
            s0[h] = b0 & 0xf, s1[h] = b1 & 0xf;
            m0[h] = (b0 >> 4) * 0x01010101u, m1[h] = (b1 >> 4) * 0x01010101u;
          } else {
            s0[h] = SignedByte(scales0, 2 * group + h);
            s1[h] = SignedByte(scales1, 2 * group + h);
          }
        }
#pragma unroll
        for (int c = 0; c < kTiles; ++c) {
          const uint2 quants = x.Quants(group, first + c, lane);
          MultiplyK16<Tile::kSigned>(product, a[i][0], a[i][1], quants.x);
          AddScaled<kOneColumn>(product, s0[0], s1[0], sums[c]);
          MultiplyK16<Tile::kSigned>(product, a[i][2], a[i][3], quants.y);
          AddScaled<kOneColumn>(product, s0[1], s1[1], sums[c]);
          if constexpr (kMinByProduct) {
            MultiplyK16<false>(product, m0[0], m1[0], quants.x);
            AddScaled<kOneColumn>(product, 1, 1, mins[c]);
            MultiplyK16<false>(product, m0[1], m1[1], quants.y);
            AddScaled<kOneColumn>(product, 1, 1, mins[c]);
          }
        }
      }
    }
  }
  const RowDeltas<Tile> deltas(tile, g);
#pragma unroll
  for (int c = 0; c < kTiles; ++c) {
#pragma unroll
    for (int j = 0; j < (kOneColumn ? 1 : 2); ++j) {
      const int column = x.Column(first + c, 2 * t + j);
      if constexpr (Tile::kHasMin && !kMinByProduct) {
        const uint4 group_sums = x.Sums(column);
        mins[c][j] = MinimumSum(group_sums, scales0.z, scales0.w);
        mins[c][2 + j] = MinimumSum(group_sums, scales1.z, scales1.w);
      }
      const float scale = x.scales[column];
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const int i = 2 * row + j;
        float value = __fmul_rn(deltas.delta[row], static_cast<float>(sums[c][i]));
        if constexpr (Tile::kHasMin) {
          value = __fmaf_rn(-deltas.delta_min[row], static_cast<float>(mins[c][i]), value);
        }
        acc[first + c][i] = __fmaf_rn(scale, value, acc[first + c][i]);
      }
    }
  }
}

// Types with a delta for every 32 columns.
template <typename Tile, int kColumns>
__device__ inline void AddFloatScaled(const uint8_t* tile,
                                      const SuperblockActivations<Tile, kColumns>& x, int lane,
                                      float (*acc)[4]) {
  using Block = SuperblockActivations<Tile, kColumns>;
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    uint32_t a[2][4];
    ReadPair<Tile>(tile, p, lane, a);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int group = 2 * p + i;
      const auto halves =
          *reinterpret_cast<const uint32_t*>(tile + Tile::kDeltas + (group * 8 + g) * 4);
      const float delta[2] = {HalfBitsToFloat(halves & 0xffff) * (1 / Tile::kLowFactor),
                              HalfBitsToFloat(halves >> 16) * (1 / Tile::kHighFactor)};
      float delta_min[2] = {};
      if constexpr (Tile::kHasMin) {
        const auto min_halves =
            *reinterpret_cast<const uint32_t*>(tile + Tile::kDeltaMins + (group * 8 + g) * 4);
        delta_min[0] = HalfBitsToFloat(min_halves & 0xffff);
        delta_min[1] = HalfBitsToFloat(min_halves >> 16);
      }
#pragma unroll
      for (int c = 0; c < Block::kColumnTiles; ++c) {
        int product[4];
        MultiplyK32<Tile::kSigned>(product, a[i], x.Quants(group, c, lane));
#pragma unroll
        for (int j = 0; j < (kColumns == 1 ? 1 : 2); ++j) {
          const int column = x.Column(c, 2 * t + j);
          const float scale = x.scales[group * Block::kScaleStride + column];
          float sum = 0;
          if constexpr (Tile::kHasMin) {
            sum = static_cast<float>(reinterpret_cast<const int16_t*>(x.sums + column * 16)[group]);
          }
#pragma unroll
          for (int row = 0; row < 2; ++row) {
            float& value = acc[c][2 * row + j];
            value = __fmaf_rn(static_cast<float>(product[2 * row + j]),
                              __fmul_rn(delta[row], scale), value);
            if constexpr (Tile::kHasMin) {
              value = __fmaf_rn(-__fmul_rn(delta_min[row], scale), sum, value);
            }
          }
        }
      }
    }
  }
}

// acc[c][i] += the superblock's part, in the order of quant_matmul.h.
template <typename Tile, int kColumns>
__device__ inline void AddSuperblock(const uint8_t* tile,
                                     const SuperblockActivations<Tile, kColumns>& x, int lane,
                                     float (*acc)[4]) {
  constexpr int kColumnTiles = SuperblockActivations<Tile, kColumns>::kColumnTiles;
  if constexpr (Tile::kFloatScales) {
    AddFloatScaled<Tile, kColumns>(tile, x, lane, acc);
  } else {
    constexpr int kTiles = kColumnTiles < 4 ? kColumnTiles : 4;  // what registers hold at once
#pragma unroll
    for (int first = 0; first < kColumnTiles; first += kTiles) {
      AddIntegerScaled<Tile, kColumns, kTiles>(tile, x, lane, first, acc);
    }
  }
}

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_SUPERBLOCK_SUM_CUH_
