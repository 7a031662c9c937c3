// The arithmetic of some tiles of weights and up to 16 columns of activations, by products of a
// warp.
#ifndef STAGECOACH_KERNELS_CUDA_SUPERBLOCK_PRODUCT_CUH_
#define STAGECOACH_KERNELS_CUDA_SUPERBLOCK_PRODUCT_CUH_

#include <cstdint>

#include "kernels/cuda/device_ops.cuh"
#include "kernels/cuda/tile_decode.cuh"

namespace stagecoach::cuda {

// Activations of one superblock: halves [kGroups][rows][32], `rows` of them the columns of the
// products. kDirect: read as they lie, in shared memory or, by the plain set, in device memory;
// otherwise in device memory past the first-level cache, for the kernel that wrote them may have
// overlapped this one.
template <bool kDirect>
struct SuperblockActivations {
  const uint8_t* halves;
  int rows;

  // The lane's 8 halves of column tile c. Lanes beyond the rows repeat the last; nobody reads what
  // they compute.
  __device__ uint4 Halves(int group, int c, int lane) const {
    const int row = min(c * 8 + lane / 4, rows - 1);
    const auto* own =
        reinterpret_cast<const uint4*>(halves + (group * rows + row) * 64 + lane % 4 * 16);
    return kDirect ? *own : __ldcg(own);
  }
};

// acc[n][c] += tile n * column tile c of the activations. acc[n][c][i]: rows g (i < 2) and g + 8 of
// the tile, columns 2t + i % 2.
template <typename Tile, int kColumns, int kTiles, int kSums, typename ActivationsOfOne>
__device__ inline void AddSuperblock(const LoadedTile<Tile> (&tiles)[kTiles],
                                     const ActivationsOfOne& x, int lane,
                                     float (&acc)[kSums][(kColumns + 7) / 8][4]) {
  static_assert(kTiles <= kSums);
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    PairScales scales[kTiles];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) scales[n] = tiles[n].scales.Pair(p);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      GroupWeights weights[kTiles];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        weights[n] = DecodeGroup<Tile>(tiles[n].pairs[p], scales[n], i);
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
