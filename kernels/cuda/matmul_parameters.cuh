// What the matmul kernels share: their parameters, the split of k, and how results are stored.
#ifndef STAGECOACH_KERNELS_CUDA_MATMUL_PARAMETERS_CUH_
#define STAGECOACH_KERNELS_CUDA_MATMUL_PARAMETERS_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/device_ops.cuh"
#include "kernels/cuda/quant_matmul.h"
#include "kernels/cuda/tile_format.cuh"

namespace stagecoach::cuda {

inline constexpr int kSplits = 16;  // of k; fixes the order of sums, so it is part of the contract

// The first superblock of a split.
__host__ __device__ inline int SplitBegin(int split, int superblocks) {
  return split * superblocks / kSplits;
}

// Terms of one type over the same activations, by value in a kernel's parameters. Their tile rows
// are numbered through.
struct MatmulParameters {
  struct Term {
    const uint8_t* tiles;
    float* y;
    const float* bias;
    int y_stride;
    int n;
    int first_tile_row;
    bool accumulate;
  };
  Term terms[kMaxMatmulTerms];
  int term_count;
  int tile_rows;     // of all terms
  int superblocks;   // per row
  int rows;          // of halves
  const uint8_t* x;  // [superblocks * 8][rows][32]
  Fusion fusion;
  // What LaunchStream adds.
  int block_units;    // rows of tiles, or pairs of them, of a block,
  int longer_blocks;  // the first of which have one more
  int team_warps;     // which share the splits of a row of tiles evenly

  __device__ const Term& TermOf(int tile_row) const {
    int i = 0;
    while (i + 1 < term_count && tile_row >= terms[i + 1].first_tile_row) ++i;
    return terms[i];
  }
};

// The first tile of a row of tiles.
template <typename Tile>
__device__ inline const uint8_t* TileRow(const MatmulParameters& p, int tile_row) {
  const MatmulParameters::Term& term = p.TermOf(tile_row);
  return term.tiles +
         static_cast<size_t>(tile_row - term.first_tile_row) * p.superblocks * Tile::kBytes;
}

// What a sum of products stands for.
template <typename Tile>
__device__ inline float ResultOf(float sum) {
  return __fmul_rn(sum, 1 / (kActivationScale * Tile::kWeightScale));
}

// The sum of products of a row of activations, from those of its rows of halves.
template <typename Tile>
__device__ inline float JoinParts(float first, float rest) {
  return Tile::kParts == 1 ? first : __fmaf_rn(rest, kRestScale, first);
}

// row: of activations. Rows outside the matrix and the activations are left out.
template <typename Tile>
__device__ inline void StoreResult(const MatmulParameters& p, int tile_row, int row_in_tile,
                                   int row, float sum) {
  if (row >= p.rows / Tile::kParts) return;
  const MatmulParameters::Term& term = p.TermOf(tile_row);
  const int n = (tile_row - term.first_tile_row) * kTileRows + row_in_tile;
  if (n >= term.n) return;
  float value = ResultOf<Tile>(sum);
  if (term.bias != nullptr) value = __fadd_rn(value, __ldcg(term.bias + n));
  float* y = term.y + static_cast<size_t>(row) * term.y_stride + n;
  if (term.accumulate) value = __fadd_rn(__ldcg(y), value);
  *y = value;
}

// What launchers must know of the current device.
struct DeviceLimits {
  int multiprocessors = 0;
  size_t shared_bytes = 0;  // that a block may have
};

// Chooses a kernel for one type; defined and instantiated for each in quant_matmul_*.cu.
// p.terms are of `type`.
template <TensorType type>
cudaError_t LaunchTypedMatmul(const MatmulParameters& p, const DeviceLimits& device,
                              cudaStream_t stream);

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_MATMUL_PARAMETERS_CUH_
