// Products of the plain set of kernels (kernel_set.h) for more than 16 rows of activations. A warp
// has a row of tiles, which it reads from device memory into registers, the next tile while it
// multiplies; all of a block read the same activations in shared memory, one superblock while the
// next one is copied. A block walks all of k or (kSplitK), where there would be too few blocks, a
// quarter of it; then four blocks add their sums up. The order is that of the other kernels
// (quant_matmul.h), so the bits are theirs.
#ifndef STAGECOACH_KERNELS_CUDA_PLAIN_TILE_KERNEL_CUH_
#define STAGECOACH_KERNELS_CUDA_PLAIN_TILE_KERNEL_CUH_

#include "kernels/cuda/matmul_parameters.cuh"
#include "kernels/cuda/superblock_product.cuh"
#include "kernels/cuda/tile_results.cuh"

namespace stagecoach::cuda {

// columns: 32 or 64.
template <int columns, bool splits_k>
struct PlainTileLayout {
  static constexpr int kColumns = columns;
  static constexpr bool kSplitK = splits_k;
  static constexpr int kBlockTiles = 8;  // a warp each
  static constexpr int kThreads = kBlockTiles * 32, kStoring = kThreads;
  static constexpr int kActivationBytes = ActivationBlockBytes(kColumns);
  static constexpr size_t kSharedBytes = 2 * kActivationBytes;
  static_assert(kSharedBytes <= kMostPlainSharedBytes);
};

// Activations of one superblock as they are copied: halves [kGroups][4][kColumns][8].
template <int kColumns>
struct WideActivations {
  const uint8_t* halves;

  __device__ uint4 Halves(int group, int c, int lane) const {
    const int row = group * 4 * kColumns + c * 8 + lane / 4;
    const auto word = [&](int j) {
      return *reinterpret_cast<const uint32_t*>(halves + (row + j * kColumns) * 16 + lane % 4 * 4);
    };
    return {word(0), word(1), word(2), word(3)};
  }
};

// The sums of a thread: of the split at hand, of those before it in its quarter, of the quarters
// before that.
template <int kColumns>
struct PlainTileSums {
  static constexpr int kSums = kColumns / 2;
  float acc[1][kSums / 4][4] = {};
  float splits[kSums] = {}, quarters[kSums] = {};

  __device__ void EndSplit() {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      splits[i] = __fadd_rn(splits[i], acc[0][i / 4][i % 4]);
      acc[0][i / 4][i % 4] = 0;
    }
  }
  __device__ void EndQuarter() {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      quarters[i] = __fadd_rn(quarters[i], splits[i]);
      splits[i] = 0;
    }
  }
};

// Copies superblock s of the block's activations, zeros for rows that there are not; there when the
// thread has called AwaitCopies.
template <typename Layout>
__device__ inline void CopyActivations(const MatmulParameters& p, const TileBlock<Layout>& block,
                                       int s, uint8_t* to) {
  constexpr int kVector = 16;  // bytes, of one row
  static_assert(Layout::kThreads % Layout::kColumns == 0);
  const int row = static_cast<int>(threadIdx.x) % Layout::kColumns;
  const bool any = block.row_block * Layout::kColumns + row < p.rows;
  const size_t place = static_cast<size_t>(s) * block.row_blocks + block.row_block;
  const uint8_t* const from = p.x + place * Layout::kActivationBytes;
#pragma unroll
  for (int i = 0; i < Layout::kActivationBytes / kVector / Layout::kThreads; ++i) {
    const int at = (i * Layout::kThreads + static_cast<int>(threadIdx.x)) * kVector;
    CopyVector(to + at, from + at, any);
  }
}

// Grid: TileBlock.
template <typename Tile, int kColumns, bool kSplitK>
__global__ void __launch_bounds__(PlainTileLayout<kColumns, kSplitK>::kThreads, 1)
    PlainTileKernel(const __grid_constant__ MatmulParameters p) {
  if (kBulkCode) return;  // not in that set
  using Layout = PlainTileLayout<kColumns, kSplitK>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const TileBlock<Layout> block = TileBlock<Layout>::Own();
  // A warp beyond the last row of tiles multiplies that one, too; it stores nothing.
  const int row = min(warp, p.tile_rows - 1 - block.first_tile_row);
  const uint8_t* const tiles = p.TileRow(block.TileRowOf(p, row));
  int split = kSplitK ? block.quarter * kQuarterSplits : 0;
  const int first = SplitBegin(split, p.superblocks);
  const int last = SplitBegin(split + (kSplitK ? kQuarterSplits : kSplits), p.superblocks);
  int split_end = SplitBegin(split + 1, p.superblocks);
  uint8_t* const shared = SharedMemory();
  LoadedTile<Tile> next;
  const auto fetch = [&](int s) {
    if (s >= last) return;
    CopyActivations(p, block, s, shared + s % 2 * Layout::kActivationBytes);
    next = LoadedTile<Tile>(tiles + static_cast<size_t>(s) * Tile::kBytes, lane);
  };
  fetch(first);
  PlainTileSums<kColumns> sums;
#pragma unroll 1
  for (int s = first; s < last; ++s) {
    AwaitCopies();
    __syncthreads();
    const LoadedTile<Tile> tile[1] = {next};
    fetch(s + 1);          // over what all have read by now
    if (s == split_end) {  // a split begins; some may be empty
      const int ended = split;
      while (split_end <= s) split_end = SplitBegin(++split + 1, p.superblocks);
      sums.EndSplit();
      if (ended / kQuarterSplits != split / kQuarterSplits) sums.EndQuarter();
    }
    const WideActivations<kColumns> x = {shared + s % 2 * Layout::kActivationBytes};
    AddSuperblock<Tile, kColumns>(tile, x, lane, sums.acc);
  }
  sums.EndSplit();
  sums.EndQuarter();
  if constexpr (kSplitK) {
    StoreQuarters<Tile>(p, block, sums.quarters);
  } else if (p.is_gated) {
    StoreGated<Tile>(p, block, sums.quarters);
  } else {
    TileResults<Tile, Layout, kColumns / 2>(p, block, 0).Store(sums.quarters);
  }
}

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_PLAIN_TILE_KERNEL_CUH_
