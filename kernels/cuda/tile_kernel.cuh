// Products for more rows of activations than the stream kernel takes, by products of warpgroups
// (wide_product.cuh): of weights, decoded to registers, and activations as they lie in shared
// memory. Each warp of a warpgroup has a row of tiles. Other warps fetch, superblock after
// superblock, through a ring of stages. A block walks all of k or (kSplitK), where there would be
// too few blocks, a quarter of it, half by one warpgroup and half by another; then the four blocks
// add their sums up, each some of them. Both add in the same order.
#ifndef STAGECOACH_KERNELS_CUDA_TILE_KERNEL_CUH_
#define STAGECOACH_KERNELS_CUDA_TILE_KERNEL_CUH_

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/matmul_parameters.cuh"
#include "kernels/cuda/tile_decode.cuh"
#include "kernels/cuda/tile_results.cuh"
#include "kernels/cuda/wide_product.cuh"

namespace stagecoach::cuda {

inline constexpr int kWarpgroup = 128;  // threads

// columns: 32 or 64.
template <typename Tile, int columns, bool splits_k>
struct TileLayout {
  static constexpr int kColumns = columns;
  static constexpr bool kSplitK = splits_k;
  static constexpr int kActivationBytes = ActivationBlockBytes(kColumns);
  static constexpr int kThreadSums = kColumns / 2;           // of a warp's 16 x kColumns results
  static constexpr int kFreeBytes = kMostSharedBytes - 256;  // barriers and such take less
  // Warps that multiply: 16, so that activations serve many rows, if two stages and sums fit.
  static constexpr int kWideBytes =
      2 * (16 * Tile::kBytes + kActivationBytes) + 16 * 32 * kThreadSums * 4;
  static constexpr int kWarps = kSplitK || kWideBytes <= kFreeBytes ? 16 : 8;
  static constexpr int kThreads = kWarps * 32 + kWarpgroup;
  // Of a thread that multiplies, and of one that fetches.
  static constexpr int kRegisters = kWarps == 16 ? 112 : 232;
  static constexpr int kFetchRegisters = kWarps == 16 ? 32 : 40;

  static constexpr int kBlockTiles = kSplitK ? kWarps / 2 : kWarps;
  static constexpr int kStoring = kBlockTiles * 32;  // threads that end up with results
  static constexpr int kWeightBytes = kBlockTiles * Tile::kBytes;
  static constexpr int kStageBytes = kWeightBytes + kActivationBytes;
  // Sums put by behind the ring, [kThreadSums][kStoring]: of the quarters so far, or of the halves
  // that come first.
  static constexpr int kSumsBytes = kThreadSums * kStoring * 4;
  static constexpr int kFitting = (kFreeBytes - kSumsBytes) / kStageBytes;
  static constexpr int kStages = kFitting > 6 ? 6 : kFitting;
  // Barriers of filled stages. Whoever waits on one must see each of its phases, or takes one for
  // the one after the next; so the two halves must not share any.
  static constexpr int kFilledBarriers = kSplitK && kStages % 2 == 1 ? 2 * kStages : kStages;
  static constexpr int kBarrierBytes = (kFilledBarriers + kStages) * 8;
  static_assert(kStages >= 2 && kStageBytes % 128 == 0 && kBarrierBytes <= 128);
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kSharedBytes = kRingBytes + kSumsBytes + kBarrierBytes;
};

// What a block computes. Fills: of the ring's stages in turn, each by a superblock; the two halves'
// alternate, if there are two.
template <typename Tile, int kColumns, bool kSplitK>
struct TileShare : TileBlock<TileLayout<Tile, kColumns, kSplitK>> {
  using Layout = TileLayout<Tile, kColumns, kSplitK>;
  int superblocks;

  __device__ explicit TileShare(const MatmulParameters& p)
      : TileBlock<Layout>(TileBlock<Layout>::Own()), superblocks(p.superblocks) {}
  __device__ int FirstSplit(int half) const {
    return kSplitK ? (2 * this->quarter + half) * (kQuarterSplits / 2) : 0;
  }
  __device__ int Begin(int half) const { return SplitBegin(FirstSplit(half), superblocks); }
  __device__ int End(int half) const {
    return SplitBegin(FirstSplit(half) + (kSplitK ? kQuarterSplits / 2 : kSplits), superblocks);
  }
  // -1: none. Halves differ by one superblock at most, so that only one of the last two fills may
  // have none.
  __device__ int Superblock(int fill) const {
    const int half = kSplitK ? fill % 2 : 0;
    const int superblock = Begin(half) + (kSplitK ? fill / 2 : fill);
    return superblock < End(half) ? superblock : -1;
  }
  __device__ int Fills() const {
    return kSplitK ? 2 * max(End(0) - Begin(0), End(1) - Begin(1)) : superblocks;
  }
};

// Where in a ring of stages, or of barriers, a fill has its place, from the first one on.
template <int kStages>
struct RingPlace {
  int stage = 0;
  uint32_t phase = 0;

  __device__ void Advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// A warp that fetches: its share of each stage. Barriers: filled [kFilledBarriers], by the fill's
// number; emptied [kStages].
template <typename Tile, int kColumns, bool kSplitK>
__device__ inline void FetchStages(const MatmulParameters& p,
                                   const TileShare<Tile, kColumns, kSplitK>& share, uint8_t* shared,
                                   uint64_t* filled, uint64_t* emptied) {
  using Layout = TileLayout<Tile, kColumns, kSplitK>;
  constexpr int kWarpTiles = Layout::kBlockTiles / 4;
  const int lane = threadIdx.x % 32;
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0) - Layout::kWarps;
  const int tiles = min(Layout::kBlockTiles, p.tile_rows - share.first_tile_row);
  // Filled stages wait for all others, so that these see each phase of emptied stages.
  if (warp * kWarpTiles >= tiles) return;
  const int tile = warp * kWarpTiles + lane;
  const bool fetches = lane < kWarpTiles && tile < tiles;
  const uint8_t* weights = fetches ? p.TileRow(share.TileRowOf(p, tile)) : nullptr;
  const auto fetch_weights = [&](int s, int stage, uint64_t* barrier) {
    if (warp == 0 && IsElected()) {
      ExpectCopies(barrier, tiles * Tile::kBytes + Layout::kActivationBytes);
    }
    if (fetches) {
      CopyBulk(shared + stage * Layout::kStageBytes + tile * Tile::kBytes,
               weights + static_cast<size_t>(s) * Tile::kBytes, Tile::kBytes, barrier);
    }
  };
  // One copy: many small ones take longer to begin than to come. Of a last block of rows that is
  // not full, the rest is anything; nobody reads what becomes of it.
  const auto fetch_activations = [&](int s, int stage, uint64_t* barrier) {
    if (warp != 0 || !IsElected()) return;
    const size_t place = static_cast<size_t>(s) * share.row_blocks + share.row_block;
    CopyBulk(shared + stage * Layout::kStageBytes + Layout::kWeightBytes,
             p.x + place * Layout::kActivationBytes, Layout::kActivationBytes, barrier);
  };
  const int fills = share.Fills(), ahead = min(fills, Layout::kStages);
  for (int fill = 0; fill < ahead; ++fill) {
    const int s = share.Superblock(fill);
    if (s >= 0) fetch_weights(s, fill, filled + fill);
  }
  BeginReading(p);
  for (int fill = 0; fill < ahead; ++fill) {
    const int s = share.Superblock(fill);
    if (s >= 0) fetch_activations(s, fill, filled + fill);
  }
  RingPlace<Layout::kStages> place;
#pragma unroll 1
  for (int fill = ahead; fill < fills; ++fill, place.Advance()) {
    const int s = share.Superblock(fill);
    if (s < 0) continue;
    uint64_t* const barrier = filled + fill % Layout::kFilledBarriers;
    AwaitPhase(emptied + place.stage, place.phase);
    fetch_weights(s, place.stage, barrier);
    fetch_activations(s, place.stage, barrier);
  }
}

// acc += tile * the activations of one superblock, or (!add) is that. tile: in shared memory, the
// warp's. Ends with products under way.
template <typename Tile, int kColumns>
__device__ inline void AddStage(const uint8_t* tile, uint64_t activations, bool add,
                                float (&acc)[kColumns / 8][4]) {
  const int lane = threadIdx.x % 32;
  const TileScales<Tile> scales(tile, lane);
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const TilePair<Tile> pair(tile, p, lane);
    const PairScales pair_scales = scales.Pair(p);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const GroupWeights weights = DecodeGroup<Tile>(pair, pair_scales, i);
      BeginWideProducts();
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int product = (2 * p + i) * 2 + j;
        const uint32_t(&w)[2][4] = weights.bits;
        MultiplyAddWide<kColumns>(acc, w[0][2 * j], w[1][2 * j], w[0][2 * j + 1], w[1][2 * j + 1],
                                  activations + WideFactorStep(product * 2 * kColumns * 16),
                                  add || product > 0);
      }
      EndWideProducts();
      AwaitWideProducts<1>();  // so that there are registers for the next weights
    }
  }
}

// Sums of a thread that multiplies: of the split at hand, and of those before it in its quarter
// (half).
template <int kColumns>
struct TileSums {
  static constexpr int kSums = kColumns / 2;
  float acc[kColumns / 8][4] = {};
  float before[kSums] = {};

  __device__ float Sum(int i) const { return __fadd_rn(before[i], acc[i / 4][i % 4]); }
  __device__ void EndSplit() {
#pragma unroll
    for (int i = 0; i < kSums; ++i) before[i] = Sum(i);
  }
  // by: the thread's sums of quarters, kStoring apart. first: there are none yet.
  template <int kStoring>
  __device__ void EndQuarter(bool first, float* by) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      by[i * kStoring] = first ? before[i] : __fadd_rn(by[i * kStoring], before[i]);
      before[i] = 0;
    }
  }
};

// Multiplies all fills of the half. Adds quarters but the last up in `by`; whether there were any.
template <typename Tile, int kColumns, bool kSplitK>
__device__ inline bool MultiplyFills(const TileShare<Tile, kColumns, kSplitK>& share, int half,
                                     const uint8_t* shared, uint64_t* filled, uint64_t* emptied,
                                     float* by, TileSums<kColumns>& sums) {
  using Layout = TileLayout<Tile, kColumns, kSplitK>;
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0) % Layout::kBlockTiles;
  const int fills = share.Fills();
  RingPlace<Layout::kStages> place;
  RingPlace<Layout::kFilledBarriers> barrier;
  const auto advance = [&] {
    place.Advance();
    barrier.Advance();
  };
  if (half == 1) advance();
  int split = share.FirstSplit(half) - 1, split_end = share.Begin(half);
  bool put_by = false;
#pragma unroll 1
  for (int fill = half; fill < fills; fill += kSplitK ? 2 : 1) {
    const int s = share.Superblock(fill);
    if (s < 0) break;
    const bool begins = s == split_end;
    if (begins) {
      const int ended = split;
      while (split_end <= s) split_end = SplitBegin(++split + 1, share.superblocks);
      if (fill > half) {
        sums.EndSplit();
        if (!kSplitK && ended / kQuarterSplits != split / kQuarterSplits) {
          sums.template EndQuarter<Layout::kStoring>(!put_by, by);
          put_by = true;
        }
      }
    }
    AwaitPhase(filled + barrier.stage, barrier.phase);
    __syncwarp();  // as the products want it
    const uint8_t* own = shared + place.stage * Layout::kStageBytes;
    AddStage<Tile, kColumns>(own + warp * Tile::kBytes,
                             WideFactor<kColumns>(own + Layout::kWeightBytes), !begins, sums.acc);
    AwaitWideProducts<0>();
    AwaitedWideResult(sums.acc);
    FenceBeforeCopies();
    Arrive(emptied + place.stage);
    advance();
    if (kSplitK) advance();
  }
  return put_by;
}

// Grid: TileBlock.
template <typename Tile, int kColumns, bool kSplitK>
__global__ void __launch_bounds__(TileLayout<Tile, kColumns, kSplitK>::kThreads, 1)
    TileKernel(const __grid_constant__ MatmulParameters p) {
  if (!kBulkCode) return;  // not in that set
  using Layout = TileLayout<Tile, kColumns, kSplitK>;
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
  const TileShare<Tile, kColumns, kSplitK> share(p);
  uint8_t* shared = SharedMemory();
  auto* sums_by = reinterpret_cast<float*>(shared + Layout::kRingBytes);
  auto* filled = reinterpret_cast<uint64_t*>(shared + Layout::kRingBytes + Layout::kSumsBytes);
  uint64_t* const emptied = filled + Layout::kFilledBarriers;
  if (threadIdx.x < Layout::kFilledBarriers) InitCopyBarrier(filled + threadIdx.x);
  if (threadIdx.x < Layout::kStages) InitBarrier(emptied + threadIdx.x, Layout::kStoring);
  __syncthreads();
  if (!p.beside_next) LetNextKernelStart();
  if (warp >= Layout::kWarps) {
    GiveUpRegisters<Layout::kFetchRegisters>();
    FetchStages(p, share, shared, filled, emptied);
    return;
  }

  TakeRegisters<Layout::kRegisters>();
  constexpr int kSums = kColumns / 2, kStoring = Layout::kStoring;
  const int half = kSplitK ? warp / Layout::kBlockTiles : 0;
  float* const by = sums_by + threadIdx.x % kStoring;
  TileSums<kColumns> sums;
  const bool put_by = MultiplyFills(share, half, shared, filled, emptied, by, sums);
  // Before anything is stored, or read but x; also for a kernel beside this one, which may use the
  // same partials.
  WaitForPreviousKernel();
  float results[kSums];
  if constexpr (kSplitK) {
    const int barrier = 2 + warp % Layout::kBlockTiles / 4;  // of two warpgroups
    if (half == 0) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) by[i * kStoring] = sums.Sum(i);
      ArriveAtNamedBarrier(barrier, 2 * kWarpgroup);
      return;
    }
    NamedBarrier(barrier, 2 * kWarpgroup);
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      results[i] = __fadd_rn(__fadd_rn(by[i * kStoring], sums.before[i]), sums.acc[i / 4][i % 4]);
    }
    StoreQuarters<Tile>(p, share, results);
  } else {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      results[i] = put_by ? __fadd_rn(by[i * kStoring], sums.Sum(i)) : sums.Sum(i);
    }
    if (!p.is_gated) {
      TileResults<Tile, Layout, kSums>(p, share, 0).Store(results);
    } else {
      StoreGated<Tile>(p, share, results);
    }
  }
}

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_TILE_KERNEL_CUH_
