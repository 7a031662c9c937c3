// Products for 1 to 16 rows of activations at the speed of the weights' stream. A block has an even
// share of the rows of tiles, and its teams take turns at them. The warps of a team share the
// splits of k of the same 16 output rows, every tile fetched ahead into a ring of the warp's own,
// so that no barrier stands in the stream; partial sums meet in shared memory once per 16 output
// rows. The activations of all of k lie in shared memory. What Fusion says happens here, too.
#ifndef STAGECOACH_KERNELS_CUDA_STREAM_KERNEL_CUH_
#define STAGECOACH_KERNELS_CUDA_STREAM_KERNEL_CUH_

#include "kernels/cuda/activation_ops.cuh"
#include "kernels/cuda/matmul_parameters.cuh"
#include "kernels/cuda/stream_layout.cuh"
#include "kernels/cuda/superblock_product.cuh"

namespace stagecoach::cuda {

// What one team works on at a time: one row of tiles, or (gated) the same row of gate and of up.
__device__ inline int TileRowOf(const MatmulParameters& p, int unit, int part, bool gated) {
  return gated ? p.terms[part].first_tile_row + unit : unit;
}

// The walk of one warp over its tiles, ahead of the products, and its ring.
template <typename Tile>
class TileRing {
 public:
  // Superblocks [first, last) of every `step`-th unit from `unit` to before `end`.
  // barriers: [kStages].
  __device__ TileRing(const MatmulParameters& p, uint8_t* ring, uint64_t* barriers, int lane,
                      int unit, int end, int step, int first, int last)
      : p_(p),
        ring_(ring),
        barriers_(barriers),
        leader_(lane == 0),
        gated_(p.fusion.gated.halves != nullptr),
        unit_(unit),
        end_(end),
        step_(step),
        first_(first),
        last_(last),
        superblock_(first) {
    if (first_ == last_) unit_ = end_;  // nothing to fetch, ever
    if (leader_) {
      for (int i = 0; i < kStages; ++i) InitCopyBarrier(barriers + i);
    }
    __syncwarp();
    Locate();
  }

  // Begins the copy of the next tile, if there is one, to stage `stage` of the ring.
  __device__ void Fetch(int stage) {
    if (unit_ >= end_) return;
    if (leader_) {
      ExpectCopies(barriers_ + stage, Tile::kBytes);
      CopyBulk(ring_ + stage * Tile::kBytes, source_, Tile::kBytes, barriers_ + stage);
    }
    source_ += Tile::kBytes;
    if (++superblock_ == last_) {
      superblock_ = first_;
      if (!gated_ || ++part_ == 2) {
        part_ = 0;
        unit_ += step_;
      }
      Locate();
    }
  }

  // The oldest tile, once it is there.
  __device__ const uint8_t* Front() const {
    AwaitCopy(barriers_ + stage_, phase_);
    return ring_ + stage_ * Tile::kBytes;
  }
  // Nobody needs the oldest tile any more: the next one is fetched in its place.
  __device__ void Pop() {
    __syncwarp();
    Fetch(stage_);
    if (++stage_ == kStages) {
      stage_ = 0;
      phase_ ^= 1;
    }
  }

 private:
  __device__ void Locate() {
    if (unit_ >= end_) return;
    const int tile_row = TileRowOf(p_, unit_, part_, gated_);
    source_ = TileRow<Tile>(p_, tile_row) + static_cast<size_t>(first_) * Tile::kBytes;
  }

  const MatmulParameters& p_;
  uint8_t* ring_;
  uint64_t* barriers_;
  const uint8_t* source_ = nullptr;
  bool leader_;
  const bool gated_;
  int unit_, end_, step_, first_, last_, superblock_;
  int part_ = 0;  // of the unit
  int stage_ = 0;
  uint32_t phase_ = 0;
};

// kColumns: 1, 2, 4, 8 or 16, at least p.rows. Any number of blocks, of whole teams.
template <typename Tile, int kColumns>
__global__ void __launch_bounds__(kMaxStreamWarps * 32, 1)
    StreamKernel(const __grid_constant__ MatmulParameters p) {
  constexpr int kPartials = kSplits * kTileRows * kColumns;  // of a team, twice
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int warp = threadIdx.x / 32, team = warp / p.team_warps;
  const int warps = blockDim.x / 32, teams = warps / p.team_warps;
  const int splits = kSplits / p.team_warps;  // of a warp
  const int first_split = (warp - team * p.team_warps) * splits;
  uint8_t* shared = SharedMemory();
  auto* all_partials = reinterpret_cast<float*>(shared + warps * kStages * Tile::kBytes);
  float* both_partials = all_partials + team * 2 * kPartials;
  auto* activations = reinterpret_cast<uint8_t*>(all_partials + teams * 2 * kPartials);
  const uint32_t activation_bytes = p.superblocks * ActivationBlockBytes(p.rows);
  auto* barriers = reinterpret_cast<uint64_t*>(activations + activation_bytes);
  uint64_t* activation_barrier = barriers + warps * kStages;

  const int first = SplitBegin(first_split, p.superblocks);
  const int last = SplitBegin(first_split + splits, p.superblocks);
  const int block = static_cast<int>(blockIdx.x);
  const int begin = block * p.block_units + min(block, p.longer_blocks);
  const int end = begin + p.block_units + (block < p.longer_blocks ? 1 : 0);
  const bool gated = p.fusion.gated.halves != nullptr;
  int unit = begin + team;
  TileRing<Tile> ring(p, shared + warp * kStages * Tile::kBytes, barriers + warp * kStages, lane,
                      unit, end, teams, first, last);
#pragma unroll 1
  for (int i = 0; i < kStages; ++i) ring.Fetch(i);
  LetNextKernelStart();
  if (threadIdx.x == 0) InitCopyBarrier(activation_barrier);
  WaitForPreviousKernel();
  __syncthreads();
  if (threadIdx.x == 0) {
    ExpectCopies(activation_barrier, activation_bytes);
    CopyBulk(activations, p.x, activation_bytes, activation_barrier);
  }
  AwaitCopy(activation_barrier, 0);

  int half = 0, part = 0;
  float gate = 0;
#pragma unroll 1
  while (unit < end) {
    // While some warps still add up one half, others may write the other; none is two ahead.
    float* partials = both_partials + half * kPartials;
    half = 1 - half;
    int s = first;
#pragma unroll 1
    for (int split = first_split; split < first_split + splits; ++split) {
      float acc[1][(kColumns + 7) / 8][4] = {};
#pragma unroll 1
      for (const int split_end = SplitBegin(split + 1, p.superblocks); s < split_end; ++s) {
        const SuperblockActivations x = {activations + s * ActivationBlockBytes(p.rows), p.rows};
        const uint8_t* const tiles[] = {ring.Front()};
        AddSuperblock<Tile, kColumns>(tiles, x, lane, acc);
        ring.Pop();
      }
      float* own = partials + split * kTileRows * kColumns;  // [column][16]
#pragma unroll
      for (int i = 0; i < (kColumns + 7) / 8 * 4; ++i) {
        const int column = i / 4 * 8 + 2 * t + i % 2;
        if (column < kColumns) own[column * kTileRows + g + i % 4 / 2 * 8] = acc[0][i / 4][i % 4];
      }
    }
    NamedBarrier(1 + team, p.team_warps * 32);
    const int index = threadIdx.x - team * p.team_warps * 32;
    float value = 0;
    if (index < kTileRows * kColumns / Tile::kParts) {
      const int row = index / kTileRows, row_in_tile = index % kTileRows;
      float parts[2] = {};
#pragma unroll
      for (int j = 0; j < kSplits; ++j) {
#pragma unroll
        for (int part = 0; part < Tile::kParts; ++part) {
          const int column = row * Tile::kParts + part;
          parts[part] =
              __fadd_rn(parts[part], partials[(j * kColumns + column) * kTileRows + row_in_tile]);
        }
      }
      value = JoinParts<Tile>(parts[0], parts[1]);
      if (!gated) {
        StoreResult<Tile>(p, unit, row_in_tile, row, value);
      } else if (part == 1 && row < p.rows / Tile::kParts) {
        const Activations& out = p.fusion.gated;
        out.halves[out.HalfPlace(row, unit * kTileRows + row_in_tile)] =
            ToHalfActivation(SiluTimes(gate, ResultOf<Tile>(value)));
      }
    }
    gate = ResultOf<Tile>(value);
    if (!gated || ++part == 2) {
      part = 0;
      unit += teams;
    }
  }
}

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_STREAM_KERNEL_CUH_
