// Products for more rows of activations than the stream kernel takes. A block computes kTiles * 16
// output rows per warp for kColumns rows of activations, superblock after superblock through a ring
// of stages. Either it walks all of k, or (kSplitK) it takes two splits of k, and the 8 blocks of a
// cluster add their partial sums up through each other's shared memory: where there are too few
// blocks otherwise. Both add in the same order.
#ifndef STAGECOACH_KERNELS_CUDA_TILE_KERNEL_CUH_
#define STAGECOACH_KERNELS_CUDA_TILE_KERNEL_CUH_

#include "kernels/cuda/matmul_parameters.cuh"
#include "kernels/cuda/superblock_product.cuh"

namespace stagecoach::cuda {

inline constexpr int kTileWarps = 8;
inline constexpr int kTileThreads = kTileWarps * 32;
inline constexpr int kCluster = 8;  // blocks, with kSplitK
inline constexpr int kBlockSplits = kSplits / kCluster;
static_assert(kBlockSplits == 2);

template <typename Tile, int kColumns, bool kSplitK>
struct TileLayout {
  static constexpr bool kLarge = kColumns == 64 && !kSplitK;
  static constexpr int kTiles = kLarge ? 2 : 1;                       // of a warp
  static constexpr int kBlockRows = kTileWarps * kTiles * kTileRows;  // output rows of a block
  static constexpr int kWeightBytes = kTileWarps * kTiles * Tile::kBytes;
  static constexpr int kStageBytes = kWeightBytes + SuperblockActivations<kColumns>::kBytes;
  static constexpr int kHalfBytes = 113 * 1024;  // of two blocks on a multiprocessor
  static constexpr int kBlocks = kLarge || 2 * kStageBytes > kHalfBytes ? 1 : 2;
  static constexpr int kMostBytes = kBlocks == 1 ? 227 * 1024 : kHalfBytes;
  static constexpr int kFitting = kMostBytes / kStageBytes;
  static constexpr int kStages = kFitting > 4 ? 4 : kFitting;
  static_assert(kStages >= 2);
  static constexpr int kRingBytes = kStages * kStageBytes;
  // With kSplitK a float per result and split.
  static constexpr int kSumsBytes = kSplitK ? kBlockSplits * kColumns * kBlockRows * 4 : 0;
  static constexpr int kSharedBytes = kRingBytes > kSumsBytes ? kRingBytes : kSumsBytes;
};

// Begins the copy of one superblock's activations for rows [first_row, first_row + kColumns);
// columns beyond the last row repeat it.
template <int kColumns>
__device__ inline void FetchActivationStage(const MatmulParameters& p, int first_row,
                                            int superblock, uint8_t* stage) {
  constexpr int kChunks = kColumns * kTileColumns / 8;  // of 16 bytes
#pragma unroll
  for (int i = 0; i < kChunks / kTileThreads; ++i) {
    // 8 neighbouring threads write 2 columns of a group: no two of them the same banks.
    const int chunk = i * kTileThreads + static_cast<int>(threadIdx.x);
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
template <int kColumns, int kBlockRows>
__device__ inline void StoreClusterSums(const MatmulParameters& p, int first_tile_row,
                                        int first_row, const float* partials) {
  constexpr int kShare = kColumns / kCluster;
  const int first_column = static_cast<int>(ClusterRank()) * kShare;
  for (int i = threadIdx.x; i < kShare * kBlockRows; i += kTileThreads) {
    const int column = first_column + i / kBlockRows, row = i % kBlockRows;
    float value = 0;
#pragma unroll
    for (int j = 0; j < kSplits; ++j) {
      const float* partial = partials + (j % kBlockSplits * kColumns + column) * kBlockRows + row;
      value = __fadd_rn(value, LoadFromCluster(partial, j / kBlockSplits));
    }
    const int tile_row = first_tile_row + row / kTileRows;
    if (tile_row < p.tile_rows) {
      StoreResult(p, tile_row, row % kTileRows, first_row + column, value);
    }
  }
}

// kColumns: 8, 16, 32 or 64. Grid: x = groups of kColumns rows of activations (times kCluster, in
// clusters of that size), y = groups of kBlockRows output rows.
template <typename Tile, int kColumns, bool kSplitK>
__global__ void __launch_bounds__(kTileThreads, TileLayout<Tile, kColumns, kSplitK>::kBlocks)
    TileKernel(const __grid_constant__ MatmulParameters p) {
  using Layout = TileLayout<Tile, kColumns, kSplitK>;
  constexpr int kTiles = Layout::kTiles, kColumnTiles = kColumns / 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int first_tile_row = static_cast<int>(blockIdx.y) * kTileWarps * kTiles;
  const int tile_row = first_tile_row + warp * kTiles;
  const int first_row = static_cast<int>(blockIdx.x) / (kSplitK ? kCluster : 1) * kColumns;
  const int first_split = kSplitK ? static_cast<int>(ClusterRank()) * kBlockSplits : 0;
  const int end_split = kSplitK ? first_split + kBlockSplits : kSplits;
  const int first = SplitBegin(first_split, p.superblocks);
  const int last = SplitBegin(end_split, p.superblocks);
  uint8_t* shared = SharedMemory();

  // Rows of tiles beyond the last repeat it.
  const uint8_t* weights[kTiles];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    weights[i] = TileRow<Tile>(p, min(tile_row + i, p.tile_rows - 1));
  }
  const auto stage_of = [&](int s) {
    return shared + (s - first) % Layout::kStages * Layout::kStageBytes;
  };
  const auto fetch_weights = [&](int s) {
    if (s >= last) return;
    uint8_t* target = stage_of(s) + warp * kTiles * Tile::kBytes;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const uint8_t* source = weights[i] + static_cast<size_t>(s) * Tile::kBytes;
      for (int offset = lane * 16; offset < Tile::kBytes; offset += 512) {
        CopyAsync16(target + i * Tile::kBytes + offset, source + offset);
      }
    }
  };
  const auto fetch_activations = [&](int s) {
    if (s >= last) return;
    FetchActivationStage<kColumns>(p, first_row, s, stage_of(s) + Layout::kWeightBytes);
  };

  for (int i = 0; i < Layout::kStages - 1; ++i) fetch_weights(first + i);
  LetNextKernelStart();
  WaitForPreviousKernel();
  for (int i = 0; i < Layout::kStages - 1; ++i) {
    fetch_activations(first + i);
    CommitCopies();
  }

  float acc[kTiles][kColumnTiles][4] = {};     // of the split at hand
  float totals[kTiles][kColumnTiles][4] = {};  // of those before it; with kSplitK: of the first one
  const auto end_of_split = [&] {
#pragma unroll
    for (int j = 0; j < kTiles * kColumnTiles * 4; ++j) {
      float& sum = acc[j / 4 / kColumnTiles][j / 4 % kColumnTiles][j % 4];
      float& total = totals[j / 4 / kColumnTiles][j / 4 % kColumnTiles][j % 4];
      total = kSplitK ? sum : __fadd_rn(total, sum);
      sum = 0;
    }
  };
  int split = 0;
  for (int s = first; s < last; ++s) {
    WaitCopies<Layout::kStages - 2>();
    __syncthreads();  // stage s is complete, and nobody reads the one before it any more
    fetch_weights(s + Layout::kStages - 1);
    fetch_activations(s + Layout::kStages - 1);
    CommitCopies();
    if (kSplitK && s == SplitBegin(first_split + 1, p.superblocks)) end_of_split();
    const uint8_t* stage = stage_of(s);
    const uint8_t* tiles[kTiles];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) tiles[i] = stage + (warp * kTiles + i) * Tile::kBytes;
    AddSuperblock<Tile, kColumns, kTiles>(tiles, stage + Layout::kWeightBytes, lane, acc);
    if constexpr (!kSplitK) {
      while (SplitBegin(split + 1, p.superblocks) <= s) ++split;
      if (SplitBegin(split + 1, p.superblocks) == s + 1) end_of_split();
    }
  }

  if constexpr (kSplitK) {
    WaitCopies<0>();
    __syncthreads();  // the stages are free
    auto* partials = reinterpret_cast<float*>(shared);
    const bool second_is_empty = SplitBegin(first_split + 1, p.superblocks) == last;
    if (second_is_empty) end_of_split();
#pragma unroll
    for (int j = 0; j < kTiles * kColumnTiles * 4; ++j) {
      const int tile = j / 4 / kColumnTiles, c = j / 4 % kColumnTiles, i = j % 4;
      float* partial = partials + (c * 8 + 2 * t + i % 2) * Layout::kBlockRows +
                       (warp * kTiles + tile) * kTileRows + g + i / 2 * 8;
      partial[0] = totals[tile][c][i];
      partial[kColumns * Layout::kBlockRows] = acc[tile][c][i];
    }
    ClusterBarrier();
    StoreClusterSums<kColumns, Layout::kBlockRows>(p, first_tile_row, first_row, partials);
    ClusterBarrier();  // nobody leaves while others read its sums
  } else {
#pragma unroll
    for (int j = 0; j < kTiles * kColumnTiles * 4; ++j) {
      const int tile = j / 4 / kColumnTiles, c = j / 4 % kColumnTiles, i = j % 4;
      if (tile_row + tile >= p.tile_rows) continue;
      StoreResult(p, tile_row + tile, g + i / 2 * 8, first_row + c * 8 + 2 * t + i % 2,
                  totals[tile][c][i]);
    }
  }
}

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_TILE_KERNEL_CUH_
