// What the matmul kernels share: their parameters, the split of k, and how results are stored.
#ifndef STAGECOACH_KERNELS_CUDA_MATMUL_PARAMETERS_CUH_
#define STAGECOACH_KERNELS_CUDA_MATMUL_PARAMETERS_CUH_

#include <cuda_runtime.h>

#include <cstdint>
#include <span>

#include "kernels/cuda/device_ops.cuh"
#include "kernels/cuda/quant_matmul.h"
#include "kernels/cuda/tile_format.cuh"

namespace stagecoach::cuda {

inline constexpr int kSplits = 16;  // of k; fixes the order of sums, so it is part of the contract

// The first superblock of a split.
__host__ __device__ inline int SplitBegin(int split, int superblocks) {
  return split * superblocks / kSplits;
}

// Memory that the next product will read: of each range, warp w of block b fetches `chunk` bytes
// from b * stride + w * chunk on. Multiples of 16.
struct NextWeights {
  struct Range {
    const uint8_t* data;
    uint32_t stride;
    uint32_t chunk;
  };
  Range ranges[kMaxMatmulTerms];
  int count;
};

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
  int tile_rows;    // of all terms
  int superblocks;  // per row
  int rows;
  const uint8_t* x;                             // halves [superblocks * 8][rows][32]
  std::span<const PackedMatrix> next_matrices;  // for the launcher
  // What launchers add.
  NextWeights next;
  int block_rows;     // tile rows of a block,
  int longer_blocks;  // the first of which have one more
  int stages;         // tiles in the ring of a warp
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

// Begins to fetch this block's share of the next product's weights into the second-level cache, so
// that device memory does not idle between the two. Each warp calls it once.
__device__ inline void PrefetchNext(const NextWeights& next, int lane) {
  if (lane != 0) return;
  const uint32_t warp = threadIdx.x / 32;
#pragma unroll 1
  for (int i = 0; i < next.count; ++i) {
    const NextWeights::Range& range = next.ranges[i];
    PrefetchToCache(range.data + size_t{range.stride} * blockIdx.x + range.chunk * warp,
                    range.chunk);
  }
}

// Rows outside the matrix and the activations are left out.
template <typename Tile>
__device__ inline void StoreResult(const MatmulParameters& p, int tile_row, int row_in_tile,
                                   int row, float value) {
  if (row >= p.rows) return;
  const MatmulParameters::Term& term = p.TermOf(tile_row);
  const int n = (tile_row - term.first_tile_row) * kTileRows + row_in_tile;
  if (n >= term.n) return;
  value = __fmul_rn(value, 1 / (kActivationScale * Tile::kWeightScale));
  if (term.bias != nullptr) value = __fadd_rn(value, __ldcg(term.bias + n));
  float* y = term.y + static_cast<size_t>(row) * term.y_stride + n;
  if (term.accumulate) value = __fadd_rn(__ldcg(y), value);
  *y = value;
}

// `matrices` for blocks of `warps` warps, `blocks` of them: their first part, evenly over the
// blocks.
NextWeights MakeNextWeights(std::span<const PackedMatrix> matrices, int blocks, int warps);

// What launchers must know of the current device.
struct DeviceLimits {
  int multiprocessors = 0;
  size_t shared_bytes = 0;  // that a block may have
  bool clusters = false;
};

// Chooses a kernel for one type; defined and instantiated for each in quant_matmul_*.cu.
// p.terms are of `type`.
template <TensorType type>
cudaError_t LaunchTypedMatmul(const MatmulParameters& p, const DeviceLimits& device,
                              cudaStream_t stream);

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_MATMUL_PARAMETERS_CUH_
