// Products of the plain set of kernels (kernel_set.h) for 1 to 16 rows of activations: no bulk
// copies, no overlap of kernels, little shared memory. A block has an even share of the rows of
// tiles and takes one of them at a time, a pass. Each of its warps has a split of k, and reads its
// tiles from device memory straight into registers, the next one while it multiplies. Sums are
// added in the order of the other kernels (quant_matmul.h), so the bits are theirs.
#ifndef STAGECOACH_KERNELS_CUDA_PLAIN_KERNEL_CUH_
#define STAGECOACH_KERNELS_CUDA_PLAIN_KERNEL_CUH_

#include "kernels/cuda/activation_ops.cuh"
#include "kernels/cuda/matmul_parameters.cuh"
#include "kernels/cuda/superblock_product.cuh"

namespace stagecoach::cuda {

// columns: 8 or 16, for up to as many rows of halves.
template <typename Tile, int columns>
struct PlainLayout {
  static constexpr int kColumns = columns;
  static constexpr int kThreads = kSplits * 32;              // a warp for each split of k
  static constexpr bool kReadsAhead = Tile::kBytes <= 5000;  // there are registers for another tile
  // Partial sums [kSplits][kColumns][kColumnStride], of two passes in turn.
  static constexpr int kColumnStride = kTileRows + 4;  // 4: other banks
  static constexpr int kPartials = kSplits * kColumns * kColumnStride;
  static constexpr size_t kSharedBytes = sizeof(float) * 2 * kPartials;
  static_assert(kSharedBytes <= kMostPlainSharedBytes);
};

// One warp's tiles: of each row of tiles superblocks [first, last).
template <typename Tile>
class PlainStream {
 public:
  __device__ PlainStream(const MatmulParameters& p, const BlockRows& rows, int first, int last)
      : p_(p), rows_(rows), first_(first), last_(last), superblock_(last - 1) {}

  // The next one; after the last one nothing.
  __device__ void Read(LoadedTile<Tile>& tile) {
    if (++superblock_ == last_) {
      if (next_row_ == rows_.count) return;
      source_ = p_.TileRow(rows_.Place(p_, next_row_++));
      superblock_ = first_;
    }
    tile = LoadedTile<Tile>(source_ + superblock_ * Tile::kBytes, threadIdx.x % 32);
  }

 private:
  const MatmulParameters& p_;
  const BlockRows& rows_;
  const uint8_t* source_ = nullptr;  // the row's
  int first_, last_;
  int superblock_;    // the last one read
  int next_row_ = 0;  // of the block
};

// Adds up the partial sums of a pass and stores the results.
template <typename Tile, int kColumns>
__device__ inline void StorePlainPass(const MatmulParameters& p, const BlockRows& rows, int pass,
                                      const float* partials) {
  using Layout = PlainLayout<Tile, kColumns>;
  const int shift = rows.gated ? 3 : 4;  // of the tile's rows half are gate, half up; or none
  const int row = threadIdx.x & ((1 << shift) - 1), column = threadIdx.x >> shift;
  static_assert(kColumns * kTileRows <= Layout::kThreads);
  if (column >= p.rows / Tile::kParts) return;
  const float* const own = partials + column * Tile::kParts * Layout::kColumnStride + row;
  const float result = ResultOf<Tile>(SumOfSplits<Tile, Layout>(own));
  if (rows.gated) {
    const float up = ResultOf<Tile>(SumOfSplits<Tile, Layout>(own + kTileRows / 2));
    const int k = (rows.begin + pass) * (kTileRows / 2) + row;
    p.gated.halves[p.gated.NarrowPlace(column, k)] = ToHalfActivation(SiluTimes(result, up));
  } else {
    ResultPlace::Of<Tile>(p, rows.Place(p, pass), row, column).Store(result);
  }
}

// Grid: p.shares.
template <typename Tile, int kColumns>
__global__ void __launch_bounds__(PlainLayout<Tile, kColumns>::kThreads, 1)
    PlainKernel(const __grid_constant__ MatmulParameters p) {
  if (kBulkCode) return;  // not in that set
  using Layout = PlainLayout<Tile, kColumns>;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, split = threadIdx.x / 32;
  const int first = SplitBegin(split, p.superblocks), last = SplitBegin(split + 1, p.superblocks);
  const BlockRows rows(p, blockIdx.x);
  auto* const both_partials = reinterpret_cast<float*>(SharedMemory());
  PlainStream<Tile> stream(p, rows, first, last);
  LoadedTile<Tile> next;
  if (Layout::kReadsAhead && first < last) stream.Read(next);
#pragma unroll 1
  for (int pass = 0; pass < rows.count; ++pass) {
    float acc[1][kColumns / 8][4] = {};
#pragma unroll 1
    for (int s = first; s < last; ++s) {
      if (!Layout::kReadsAhead) stream.Read(next);
      const LoadedTile<Tile> tile[1] = {next};
      if (Layout::kReadsAhead) stream.Read(next);
      const SuperblockActivations<true> x = {p.x + s * ActivationBlockBytes(p.rows), p.rows};
      AddSuperblock<Tile, kColumns>(tile, x, lane, acc);
    }
    float* const partials = both_partials + pass % 2 * Layout::kPartials;
    float* const own = partials + split * kColumns * Layout::kColumnStride;
#pragma unroll
    for (int i = 0; i < kColumns / 8 * 4; ++i) {
      const int column = i / 4 * 8 + 2 * t + i % 2, row = g + i % 4 / 2 * 8;
      own[column * Layout::kColumnStride + row] = acc[0][i / 4][i % 4];
    }
    // When all are here, all have stored the pass before: its partials may be overwritten.
    __syncthreads();
    StorePlainPass<Tile, kColumns>(p, rows, pass, partials);
  }
}

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_PLAIN_KERNEL_CUH_
