// The arithmetic of one tile of weights and up to 64 columns of activations: the same code, hence
// the same bits, in every kernel.
#ifndef STAGECOACH_KERNELS_CUDA_SUPERBLOCK_PRODUCT_CUH_
#define STAGECOACH_KERNELS_CUDA_SUPERBLOCK_PRODUCT_CUH_

#include <cstdint>

#include "kernels/cuda/device_ops.cuh"
#include "kernels/cuda/tile_decode.cuh"

namespace stagecoach::cuda {

inline constexpr int kGroups = kTileColumns / 32;  // of 32 columns, in a superblock

// Activations of one superblock in shared memory, kColumns rows of x (columns of the products):
// halves [kGroups][kColumns][32].
template <int kColumns>
struct SuperblockActivations {
  static constexpr int kColumnTiles = kColumns < 8 ? 1 : kColumns / 8;
  static constexpr int kBytes = kColumns * kTileColumns * 2;

  // Where the 16 bytes `part` (0 .. 3) of a group's 32 halves begin.
  static __device__ int Place(int group, int column, int part) {
    return (group * kColumns + column) * 64 + part * 16;
  }
  // The lane's 8 halves of a column tile. With few columns the lanes beyond them repeat column 0;
  // nobody reads what they compute.
  static __device__ uint4 Halves(const uint8_t* block, int group, int column_tile, int lane) {
    const int g = lane / 4;
    const int column = kColumns >= 8 ? column_tile * 8 + g : g < kColumns ? g : 0;
    return *reinterpret_cast<const uint4*>(block + Place(group, column, lane % 4));
  }
};

// acc[c] += tile * column tile c of the activations. acc[c][i]: rows g (i < 2) and g + 8 of the
// tile, columns 2t + i % 2.
template <typename Tile, int kColumns>
__device__ inline void AddSuperblock(
    const uint8_t* tile, const uint8_t* block, int lane,
    float (&acc)[SuperblockActivations<kColumns>::kColumnTiles][4]) {
  using Block = SuperblockActivations<kColumns>;
  const TileScales<Tile> scales(tile, lane);
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const TilePair<Tile> pair(tile, p, lane);
    const PairScales pair_scales = scales.Pair(p);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const GroupWeights weights = DecodeGroup<Tile>(pair, pair_scales, i);
      const uint32_t(&w)[2][4] = weights.bits;
#pragma unroll
      for (int c = 0; c < Block::kColumnTiles; ++c) {
        const uint4 x = Block::Halves(block, 2 * p + i, c, lane);
        MultiplyAdd(acc[c], w[0][0], w[1][0], w[0][1], w[1][1], x.x, x.y);
        MultiplyAdd(acc[c], w[0][2], w[1][2], w[0][3], w[1][3], x.z, x.w);
      }
    }
  }
}

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_SUPERBLOCK_PRODUCT_CUH_
