// Products for 1 to 8 rows of activations at the speed of the weights' stream. A block has an even
// share of the rows of tiles. The 16 warps of a team take one split of k each, of the same 16
// output rows, every tile fetched ahead into a ring of the warp's own, so that no barrier stands in
// the stream; partial sums meet in shared memory once per 16 output rows. The activations of all of
// k lie in shared memory.
#ifndef STAGECOACH_KERNELS_CUDA_STREAM_KERNEL_CUH_
#define STAGECOACH_KERNELS_CUDA_STREAM_KERNEL_CUH_

#include "kernels/cuda/matmul_parameters.cuh"
#include "kernels/cuda/superblock_product.cuh"

namespace stagecoach::cuda {

inline constexpr int kTeamThreads = kSplits * 32;
inline constexpr int kMaxTeams = 2;  // of a block

// Shared memory of a block, in order: rings, partial sums, activations.
template <typename Tile, int kColumns>
struct StreamLayout {
  using Block = SuperblockActivations<kColumns>;
  // Tiles of a warp's ring. What is on its way to a multiprocessor must cover the way's latency,
  // and what its first fetches bring should last while the activations are awaited.
  static constexpr int kRoomForRing = (kColumns < 4 ? 160 : 80) * 1024 / (kMaxTeams * kSplits);
  static constexpr int kFitting = kRoomForRing / Tile::kBytes;
  static constexpr int kStages = kFitting < 2 ? 2 : kFitting > 4 ? 4 : kFitting;
  static constexpr int kRingBytes = kStages * Tile::kBytes;  // of a warp
  static constexpr int kPartials = kSplits * kTileRows * kColumns;
  static constexpr int kTeamBytes = kSplits * kRingBytes + 2 * kPartials * 4;

  static constexpr size_t SharedBytes(int teams, int superblocks) {
    return static_cast<size_t>(teams) * kTeamBytes +
           static_cast<size_t>(superblocks) * Block::kBytes;
  }
};

// Copies the activations of all superblocks to shared memory, those of a superblock together.
// Complete after WaitCopies<0>() and a barrier.
template <int kColumns>
__device__ inline void FetchActivations(const MatmulParameters& p, uint8_t* shared) {
  using Block = SuperblockActivations<kColumns>;
  const int chunks = p.superblocks * kTileColumns / 8;  // of 16 bytes, in a row
  // Every block begins elsewhere, or all would ask the same slice of the cache at the same time.
  const int turn = static_cast<int>(blockIdx.x) % p.superblocks * (kTileColumns / 8);
  for (int row = 0; row < p.rows; ++row) {
    const auto* x = reinterpret_cast<const uint8_t*>(p.x) + static_cast<size_t>(row) * chunks * 16;
    for (int j = threadIdx.x; j < chunks; j += blockDim.x) {
      const int i = j + turn < chunks ? j + turn : j + turn - chunks;
      const int superblock = i / 32, group = i / 4 % kGroups, part = i % 4;
      CopyAsync16(shared + superblock * Block::kBytes + Block::Place(group, row, part), x + i * 16);
    }
  }
  CommitCopies();
}

// The walk of one warp over its tiles, ahead of the products.
template <typename Tile, int kStages>
class TileFetcher {
 public:
  // Superblocks [first, last) of every `step`-th row of tiles from `tile_row` to before `end`.
  __device__ TileFetcher(const MatmulParameters& p, uint8_t* ring, int lane, int tile_row, int end,
                         int step, int first, int last)
      : p_(p),
        ring_(ring),
        lane_(lane),
        tile_row_(tile_row),
        end_(end),
        step_(step),
        first_(first),
        last_(last),
        superblock_(first) {
    if (first_ == last_) tile_row_ = end_;  // nothing to fetch, ever
    Locate();
  }

  // Begins the copy of the next tile, if there is one, as a group of copies of its own.
  __device__ void Fetch() {
    if (tile_row_ < end_) {
      uint8_t* target = ring_ + stage_ * Tile::kBytes;
#pragma unroll
      for (int i = 0; i < (Tile::kBytes + 511) / 512; ++i) {
        const int offset = i * 512 + lane_ * 16;
        if (offset < Tile::kBytes) CopyAsync16(target + offset, source_ + offset);
      }
      source_ += Tile::kBytes;
      if (++superblock_ == last_) {
        superblock_ = first_;
        tile_row_ += step_;
        Locate();
      }
      if (++stage_ == kStages) stage_ = 0;
    }
    CommitCopies();
  }

 private:
  __device__ void Locate() {
    if (tile_row_ >= end_) return;
    source_ = TileRow<Tile>(p_, tile_row_) + static_cast<size_t>(first_) * Tile::kBytes;
  }

  const MatmulParameters& p_;
  uint8_t* ring_;
  const uint8_t* source_ = nullptr;
  int lane_, tile_row_, end_, step_, first_, last_, superblock_;
  int stage_ = 0;
};

// kColumns: 1, 2, 4 or 8, at least p.rows. Blocks of 1 or kMaxTeams teams, any number of them.
template <typename Tile, int kColumns>
__global__ void __launch_bounds__(kMaxTeams* kTeamThreads, 1)
    StreamKernel(const __grid_constant__ MatmulParameters p) {
  using Layout = StreamLayout<Tile, kColumns>;
  using Block = typename Layout::Block;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int team = threadIdx.x / kTeamThreads, split = threadIdx.x / 32 % kSplits;
  const int teams = blockDim.x / kTeamThreads;
  uint8_t* shared = SharedMemory();
  uint8_t* ring = shared + (team * kSplits + split) * Layout::kRingBytes;
  auto* both_partials = reinterpret_cast<float*>(shared + teams * kSplits * Layout::kRingBytes) +
                        team * 2 * Layout::kPartials;
  uint8_t* activations = shared + teams * Layout::kTeamBytes;

  const int first = SplitBegin(split, p.superblocks), last = SplitBegin(split + 1, p.superblocks);
  const int block = static_cast<int>(blockIdx.x);
  const int begin = block * p.block_rows + min(block, p.longer_blocks);
  const int end = begin + p.block_rows + (block < p.longer_blocks ? 1 : 0);
  int tile_row = begin + team;
  TileFetcher<Tile, Layout::kStages> fetcher(p, ring, lane, tile_row, end, teams, first, last);
#pragma unroll 1
  for (int i = 0; i < Layout::kStages; ++i) fetcher.Fetch();
  LetNextKernelStart();
  WaitForPreviousKernel();
  FetchActivations<kColumns>(p, activations);
  WaitCopies<0>();
  __syncthreads();

  int stage = 0, half = 0;
  for (; tile_row < end; tile_row += teams) {
    if (tile_row + teams >= end) PrefetchNext(p.next, lane);  // all of this product is on its way
    float acc[1][1][4] = {};
#pragma unroll 1
    for (int s = first; s < last; ++s) {
      WaitCopies<Layout::kStages - 1>();
      __syncwarp();
      const uint8_t* const tiles[1] = {ring + stage * Tile::kBytes};
      AddSuperblock<Tile, kColumns, 1>(tiles, activations + s * Block::kBytes, lane, acc);
      __syncwarp();     // all lanes are done with the tile
      fetcher.Fetch();  // in its place
      if (++stage == Layout::kStages) stage = 0;
    }
    // While some warps still add up one half, others may write the other; none is two ahead.
    float* partials = both_partials + half * Layout::kPartials;
    half = 1 - half;
    float* own = partials + split * kTileRows * kColumns;  // [column][16]
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = 2 * t + i % 2;
      if (column < kColumns) own[column * kTileRows + g + i / 2 * 8] = acc[0][0][i];
    }
    if (team == 0) {
      NamedBarrier<1>(kTeamThreads);
    } else {
      NamedBarrier<2>(kTeamThreads);
    }
    const int index = threadIdx.x % kTeamThreads;
    if (index < kTileRows * kColumns) {
      float value = 0;
#pragma unroll
      for (int j = 0; j < kSplits; ++j) {
        value = __fadd_rn(value, partials[j * kTileRows * kColumns + index]);
      }
      StoreResult(p, tile_row, index % kTileRows, index / kTileRows, value);
    }
  }
}

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_STREAM_KERNEL_CUH_
