// Products for more rows of activations than the stream kernel takes. A block computes 16 output
// rows per warp for kColumns rows of activations, superblock after superblock through a ring of
// stages. Either it walks all of k, or (kSplitK) it takes two splits of k, and the 8 blocks of a
// cluster add their partial sums up through each other's shared memory: where there are too few
// blocks otherwise. Both add in the same order.
#ifndef STAGECOACH_KERNELS_CUDA_TILE_KERNEL_CUH_
#define STAGECOACH_KERNELS_CUDA_TILE_KERNEL_CUH_

#include "kernels/cuda/matmul_parameters.cuh"
#include "kernels/cuda/superblock_product.cuh"

namespace stagecoach::cuda {

inline constexpr int kCluster = 8;  // blocks, with kSplitK
inline constexpr int kBlockSplits = kSplits / kCluster;
static_assert(kBlockSplits == 2);

template <typename Tile, int kColumns, bool kSplitK>
struct TileLayout {
  // Blocks of 64 columns are large, so that each superblock of activations serves many rows.
  static constexpr int kWarps = kColumns == 64 && !kSplitK ? 16 : 8;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kBlockRows = kWarps * kTileRows;  // output rows of a block
  static constexpr int kWeightBytes = kWarps * Tile::kBytes;
  static constexpr int kStageBytes = kWeightBytes + SuperblockActivations<kColumns>::kBytes;
  static constexpr int kHalfBytes = 113 * 1024;  // of two blocks on a multiprocessor
  static constexpr int kBlocks = kWarps == 16 || 2 * kStageBytes > kHalfBytes ? 1 : 2;
  static constexpr int kMostBytes = kBlocks == 1 ? 227 * 1024 : kHalfBytes;
  static constexpr int kFitting = kMostBytes / kStageBytes;
  static constexpr int kStages = kFitting > 4 ? 4 : kFitting;
  static_assert(kStages >= 2);
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kSumsBytes = kSplitK ? kBlockSplits * kColumns * kBlockRows * 4 : 0;
  static constexpr int kSharedBytes = kRingBytes > kSumsBytes ? kRingBytes : kSumsBytes;
};

// Begins the copy of one superblock's activations for rows [first_row, first_row + kColumns);
// columns beyond the last row repeat it.
template <int kColumns, int kThreads>
__device__ inline void FetchActivationStage(const MatmulParameters& p, int first_row,
                                            int superblock, uint8_t* stage) {
  constexpr int kChunks = kColumns * kTileColumns / 8;  // of 16 bytes
#pragma unroll
  for (int i = 0; i < kChunks / kThreads; ++i) {
    // 8 neighbouring threads write 2 columns of a group: no two of them the same banks.
    const int chunk = i * kThreads + static_cast<int>(threadIdx.x);
    const int part = chunk % 4, group = chunk / 8 % kGroups,
              column = chunk / 64 * 2 + chunk / 4 % 2;
    const int row = min(first_row + column, p.rows - 1);
    CopyAsync16(stage + SuperblockActivations<kColumns>::Place(group, column, part),
                p.x + (static_cast<size_t>(row) * p.superblocks + superblock) * kTileColumns +
                    group * 32 + part * 8);
  }
}

// Adds the partial sums of the cluster's blocks up, [2 splits][kColumns][kBlockRows] in each, and
// stores them; a block does its share of the columns.
template <typename Tile, int kColumns>
__device__ inline void StoreClusterSums(const MatmulParameters& p, int first_tile_row,
                                        int first_row, const float* partials) {
  using Layout = TileLayout<Tile, kColumns, true>;
  constexpr int kShare = kColumns / kCluster, kRows = Layout::kBlockRows;
  const int first_column = static_cast<int>(ClusterRank()) * kShare;
  for (int i = threadIdx.x; i < kShare * kRows; i += Layout::kThreads) {
    const int column = first_column + i / kRows, row = i % kRows;
    float value = 0;
#pragma unroll
    for (int j = 0; j < kSplits; ++j) {
      const float* partial = partials + (j % kBlockSplits * kColumns + column) * kRows + row;
      value = __fadd_rn(value, LoadFromCluster(partial, j / kBlockSplits));
    }
    const int tile_row = first_tile_row + row / kTileRows;
    if (tile_row < p.tile_rows) {
      StoreResult<Tile>(p, tile_row, row % kTileRows, first_row + column, value);
    }
  }
}

// kColumns: 8, 16, 32 or 64. Grid: x = groups of kColumns rows of activations (times kCluster, in
// clusters of that size), y = groups of kBlockRows output rows.
template <typename Tile, int kColumns, bool kSplitK>
__global__ void __launch_bounds__(TileLayout<Tile, kColumns, kSplitK>::kThreads,
                                  TileLayout<Tile, kColumns, kSplitK>::kBlocks)
    TileKernel(const __grid_constant__ MatmulParameters p) {
  using Layout = TileLayout<Tile, kColumns, kSplitK>;
  constexpr int kColumnTiles = kColumns / 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int first_tile_row = static_cast<int>(blockIdx.y) * Layout::kWarps;
  const int tile_row = first_tile_row + warp;
  const int first_row = static_cast<int>(blockIdx.x) / (kSplitK ? kCluster : 1) * kColumns;
  const int first_split = kSplitK ? static_cast<int>(ClusterRank()) * kBlockSplits : 0;
  const int end_split = kSplitK ? first_split + kBlockSplits : kSplits;
  const int first = SplitBegin(first_split, p.superblocks);
  const int last = SplitBegin(end_split, p.superblocks);
  const bool has_weights = tile_row < p.tile_rows;
  const uint8_t* weights = has_weights ? TileRow<Tile>(p, tile_row) : nullptr;
  uint8_t* shared = SharedMemory();

  const auto stage_of = [&](int s) {
    return shared + (s - first) % Layout::kStages * Layout::kStageBytes;
  };
  const auto fetch_weights = [&](int s) {
    if (s >= last || !has_weights) return;
    uint8_t* target = stage_of(s) + warp * Tile::kBytes;
    const uint8_t* source = weights + static_cast<size_t>(s) * Tile::kBytes;
#pragma unroll
    for (int i = 0; i < (Tile::kBytes + 511) / 512; ++i) {
      const int offset = i * 512 + lane * 16;
      if (offset < Tile::kBytes) CopyAsync16(target + offset, source + offset);
    }
  };
  const auto fetch_activations = [&](int s) {
    if (s >= last) return;
    FetchActivationStage<kColumns, Layout::kThreads>(p, first_row, s,
                                                     stage_of(s) + Layout::kWeightBytes);
  };

#pragma unroll 1
  for (int i = 0; i < Layout::kStages - 1; ++i) fetch_weights(first + i);
  LetNextKernelStart();
  WaitForPreviousKernel();
#pragma unroll 1
  for (int i = 0; i < Layout::kStages - 1; ++i) {
    fetch_activations(first + i);
    CommitCopies();
  }

  float acc[kColumnTiles][4] = {};     // of the split at hand
  float totals[kColumnTiles][4] = {};  // of those before it
  int split_end = SplitBegin(first_split + 1, p.superblocks), split = first_split;
#pragma unroll 1
  for (int s = first; s < last; ++s) {
    WaitCopies<Layout::kStages - 2>();
    __syncthreads();  // stage s is complete, and nobody reads the one before it any more
    fetch_weights(s + Layout::kStages - 1);
    fetch_activations(s + Layout::kStages - 1);
    CommitCopies();
    if (s == split_end) {
#pragma unroll
      for (int j = 0; j < kColumnTiles * 4; ++j) {
        totals[j / 4][j % 4] = __fadd_rn(totals[j / 4][j % 4], acc[j / 4][j % 4]);
        acc[j / 4][j % 4] = 0;
      }
      while (split_end <= s) split_end = SplitBegin(++split + 1, p.superblocks);
    }
    if (has_weights) {
      const uint8_t* stage = stage_of(s);
      AddSuperblock<Tile, kColumns>(stage + warp * Tile::kBytes, stage + Layout::kWeightBytes, lane,
                                    acc);
    }
  }

  if constexpr (kSplitK) {
    WaitCopies<0>();
    __syncthreads();  // the stages are free
    // If one of the two splits is empty, it does not matter which one.
    auto* partials = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int j = 0; j < kColumnTiles * 4; ++j) {
      const int c = j / 4, i = j % 4;
      float* partial = partials + (c * 8 + 2 * t + i % 2) * Layout::kBlockRows + warp * kTileRows +
                       g + i / 2 * 8;
      partial[0] = totals[c][i];
      partial[kColumns * Layout::kBlockRows] = acc[c][i];
    }
    ClusterBarrier();
    StoreClusterSums<Tile, kColumns>(p, first_tile_row, first_row, partials);
    ClusterBarrier();  // nobody leaves while others read its sums
  } else if (has_weights) {
#pragma unroll
    for (int j = 0; j < kColumnTiles * 4; ++j) {
      const int c = j / 4, i = j % 4;
      StoreResult<Tile>(p, tile_row, g + i / 2 * 8, first_row + c * 8 + 2 * t + i % 2,
                        __fadd_rn(totals[c][i], acc[c][i]));
    }
  }
}

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_TILE_KERNEL_CUH_
