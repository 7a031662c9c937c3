// Products for 9 rows of activations or more. A block computes 128 output rows (16 per warp) for
// kColumns rows of activations, superblock after superblock through a ring of stages. Either it
// walks all of k, or (kSplitK) it takes one split of k, and the 8 blocks of a cluster add their
// partial sums up through each other's shared memory: for few rows, where there are too few blocks
// otherwise. Both add in the same order.
#ifndef STAGECOACH_KERNELS_CUDA_TILE_KERNEL_CUH_
#define STAGECOACH_KERNELS_CUDA_TILE_KERNEL_CUH_

#include "kernels/cuda/matmul_parameters.cuh"
#include "kernels/cuda/superblock_sum.cuh"

namespace stagecoach::cuda {

inline constexpr int kTileWarps = 8;
inline constexpr int kTileThreads = kTileWarps * 32;
inline constexpr int kBlockRows = kTileWarps * kTileRows;  // output rows of a block

template <typename Tile, int kColumns, bool kSplitK>
struct TileLayout {
  using Block = SuperblockActivations<Tile, kColumns>;
  static constexpr int kMostBytes = 113 * 1024;  // of two blocks on a multiprocessor
  static constexpr int kWeightBytes = kTileWarps * Tile::kBytes;
  static constexpr int kStageBytes =
      kWeightBytes + Block::kQuantBytes + Block::kSumBytes + Block::kScaleBytes;
  static constexpr int kSumsBytes = kColumns * kBlockRows * 4;  // a float per result
  // Sums of finished splits, where registers are short and shared memory is not.
  static constexpr bool kSharedTotals =
      !kSplitK && kColumns == 64 && 2 * kStageBytes + kSumsBytes <= kMostBytes;
  static constexpr int kStages = kSharedTotals || 3 * kStageBytes > kMostBytes ? 2 : 3;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kSharedBytes = kSharedTotals             ? kRingBytes + kSumsBytes
                                      : kRingBytes > kSumsBytes ? kRingBytes
                                                                : kSumsBytes;
};

// The sums of the splits before the one at hand, a thread's own: [column tile][4].
template <int kColumnTiles, bool kShared>
class Totals {
 public:
  __device__ explicit Totals(uint8_t* shared)
      : shared_(reinterpret_cast<float*>(shared) + threadIdx.x) {
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) At(c, i) = 0;
    }
  }
  __device__ float& At(int c, int i) {
    if constexpr (kShared) {
      return shared_[(c * 4 + i) * kTileThreads];
    } else {
      return registers_[c][i];
    }
  }

 private:
  float* shared_;
  float registers_[kShared ? 1 : kColumnTiles][4];
};

// Begins the copy of one superblock's activations for rows [first_row, first_row + kColumns);
// columns beyond the last row repeat it.
template <typename Tile, int kColumns>
__device__ inline void FetchActivationStage(const MatmulParameters& p, int first_row,
                                            int superblock, uint8_t* stage) {
  using Block = SuperblockActivations<Tile, kColumns>;
  const int last_row = p.quant_rows - 1;
  const int thread = threadIdx.x;
#pragma unroll
  for (int i = 0; i < kColumns * 16 / kTileThreads; ++i) {
    // 8 neighbouring threads write 4 columns of a group: no two of them the same banks.
    const int chunk = i * kTileThreads + thread;
    const int half = chunk % 2, group = chunk / 8 % 8, column = chunk / 64 * 4 + chunk / 2 % 4;
    const int row = min(first_row + column, last_row);
    CopyAsync16(stage + (group * kColumns + column) * 32 + half * 16,
                p.quants + static_cast<size_t>(row) * p.superblocks * kTileColumns +
                    superblock * kTileColumns + group * 32 + half * 16);
  }
  if (thread < kColumns) {
    const int row = min(first_row + thread, last_row);
    CopyAsync16(stage + Block::kQuantBytes + thread * 16,
                p.sums + (static_cast<size_t>(row) * p.superblocks + superblock) * 8);
  }
  constexpr int kScaleChunks = Block::kScaleBlocks * kColumns / 4;
  static_assert(kScaleChunks <= kTileThreads);
  if (thread < kScaleChunks) {
    const int block = thread / (kColumns / 4), chunk = thread % (kColumns / 4);
    if (first_row + chunk * 4 < p.scale_stride) {
      CopyAsync16(
          stage + Block::kQuantBytes + Block::kSumBytes + thread * 16,
          p.scales +
              static_cast<size_t>(superblock * Block::kScaleBlocks + block) * p.scale_stride +
              first_row + chunk * 4);
    }
  }
}

// Adds the partial sums of the cluster's blocks up, [kColumns][kBlockRows] in each, and stores
// them; a block does its share of the columns.
template <int kColumns>
__device__ inline void StoreClusterSums(const MatmulParameters& p, int first_tile_row,
                                        int first_row, const float* partials) {
  constexpr int kShare = kColumns / kSplits;
  static_assert(kShare % 2 == 0);  // a precise row's two columns stay together
  const int first_column = static_cast<int>(ClusterRank()) * kShare;
  for (int i = threadIdx.x; i < kShare * kBlockRows; i += kTileThreads) {
    const int column = first_column + i / kBlockRows, row = i % kBlockRows;
    float value = 0, rest = 0;
#pragma unroll
    for (int j = 0; j < kSplits; ++j) {
      value = __fadd_rn(value, LoadFromCluster(partials + column * kBlockRows + row, j));
    }
    if (p.precise && column % 2 == 0) {
#pragma unroll
      for (int j = 0; j < kSplits; ++j) {
        rest = __fadd_rn(rest, LoadFromCluster(partials + (column + 1) * kBlockRows + row, j));
      }
    }
    const int tile_row = first_tile_row + row / kTileRows;
    if (tile_row >= p.tile_rows) continue;
    StoreResult(p, tile_row, row % kTileRows, first_row + column, value, rest);
  }
}

// Grid: x = blocks of kColumns rows (times kSplits, in clusters of that, if kSplitK),
// y = blocks of kBlockRows output rows. kTileThreads threads.
template <typename Tile, int kColumns, bool kSplitK>
__global__ void __launch_bounds__(kTileThreads, 2)
    TileKernel(const __grid_constant__ MatmulParameters p) {
  using Layout = TileLayout<Tile, kColumns, kSplitK>;
  using Block = typename Layout::Block;
  constexpr int kColumnTiles = Block::kColumnTiles;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
  const int first_tile_row = blockIdx.y * kTileWarps, tile_row = first_tile_row + warp;
  const int first_row = static_cast<int>(blockIdx.x) / (kSplitK ? kSplits : 1) * kColumns;
  const int split = kSplitK ? static_cast<int>(ClusterRank()) : 0;
  const int first = kSplitK ? SplitBegin(split, p.superblocks) : 0;
  const int last = kSplitK ? SplitBegin(split + 1, p.superblocks) : p.superblocks;
  const bool has_weights = tile_row < p.tile_rows;
  const uint8_t* weights = has_weights ? TileRow<Tile>(p, tile_row) : nullptr;
  uint8_t* shared = SharedMemory();

  const auto fetch_weights = [&](int s) {
    if (s >= last || !has_weights) return;
    uint8_t* target =
        shared + (s - first) % Layout::kStages * Layout::kStageBytes + warp * Tile::kBytes;
    const uint8_t* source = weights + static_cast<size_t>(s) * Tile::kBytes;
    for (int offset = lane * 16; offset < Tile::kBytes; offset += 512) {
      CopyAsync16(target + offset, source + offset);
    }
  };
  const auto fetch_activations = [&](int s) {
    if (s >= last) return;
    uint8_t* stage = shared + (s - first) % Layout::kStages * Layout::kStageBytes;
    FetchActivationStage<Tile, kColumns>(p, first_row, s, stage + Layout::kWeightBytes);
  };

  for (int i = 0; i < Layout::kStages - 1; ++i) fetch_weights(first + i);
  LetNextKernelStart();
  WaitForPreviousKernel();
  for (int i = 0; i < Layout::kStages - 1; ++i) {
    fetch_activations(first + i);
    CommitCopies();
  }

  float acc[kColumnTiles][4] = {};  // of this split
  Totals<kColumnTiles, Layout::kSharedTotals> totals(shared + Layout::kRingBytes);
  int next_split = 1;
  for (int s = first; s < last; ++s) {
    WaitCopies<Layout::kStages - 2>();
    __syncthreads();  // stage s is complete, and nobody reads the one before it any more
    fetch_weights(s + Layout::kStages - 1);
    fetch_activations(s + Layout::kStages - 1);
    CommitCopies();
    const uint8_t* stage = shared + (s - first) % Layout::kStages * Layout::kStageBytes;
    const uint8_t* block = stage + Layout::kWeightBytes;
    const Block x = {block, block + Block::kQuantBytes,
                     reinterpret_cast<const float*>(block + Block::kQuantBytes + Block::kSumBytes)};
    if (has_weights) AddSuperblock<Tile, kColumns>(stage + warp * Tile::kBytes, x, lane, acc);
    if constexpr (!kSplitK) {
      while (SplitBegin(next_split, p.superblocks) <= s) ++next_split;
      if (SplitBegin(next_split, p.superblocks) == s + 1) {
#pragma unroll
        for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            totals.At(c, i) = __fadd_rn(totals.At(c, i), acc[c][i]);
            acc[c][i] = 0;
          }
        }
      }
    }
  }

  if constexpr (kSplitK) {
    WaitCopies<0>();
    __syncthreads();  // the stages are free
    auto* partials = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        partials[(c * 8 + 2 * t + i % 2) * kBlockRows + warp * kTileRows + g + i / 2 * 8] =
            acc[c][i];
      }
    }
    ClusterBarrier();
    StoreClusterSums<kColumns>(p, first_tile_row, first_row, partials);
    ClusterBarrier();  // nobody leaves while others read its sums
  } else if (has_weights) {
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        StoreResult(p, tile_row, g + i / 2 * 8, first_row + c * 8 + 2 * t + i % 2, totals.At(c, i),
                    i % 2 == 0 ? totals.At(c, i + 1) : 0.0f);
      }
    }
  }
}

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_TILE_KERNEL_CUH_
