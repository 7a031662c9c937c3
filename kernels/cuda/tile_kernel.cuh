// Products for more rows of activations, or longer ones, than the stream kernel takes. A block
// computes 16 output rows per warp for kColumns rows of activations, superblock after superblock
// through a ring of stages. Either it walks all of k, or (kSplitK) it takes two splits of k, and
// the 8 blocks of a cluster add their partial sums up through each other's shared memory: where
// there are too few blocks otherwise. Both add in the same order.
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
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * 32;
  // Blocks of 64 columns are large, so that activations that are read serve many rows, if two
  // stages of them fit.
  static constexpr int kTwoTilesBytes = 2 * kWarps * Tile::kBytes + ActivationBlockBytes(64);
  static constexpr int kWarpTiles =
      kColumns == 64 && !kSplitK && 2 * kTwoTilesBytes < kMostSharedBytes - 64 ? 2 : 1;
  static constexpr int kBlockTiles = kWarps * kWarpTiles;
  static constexpr int kBlockRows = kBlockTiles * kTileRows;  // output rows of a block
  static constexpr int kWeightBytes = kBlockTiles * Tile::kBytes;
  static constexpr int kStageBytes = kWeightBytes + ActivationBlockBytes(kColumns);
  static constexpr int kHalfBytes = 113 * 1024;  // of two blocks on a multiprocessor
  static constexpr int kBlocks = kWarpTiles == 2 || 2 * kStageBytes > kHalfBytes - 64 ? 1 : 2;
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
  constexpr int kOutputs = kColumns / Tile::kParts, kRows = Layout::kBlockRows;
  constexpr int kShare = (kOutputs + kCluster - 1) / kCluster;
  const int first_output = static_cast<int>(ClusterRank()) * kShare;
  for (int i = threadIdx.x; i < kShare * kRows; i += Layout::kThreads) {
    const int output = first_output + i / kRows, row = i % kRows;
    if (output >= kOutputs) break;
    float parts[2] = {};
#pragma unroll
    for (int j = 0; j < kSplits; ++j) {
#pragma unroll
      for (int part = 0; part < Tile::kParts; ++part) {
        const int column = output * Tile::kParts + part;
        const float* partial = partials + (j % kBlockSplits * kColumns + column) * kRows + row;
        parts[part] = __fadd_rn(parts[part], LoadFromCluster(partial, j / kBlockSplits));
      }
    }
    const int tile_row = first_tile_row + row / kTileRows;
    if (tile_row < p.tile_rows) {
      ResultPlace::Of<Tile>(p, tile_row, row % kTileRows, first_row / Tile::kParts + output)
          .Store(ResultOf<Tile>(JoinParts<Tile>(parts[0], parts[1])));
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
  constexpr int kTiles = Layout::kWarpTiles;
  const int first_tile_row = static_cast<int>(blockIdx.y) * Layout::kBlockTiles;
  const int tile_row = first_tile_row + warp * kTiles;
  const int first_row = static_cast<int>(blockIdx.x) / (kSplitK ? kCluster : 1) * kColumns;
  const int first_split = kSplitK ? static_cast<int>(ClusterRank()) * kBlockSplits : 0;
  const int end_split = kSplitK ? first_split + kBlockSplits : kSplits;
  const int first = SplitBegin(first_split, p.superblocks);
  const int last = SplitBegin(end_split, p.superblocks);
  // What there are no weights for becomes anything; nobody stores it.
  const bool has_weights = tile_row < p.tile_rows;
  const bool fetches = lane < kTiles && tile_row + lane < p.tile_rows;  // the row of its number
  const uint8_t* weights = fetches ? TileRow<Tile>(p, tile_row + lane) : nullptr;
  uint8_t* shared = SharedMemory();

  auto* barriers = reinterpret_cast<uint64_t*>(shared + Layout::kRingBytes);
  if (threadIdx.x < Layout::kStages) InitCopyBarrier(barriers + threadIdx.x);
  __syncthreads();
  // Superblock s is the i-th of this block, in stage i % kStages.
  const auto fetch_weights = [&](int s, int stage) {
    if (s >= last || !fetches) return;
    CopyBulk(shared + stage * Layout::kStageBytes + (warp * kTiles + lane) * Tile::kBytes,
             weights + static_cast<size_t>(s) * Tile::kBytes, Tile::kBytes, barriers + stage);
  };
  // Columns beyond the last row get what lies behind it; nobody reads what becomes of them.
  const auto fetch_activations = [&](int s, int stage) {
    if (s >= last || warp != 0) return;
    uint8_t* to = shared + stage * Layout::kStageBytes + Layout::kWeightBytes;
    if (lane == 0) {
      const int tiles = min(Layout::kBlockTiles, p.tile_rows - first_tile_row);
      ExpectCopies(barriers + stage, tiles * Tile::kBytes + ActivationBlockBytes(kColumns));
    }
    if (lane < kGroups) {
      CopyBulk(to + lane * kColumns * 64,
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

  float acc[kTiles][kColumnTiles][4] = {};     // of the split at hand
  float totals[kTiles][kColumnTiles][4] = {};  // of those before it
  int split_end = SplitBegin(first_split + 1, p.superblocks), split = first_split;
  int stage = 0;
  uint32_t phase = 0;
#pragma unroll 1
  for (int s = first; s < last; ++s) {
    AwaitPhase(barriers + stage, phase);
    if (s == split_end) {
#pragma unroll
      for (int j = 0; j < kTiles * kColumnTiles * 4; ++j) {
        float& total = totals[j / 4 / kColumnTiles][j / 4 % kColumnTiles][j % 4];
        float& sum = acc[j / 4 / kColumnTiles][j / 4 % kColumnTiles][j % 4];
        total = __fadd_rn(total, sum);
        sum = 0;
      }
      while (split_end <= s) split_end = SplitBegin(++split + 1, p.superblocks);
    }
    if (has_weights) {
      const uint8_t* own = shared + stage * Layout::kStageBytes;
      const SuperblockActivations<true> x = {own + Layout::kWeightBytes, kColumns};
      LoadedTile<Tile> tiles[kTiles];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        tiles[n] = LoadedTile<Tile>(own + (warp * kTiles + n) * Tile::kBytes, lane);
      }
      AddSuperblock<Tile, kColumns>(tiles, x, lane, acc);
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
      partial[0] = totals[0][c][i];
      partial[kColumns * Layout::kBlockRows] = acc[0][c][i];
    }
    ClusterBarrier();
    StoreClusterSums<Tile, kColumns>(p, first_tile_row, first_row, partials);
    ClusterBarrier();  // nobody leaves while others read its sums
  } else {
#pragma unroll
    for (int j = 0; j < kTiles * kColumnTiles * 4; ++j) {
      const int n = j / 4 / kColumnTiles, c = j / 4 % kColumnTiles, i = j % 4;
      if (tile_row + n >= p.tile_rows || i % Tile::kParts != 0) continue;
      // The parts of a row are neighbouring columns, of the same lane.
      const int last = i + Tile::kParts - 1;
      ResultPlace::Of<Tile>(p, tile_row + n, g + i / 2 * 8,
                            (first_row + c * 8 + 2 * t + i % 2) / Tile::kParts)
          .Store(ResultOf<Tile>(JoinParts<Tile>(__fadd_rn(totals[n][c][i], acc[n][c][i]),
                                                __fadd_rn(totals[n][c][last], acc[n][c][last]))));
    }
  }
}

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_TILE_KERNEL_CUH_
