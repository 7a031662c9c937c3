// How results of products for many rows are stored: of blocks of which each warp has a row of tiles
// and a block of rows of activations, as products of a warp hold them (device_ops.cuh).
#ifndef STAGECOACH_KERNELS_CUDA_TILE_RESULTS_CUH_
#define STAGECOACH_KERNELS_CUDA_TILE_RESULTS_CUH_

#include "kernels/cuda/activation_ops.cuh"
#include "kernels/cuda/matmul_parameters.cuh"

namespace stagecoach::cuda {

// What a block has of a product. Layout: kColumns, rows of activations; kBlockTiles, rows of tiles;
// kSplitK, whether four blocks have a quarter of k each. Grid: x = blocks of rows of activations
// (times kQuarters, with kSplitK), y = groups of rows of tiles.
template <typename Layout>
struct TileBlock {
  int row_block, row_blocks;
  int first_tile_row;
  int quarter;

  static __device__ TileBlock Own() {
    constexpr int kOfX = Layout::kSplitK ? kQuarters : 1;
    return {.row_block = static_cast<int>(blockIdx.x) / kOfX,
            .row_blocks = static_cast<int>(gridDim.x) / kOfX,
            .first_tile_row = static_cast<int>(blockIdx.y) * Layout::kBlockTiles,
            .quarter = static_cast<int>(blockIdx.x) % kOfX};
  }
  // Of the block's tiles. Of paired gate and up, of both in turn.
  __device__ int TileRowOf(const MatmulParameters& p, int tile) const {
    if (!p.is_gated) return first_tile_row + tile;
    return first_tile_row / 2 + tile / 2 + tile % 2 * p.first_tile_rows[1];
  }
};

// Where kCount of a thread's sums go, from the first-th on, and what is added to them. Made ahead
// of the sums' use: all of it is asked for before any is waited for.
template <typename Tile, typename Layout, int kCount>
class TileResults {
 public:
  __device__ TileResults(const MatmulParameters& p, const TileBlock<Layout>& block, int first) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % Layout::kBlockTiles;
    const int tile_row = block.first_tile_row + warp, index = p.TermOf(tile_row);
    const MatmulParameters::Term& term = p.terms[index];
    const int n = (tile_row - p.first_tile_rows[index]) * kTileRows + lane / 4;
    const int row = (block.row_block * Layout::kColumns + 2 * (lane % 4 + first)) / Tile::kParts;
    y_ = term.y + static_cast<size_t>(row) * term.y_stride + n;
    stride_ = term.y_stride;
    rows_ = p.rows / Tile::kParts - row;
    columns_ = term.n - n;  // none, past the last row of tiles
    if (term.accumulate) {
#pragma unroll
      for (int i = 0; i < kResults; ++i) {
        if (IsInside(i)) added_[i] = __ldcg(At(i));
      }
    }
    if (term.bias == nullptr) return;
    float bias[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) bias[i] = i * 8 < columns_ ? __ldcg(term.bias + n + i * 8) : 0;
#pragma unroll
    for (int i = 0; i < kResults; ++i) {
      const float of_column = bias[ColumnStep(i) / 8];
      added_[i] = term.accumulate ? __fadd_rn(of_column, added_[i]) : of_column;
    }
  }
  __device__ void Store(const float (&sums)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kResults; ++i) {
      const float sum = JoinParts<Tile>(sums[i * Tile::kParts], sums[(i + 1) * Tile::kParts - 1]);
      if (IsInside(i)) *At(i) = __fadd_rn(ResultOf<Tile>(sum), added_[i]);
    }
  }

 private:
  static constexpr int kResults = kCount / Tile::kParts;
  // From the first result to the i-th. The parts of a row are neighbouring sums.
  static __device__ constexpr int RowStep(int i) {
    const int sum = i * Tile::kParts;
    return (sum / 4 * 8 + sum % 2) / Tile::kParts;
  }
  static __device__ constexpr int ColumnStep(int i) { return i * Tile::kParts % 4 / 2 * 8; }
  __device__ bool IsInside(int i) const { return RowStep(i) < rows_ && ColumnStep(i) < columns_; }
  __device__ float* At(int i) const {
    return y_ + static_cast<ptrdiff_t>(RowStep(i)) * stride_ + ColumnStep(i);
  }

  float* y_;  // of the first result
  int stride_;
  int rows_, columns_;  // of the matrix, from the first result on
  float added_[kResults] = {};
};

// Instead of the sums of gate and up, rows g and g + 8 of the warp's tile: what SwiGLU makes of
// them.
template <typename Tile, typename Layout>
__device__ inline void StoreGated(const MatmulParameters& p, const TileBlock<Layout>& block,
                                  const float (&sums)[Layout::kColumns / 2]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const bool odd = g % 2 == 1;
  const int column = (block.first_tile_row + warp) * (kTileRows / 2) + g / 2 * 2;
#pragma unroll
  for (int c = 0; c < Layout::kColumns / 8; ++c) {
    float values[2];  // of rows 2t and 2t + 1 of the activations
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      values[i] = SiluTimes(ResultOf<Tile>(sums[4 * c + i]), ResultOf<Tile>(sums[4 * c + i + 2]));
    }
    // Lanes of neighbouring columns swap, so that each stores two neighbours of one row.
    const float swapped = __shfl_xor_sync(0xffffffff, odd ? values[0] : values[1], 4);
    const int row = block.row_block * Layout::kColumns + c * 8 + 2 * t + odd;
    if (row >= p.rows) continue;
    *reinterpret_cast<__half2*>(p.gated.halves + p.gated.HalfPlace(row, column)) =
        odd ? ToHalfActivations(swapped, values[1]) : ToHalfActivations(values[0], swapped);
  }
}

// Returns when all four blocks of the group have come here, and what they wrote before is visible.
// For kThreads threads of each block. Blocks start in the order of their numbers, and a group's are
// neighbours: of at most one group do some wait for others that have not started, and those start
// when blocks of other groups end.
template <int kThreads>
__device__ inline void AwaitGroup(unsigned* arrivals) {
  static_assert((kQuarters & (kQuarters - 1)) == 0);
  NamedBarrier(1, kThreads);
  if (threadIdx.x % kThreads == 0) {
    __threadfence();
    // Counts on from kernel to kernel, and from 0 again some day.
    const unsigned last = atomicAdd(arrivals, 1u) | (kQuarters - 1);
    while (static_cast<int>(*static_cast<volatile unsigned*>(arrivals) - last) <= 0) {
    }
    __threadfence();
  }
  NamedBarrier(1, kThreads);
}

// Adds up what the four blocks of a group have; each stores a fourth of a thread's results.
template <typename Tile, typename Layout>
__device__ inline void StoreQuarters(const MatmulParameters& p, const TileBlock<Layout>& block,
                                     const float (&sums)[Layout::kColumns / 2]) {
  constexpr int kSums = Layout::kColumns / 2, kShare = kSums / kQuarters;
  constexpr int kStoring = Layout::kStoring;
  const int group = static_cast<int>(blockIdx.y) * block.row_blocks + block.row_block;
  float* const partials = p.partials + static_cast<size_t>(group) * kQuarters * kSums * kStoring +
                          threadIdx.x % kStoring;
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    __stcg(partials + (block.quarter * kSums + i) * kStoring, sums[i]);
  }
  const int first = block.quarter * kShare;
  const TileResults<Tile, Layout, kShare> to(p, block, first);
  AwaitGroup<kStoring>(p.arrivals + group);
  float quarters[kShare][kQuarters], results[kShare];
#pragma unroll
  for (int i = 0; i < kShare * kQuarters; ++i) {
    const int quarter = i % kQuarters, place = quarter * kSums + first + i / kQuarters;
    quarters[i / kQuarters][quarter] = __ldcg(partials + place * kStoring);
  }
#pragma unroll
  for (int i = 0; i < kShare; ++i) results[i] = SumOfQuarters(quarters[i]);
  to.Store(results);
}

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_TILE_RESULTS_CUH_
