// Products for more rows of activations than the stream kernel takes. A block computes 16 output
// rows per warp for kColumns rows of activations, superblock after superblock through a ring of
// stages. Either it walks all of k, or (kSplitK) it takes two splits of k, and the 8 blocks of a
// cluster add their partial sums up through each other's shared memory: where there are too few
// blocks otherwise. Both add in the same order.
#ifndef STAGECOACH_KERNELS_CUDA_TILE_KERNEL_CUH_
#define STAGECOACH_KERNELS_CUDA_TILE_KERNEL_CUH_

#include "kernels/cuda/launch.cuh"
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
  static constexpr int kStageBytes = kWeightBytes + ActivationBlockBytes(kColumns);
  static constexpr int kHalfBytes = 113 * 1024;  // of two blocks on a multiprocessor
  static constexpr int kBlocks = kWarps == 16 || 2 * kStageBytes > kHalfBytes - 64 ? 1 : 2;
  static constexpr int kMostBytes = kBlocks == 1 ? kMostSharedBytes : kHalfBytes;
  static constexpr int kFitting = (kMostBytes - 64) / kStageBytes;
  static constexpr int kStages = kFitting > 4 ? 4 : kFitting;
  static_assert(kStages >= 2);
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kSumsBytes = kSplitK ? kBlockSplits * kColumns * kBlockRows * 4 : 0;
  // Copy barriers, [kStages], lie behind the ring.
  static constexpr int kSharedBytes =
      kRingBytes + kStages * 8 > kSumsBytes ? kRingBytes + kStages * 8 : kSumsBytes;
};

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

  auto* barriers = reinterpret_cast<uint64_t*>(shared + Layout::kRingBytes);
  if (threadIdx.x < Layout::kStages) InitCopyBarrier(barriers + threadIdx.x);
  __syncthreads();
  // Superblock s is the i-th of this block, in stage i % kStages.
  const auto fetch_weights = [&](int s, int stage) {
    if (s >= last || !has_weights || lane != 0) return;
    CopyBulk(shared + stage * Layout::kStageBytes + warp * Tile::kBytes,
             weights + static_cast<size_t>(s) * Tile::kBytes, Tile::kBytes, barriers + stage);
  };
  // Columns beyond the last row get what lies behind it; nobody reads what becomes of them.
  const auto fetch_activations = [&](int s, int stage) {
    if (s >= last || warp != 0) return;
    if (lane == 0) {
      const int tiles = min(Layout::kWarps, p.tile_rows - first_tile_row);
      ExpectCopies(barriers + stage, tiles * Tile::kBytes + ActivationBlockBytes(kColumns));
    }
    if (lane < kGroups) {
      CopyBulk(shared + stage * Layout::kStageBytes + Layout::kWeightBytes + lane * kColumns * 64,
               p.x + (static_cast<size_t>(s * kGroups + lane) * p.rows + first_row) * 64,
               kColumns * 64, barriers + stage);
    }
  };

#pragma unroll 1
  for (int i = 0; i < Layout::kStages; ++i) fetch_weights(first + i, i);
  LetNextKernelStart();
  WaitForPreviousKernel();
#pragma unroll 1
  for (int i = 0; i < Layout::kStages; ++i) fetch_activations(first + i, i);

  float acc[kColumnTiles][4] = {};     // of the split at hand
  float totals[kColumnTiles][4] = {};  // of those before it
  int split_end = SplitBegin(first_split + 1, p.superblocks), split = first_split;
  int stage = 0;
  uint32_t phase = 0;
#pragma unroll 1
  for (int s = first; s < last; ++s) {
    AwaitCopy(barriers + stage, phase);
    if (s == split_end) {
#pragma unroll
      for (int j = 0; j < kColumnTiles * 4; ++j) {
        totals[j / 4][j % 4] = __fadd_rn(totals[j / 4][j % 4], acc[j / 4][j % 4]);
        acc[j / 4][j % 4] = 0;
      }
      while (split_end <= s) split_end = SplitBegin(++split + 1, p.superblocks);
    }
    if (has_weights) {
      const uint8_t* own = shared + stage * Layout::kStageBytes;
      const SuperblockActivations x = {own + Layout::kWeightBytes, kColumns};
      AddSuperblock<Tile, kColumns>(own + warp * Tile::kBytes, x, lane, acc);
    }
    __syncthreads();  // nobody reads the stage any more
    fetch_activations(s + Layout::kStages, stage);
    fetch_weights(s + Layout::kStages, stage);
    if (++stage == Layout::kStages) {
      stage = 0;
      phase ^= 1;
    }
  }

  if constexpr (kSplitK) {
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
