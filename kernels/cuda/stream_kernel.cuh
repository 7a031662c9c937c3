// Products for 1 to 8 rows of activations at the speed of the weights' stream. The 8 warps of a
// team take one split of k each, of the same 16 output rows, every tile fetched ahead into a ring
// of the warp's own, so that no barrier stands in the stream; partial sums meet in shared memory
// once per 16 output rows. The activations of all of k lie in shared memory.
#ifndef STAGECOACH_KERNELS_CUDA_STREAM_KERNEL_CUH_
#define STAGECOACH_KERNELS_CUDA_STREAM_KERNEL_CUH_

#include "kernels/cuda/matmul_parameters.cuh"
#include "kernels/cuda/superblock_sum.cuh"

namespace stagecoach::cuda {

inline constexpr int kTeamThreads = kSplits * 32;
inline constexpr int kMaxTeams = 2;  // of a block

// Shared memory of a block, in order: rings, partial sums, activations.
template <typename Tile, int kColumns>
struct StreamLayout {
  using Block = SuperblockActivations<Tile, kColumns>;
  // Tiles of a warp's ring, some 5 KB: all but one are under way, 40 KB from the 16 warps of a
  // multiprocessor together. More bought nothing.
  static constexpr int kStages = Tile::kBytes > 1900 ? 2 : Tile::kBytes > 1600 ? 3 : 4;
  static constexpr int kRingBytes = kStages * Tile::kBytes;  // of a warp
  static constexpr int kPartials = kSplits * kTileRows * kColumns;
  static constexpr int kTeamBytes = kSplits * kRingBytes + 2 * kPartials * 4;
  static constexpr int kSuperblockBytes =
      Block::kQuantBytes + Block::kSumBytes + Block::kScaleBytes;

  static constexpr size_t SharedBytes(int teams, int superblocks) {
    return static_cast<size_t>(teams) * kTeamBytes +
           static_cast<size_t>(superblocks) * kSuperblockBytes;
  }
};

// Copies the activations of all superblocks to shared memory, those of a superblock together.
// Complete after WaitCopies<0>() and a barrier.
template <typename Tile, int kColumns>
__device__ inline void FetchActivations(const MatmulParameters& p, uint8_t* shared) {
  using Layout = StreamLayout<Tile, kColumns>;
  using Block = typename Layout::Block;
  const int chunks = p.superblocks * 16;  // of 16 bytes, in a row of quants
  const int rows = p.quant_rows < kColumns ? p.quant_rows : kColumns;
  const int thread = threadIdx.x, threads = blockDim.x;
  // Every block begins elsewhere, or all would ask the same slice of the cache at the same time.
  const int turn = static_cast<int>(blockIdx.x) % p.superblocks * 16;
  for (int row = 0; row < rows; ++row) {
    const int8_t* quants = p.quants + static_cast<size_t>(row) * chunks * 16;
    for (int j = thread; j < chunks; j += threads) {
      const int i = j + turn < chunks ? j + turn : j + turn - chunks;
      const int superblock = i / 16, group = i / 2 % 8, half = i % 2;
      CopyAsync16(shared + superblock * Layout::kSuperblockBytes + (group * kColumns + row) * 32 +
                      half * 16,
                  quants + i * 16);
    }
    const int16_t* sums = p.sums + static_cast<size_t>(row) * p.superblocks * 8;
    for (int i = thread; i < p.superblocks; i += threads) {
      CopyAsync16(shared + i * Layout::kSuperblockBytes + Block::kQuantBytes + row * 16,
                  sums + i * 8);
    }
  }
  constexpr int kScaleChunks = Block::kScaleStride / 4;
  for (int i = thread; i < p.superblocks * Block::kScaleBlocks * kScaleChunks; i += threads) {
    const int block = i / kScaleChunks, chunk = i % kScaleChunks;
    if (chunk * 4 >= p.scale_stride) continue;
    CopyAsync16(shared + block / Block::kScaleBlocks * Layout::kSuperblockBytes +
                    Block::kQuantBytes + Block::kSumBytes +
                    (block % Block::kScaleBlocks * Block::kScaleStride + chunk * 4) * 4,
                p.scales + static_cast<size_t>(block) * p.scale_stride + chunk * 4);
  }
  CommitCopies();
}

// The walk of one warp over its tiles, ahead of the products.
template <typename Tile, int kStages>
class TileFetcher {
 public:
  __device__ TileFetcher(const MatmulParameters& p, uint8_t* ring, int lane, int tile_row,
                         int tile_row_step, int first, int last)
      : p_(p),
        ring_(ring),
        lane_(lane),
        tile_row_(tile_row),
        step_(tile_row_step),
        first_(first),
        last_(last),
        superblock_(first) {
    if (first_ == last_) tile_row_ = p_.tile_rows;  // nothing to fetch, ever
    Locate();
  }

  // Begins the copy of the next tile, if there is one, as a group of copies of its own.
  __device__ void Fetch() {
    if (tile_row_ < p_.tile_rows) {
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
    if (tile_row_ >= p_.tile_rows) return;
    source_ = TileRow<Tile>(p_, tile_row_) + static_cast<size_t>(first_) * Tile::kBytes;
  }

  const MatmulParameters& p_;
  uint8_t* ring_;
  const uint8_t* source_ = nullptr;
  int lane_, tile_row_, step_, first_, last_, superblock_;
  int stage_ = 0;
};

// kColumns: 1, 2 or 8, at least p.quant_rows. Blocks of 1 or kMaxTeams teams, any number of them.
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
  const int step = gridDim.x * teams;
  int tile_row = blockIdx.x * teams + team;
  TileFetcher<Tile, Layout::kStages> fetcher(p, ring, lane, tile_row, step, first, last);
#pragma unroll
  for (int i = 0; i < Layout::kStages; ++i) fetcher.Fetch();
  LetNextKernelStart();
  WaitForPreviousKernel();
  FetchActivations<Tile, kColumns>(p, activations);
  WaitCopies<0>();
  __syncthreads();

  int stage = 0, half = 0;
  for (; tile_row < p.tile_rows; tile_row += step) {
    float acc[1][4] = {};
    for (int s = first; s < last; ++s) {
      WaitCopies<Layout::kStages - 1>();
      __syncwarp();
      const uint8_t* block = activations + s * Layout::kSuperblockBytes;
      const Block x = {
          block, block + Block::kQuantBytes,
          reinterpret_cast<const float*>(block + Block::kQuantBytes + Block::kSumBytes)};
      AddSuperblock<Tile, kColumns>(ring + stage * Tile::kBytes, x, lane, acc);
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
      if (column < kColumns) own[column * kTileRows + g + i / 2 * 8] = acc[0][i];
    }
    if (team == 0) {
      NamedBarrier<1>(kTeamThreads);
    } else {
      NamedBarrier<2>(kTeamThreads);
    }
    const int index = threadIdx.x % kTeamThreads;
    if (index < kTileRows * kColumns) {
      float value = 0, rest = 0;
      for (int j = 0; j < kSplits; ++j) {
        value = __fadd_rn(value, partials[j * kTileRows * kColumns + index]);
      }
      if (p.precise && index < kTileRows * (kColumns - 1)) {
        for (int j = 0; j < kSplits; ++j) {
          rest = __fadd_rn(rest, partials[j * kTileRows * kColumns + index + kTileRows]);
        }
      }
      StoreResult(p, tile_row, index % kTileRows, index / kTileRows, value, rest);
    }
  }
}

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_STREAM_KERNEL_CUH_
