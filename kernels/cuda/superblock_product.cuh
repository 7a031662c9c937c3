// The arithmetic of one tile of weights and up to 64 columns of activations: the same code, hence
// the same bits, in every kernel.
#ifndef STAGECOACH_KERNELS_CUDA_SUPERBLOCK_PRODUCT_CUH_
#define STAGECOACH_KERNELS_CUDA_SUPERBLOCK_PRODUCT_CUH_

#include <cstdint>

#include "kernels/cuda/device_ops.cuh"
#include "kernels/cuda/tile_decode.cuh"

namespace stagecoach::cuda {

// Activations of one superblock in shared memory: halves [kGroups][rows][32], `rows` of them the
// columns of the products.
struct SuperblockActivations {
  const uint8_t* halves;
  int rows;

  // The lane's 8 halves of column tile c. Lanes beyond the rows repeat the last; nobody reads what
  // they compute.
  __device__ uint4 Halves(int group, int c, int lane) const {
    const int g = lane / 4;
    const int row = min(c * 8 + g, rows - 1);
    return *reinterpret_cast<const uint4*>(halves + (group * rows + row) * 64 + lane % 4 * 16);
  }
};

// acc[n][c] += tile n * column tile c of the activations. acc[n][c][i]: rows g (i < 2) and g + 8 of
// the tile, columns 2t + i % 2.
template <typename Tile, int kColumns, int kTiles>
__device__ inline void AddSuperblock(const uint8_t* const (&tiles)[kTiles],
                                     const SuperblockActivations& x, int lane,
                                     float (&acc)[kTiles][(kColumns + 7) / 8][4]) {
  TileScales<Tile> scales[kTiles];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) scales[n] = TileScales<Tile>(tiles[n], lane);
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    PairScales pair_scales[kTiles];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) pair_scales[n] = scales[n].Pair(p);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      GroupWeights weights[kTiles];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const TilePair<Tile> pair(tiles[n], p, lane);  // read once for both i
        weights[n] = DecodeGroup<Tile>(pair, pair_scales[n], i);
      }
#pragma unroll
      for (int c = 0; c < (kColumns + 7) / 8; ++c) {
        const uint4 halves = x.Halves(2 * p + i, c, lane);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          const uint32_t(&w)[2][4] = weights[n].bits;
          MultiplyAdd(acc[n][c], w[0][0], w[1][0], w[0][1], w[1][1], halves.x, halves.y);
          MultiplyAdd(acc[n][c], w[0][2], w[1][2], w[0][3], w[1][3], halves.z, halves.w);
        }
      }
    }
  }
}

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_SUPERBLOCK_PRODUCT_CUH_
