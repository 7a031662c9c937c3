// Products for 1 to 16 rows of activations at the speed of the weights' stream. A block has an even
// share of the rows of tiles and takes two (or one) of them at a time, a pass. Each of its warps
// has a split of k of them. A lane takes what the tiles hold for it into registers, so that the
// next tiles are on their way while these are multiplied; warps go on at their own pace, at most
// one pass apart, and the partial sums of a pass are added up while the next one is computed. What
// Fusion says happens there, too.
#ifndef STAGECOACH_KERNELS_CUDA_STREAM_KERNEL_CUH_
#define STAGECOACH_KERNELS_CUDA_STREAM_KERNEL_CUH_

#include "kernels/cuda/activation_ops.cuh"
#include "kernels/cuda/matmul_parameters.cuh"
#include "kernels/cuda/norm_ops.cuh"
#include "kernels/cuda/stream_layout.cuh"
#include "kernels/cuda/superblock_product.cuh"
#include "kernels/cuda/warp.cuh"

namespace stagecoach::cuda {

// One warp's tiles, in the order in which it multiplies them: pass after pass, of each its
// superblocks. The same values in all lanes.
template <typename Tile, int kTiles>
class TileStream {
 public:
  // Superblocks [first, last) of every pass. memory: shared, [kTiles * Tile::kBytes].
  __device__ TileStream(const MatmulParameters& p, const BlockRows& rows, uint8_t* memory,
                        uint64_t* barrier, int first, int last)
      : p_(p), rows_(rows), memory_(memory), barrier_(barrier), first_(first), last_(last) {
    if (first == last) next_row_ = rows.count;  // nothing to fetch, ever
    alike_ = rows.gated ? kTiles == 2 : p.term_count == 1;
    if (next_row_ < rows.count) LocateAnew();
  }

  // Before the first Take.
  __device__ void Start() {
    if (fetched_ > 0) Copy();
  }

  // The oldest tiles that have not been taken; the next ones are fetched in their place.
  template <int kTaken>
  __device__ void Take(int lane, LoadedTile<Tile> (&tiles)[kTaken]) {
    AwaitPhase(barrier_, phase_);
    phase_ ^= 1;
#pragma unroll
    for (int n = 0; n < kTaken; ++n) tiles[n] = LoadedTile<Tile>(memory_ + n * Tile::kBytes, lane);
    FenceBeforeCopies();
    Fetch();
  }

 private:
  __device__ void Fetch() {
    if (++superblock_ == last_) {
      if (next_row_ >= rows_.count) return;
      if (alike_) {
        LocateNext();
      } else {
        LocateAnew();
      }
    }
    Copy();
  }

  __device__ void Copy() {
    if (IsElected()) {
      ExpectCopies(barrier_, fetched_ * Tile::kBytes);
      CopyBulk(memory_, source_[0], Tile::kBytes, barrier_);
      if (kTiles == 2 && fetched_ == 2) {
        CopyBulk(memory_ + Tile::kBytes, source_[kTiles - 1], Tile::kBytes, barrier_);
      }
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) source_[n] += Tile::kBytes;
  }

  // The first tiles of the pass at next_row_. Of a second one that there is not, an address that
  // nobody uses.
  __device__ void LocateAnew() {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      source_[n] = p_.TileRow(rows_.Place(p_, next_row_ + n)) + first_ * Tile::kBytes;
    }
    Begin();
  }
  // The same after a pass whose tiles lie as far from each other as this one's.
  __device__ void LocateNext() {
    const int rows = rows_.gated ? 1 : kTiles;  // between two passes
    const int to_next = rows * p_.row_bytes - (last_ - first_) * Tile::kBytes;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) source_[n] += to_next;
    Begin();
  }
  __device__ void Begin() {
    superblock_ = first_;
    fetched_ = min(kTiles, rows_.count - next_row_);
    next_row_ += kTiles;
  }

  const MatmulParameters& p_;
  const BlockRows& rows_;
  uint8_t* memory_;
  uint64_t* barrier_;
  const uint8_t* source_[kTiles] = {};
  int first_, last_;
  int superblock_ = 0;  // the last one fetched, or the first to be
  int next_row_ = 0;    // of the block, of the next pass
  int fetched_ = 0;     // rows of tiles, of this pass
  bool alike_;          // all passes' tiles lie at the same distances
  uint32_t phase_ = 0;
};

// What a thread has to do with the results of a pass: each time other warps add them up.
template <typename Tile, typename Layout>
class PassSums {
 public:
  __device__ PassSums(const MatmulParameters& p, const BlockRows& rows) : p_(p), rows_(rows) {}

  // Ahead of Finish, by threads that may read results of the kernel before.
  __device__ void Begin(int pass) {
    const Share share = ShareOf(pass);
    place_ = {};
    if (!share.mine) return;
    const int i = pass * kTiles + share.tile;
    if (rows_.gated) {
      const int column = (rows_.begin + i) * (kTileRows / 2) + share.row;
      place_ = ResultPlace::OfHalf(p_.gated.halves + p_.gated.NarrowPlace(share.column, column));
    } else {
      place_ = ResultPlace::Of<Tile>(p_, rows_.Place(p_, i), share.row, share.column);
    }
  }

  // When the pass is complete. partials: [kSplits][kColumns][kColumnStride].
  __device__ void Finish(int pass, const float* partials) {
    const Share share = ShareOf(pass);
    if (!share.mine) return;
    const float* own = partials + share.column * Tile::kParts * Layout::kColumnStride +
                       share.tile * kTileRows + share.row;
    const float result = ResultOf<Tile>(SumOfSplits<Tile, Layout>(own));
    if (rows_.gated) {
      const float up = ResultOf<Tile>(SumOfSplits<Tile, Layout>(own + kTileRows / 2));
      place_.StoreHalf(ToHalfActivation(SiluTimes(result, up)));
    } else {
      place_.Store(result);
    }
  }

 private:
  static constexpr int kTiles = Layout::kTiles;

  // Which of a pass's results are the thread's: of gate and up, a row of both. Not kept from Begin
  // to Finish, as registers are few between them.
  struct Share {
    bool mine;
    int tile, row;  // of the pass, of the tile
    int column;     // row of activations
  };
  __device__ Share ShareOf(int pass) const {
    constexpr int kOutputs = Layout::kPassRows * Layout::kColumns / Tile::kParts;
    constexpr int kThreads = (kOutputs + 31) / 32 * 32;
    static_assert(kThreads <= kStreamThreads && (kStreamThreads & (kStreamThreads - 1)) == 0);
    const int index = (threadIdx.x - pass * kThreads) & (kStreamThreads - 1);
    // Shifts: divisions by what a compiler does not know take long.
    static_assert(kTileRows == 1 << 4);
    const int shift = rows_.gated ? 3 : 4;
    Share share;
    share.row = index & ((1 << shift) - 1);
    share.tile = index >> shift & (kTiles - 1);
    share.column = index >> shift >> (kTiles - 1);
    share.mine = share.column < p_.rows / Tile::kParts && pass * kTiles + share.tile < rows_.count;
    return share;
  }

  const MatmulParameters& p_;
  const BlockRows& rows_;
  ResultPlace place_;
};

// Makes the activations, kRows rows, of a warp's split itself (Fusion::norm_input), together with
// the others.
template <int kRows>
class SplitNorm {
 public:
  __device__ SplitNorm(const MatmulParameters& p, bool norms, int split) : split_(split) {
    if (norms && split < p.superblocks) {
      LoadWholeColumns(p.norm_weight, split, threadIdx.x % 32, weight_);
    }
  }

  // What AddUp reads first; the thread does not wait for it.
  __device__ void Begin(const MatmulParameters& p) {
    if (split_ < p.superblocks) LoadRows(p, split_);
  }

  // A share in the rows' sums of squares. squares: shared, 16-byte aligned, [kRows][kNormWarps],
  // which nobody uses until all have called Finish.
  __device__ void AddUp(const MatmulParameters& p, float* squares, uint64_t* barrier) {
    float sums[kRows] = {};
#pragma unroll 1
    for (int s = split_; s < p.superblocks; s += kNormWarps) {
      if (s != split_) LoadRows(p, s);
#pragma unroll
      for (int row = 0; row < kRows; ++row) AddSquares(x_[row], sums[row]);
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      sums[row] = WarpSum(sums[row]);
      if (threadIdx.x % 32 == 0) squares[row * kNormWarps + split_] = sums[row];
    }
    __syncwarp();
    Arrive(barrier);
  }

  // The halves of superblocks [first, last), into `activations`, of all superblocks.
  __device__ void Finish(const MatmulParameters& p, int first, int last, const float* squares,
                         uint64_t* barrier, uint8_t* activations) {
    const int lane = threadIdx.x % 32;
    // As many splits as superblocks: then a warp norms what it has read for the sum.
    const bool once = p.superblocks == kSplits;
    Activations out;
    out.form = ActivationForm::kHalf;
    out.rows = kRows;
    out.k = p.k;
    out.halves = reinterpret_cast<uint16_t*>(activations);
    AwaitPhase(barrier, 0);
    float factors[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      factors[row] = NormFactor(squares + row * kNormWarps, p.norm_share, p.norm_epsilon);
    }
#pragma unroll 1
    for (int s = first; s < last; ++s) {
      if (!once) {
        LoadWholeColumns(p.norm_weight, s, lane, weight_);
        LoadRows(p, s);
      }
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        Normalise(factors[row], weight_, x_[row]);
        StoreHalves(out, row, s * kSuperblock + lane * kLaneColumns, ToHalfActivations(x_[row]));
      }
    }
    __syncwarp();
  }

 private:
  static_assert(kNormWarps == kSplits);
  __device__ void LoadRows(const MatmulParameters& p, int superblock) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      LoadWholeColumns(p.norm_input + static_cast<size_t>(row) * p.k, superblock, threadIdx.x % 32,
                       x_[row]);
    }
  }

  int split_;
  float weight_[kLaneColumns], x_[kRows][kLaneColumns];
};

// Adds the products of kTaken tiles and the activations x of each superblock of the warp.
// prepare(): before x is read.
template <int kTaken, typename Tile, int kColumns, bool kShared, int kTiles, typename Prepare>
__device__ inline void AddPass(TileStream<Tile, kTiles>& stream, int first, int last,
                               const uint8_t* x, int rows, const Prepare& prepare,
                               float (&acc)[kTiles][(kColumns + 7) / 8][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int s = first; s < last; ++s) {
    LoadedTile<Tile> tiles[kTaken];
    stream.Take(lane, tiles);
    prepare();
    const SuperblockActivations<kShared> own = {x + s * ActivationBlockBytes(rows), rows};
    AddSuperblock<Tile, kColumns>(tiles, own, lane, acc);
  }
}

// What a block does, one of p.shares. kColumns: 1 and 2 for as many rows, 4, 8 and 16 for up to as
// many.
template <typename Tile, int kColumns, bool kShared>
__device__ inline void RunStreamBlock(const MatmulParameters& p, int block) {
  using Layout = StreamLayout<Tile, kColumns, kShared>;
  constexpr int kTiles = Layout::kTiles, kColumnTiles = (kColumns + 7) / 8;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);  // the same in all lanes
  const int rows = kColumns <= 2 ? kColumns : p.rows;
  uint8_t* shared = SharedMemory();
  auto* both_partials = reinterpret_cast<float*>(shared + kSplits * Layout::kPassBytes);
  auto* activations = reinterpret_cast<uint8_t*>(both_partials + 2 * Layout::kPartials);
  auto* barriers = reinterpret_cast<uint64_t*>(
      activations + (kShared ? p.superblocks * ActivationBlockBytes(rows) : 0));
  uint64_t* const tile_barrier = barriers + warp;
  uint64_t* const activation_barrier = barriers + kSplits + warp;
  uint64_t* const pass_barriers = barriers + 2 * kSplits;
  uint64_t* const norm_barrier = pass_barriers + 2;

  // Where splits are not all as long, the longer ones alternate: dealt out like this, the warps of
  // each of the multiprocessor's four schedulers have some of them.
  const int split = warp ^ (warp >> 3);
  const int first = SplitBegin(split, p.superblocks), last = SplitBegin(split + 1, p.superblocks);
  const BlockRows block_rows(p, block);
  if (IsElected()) InitCopyBarrier(tile_barrier);
  __syncwarp();
  TileStream<Tile, kTiles> stream(p, block_rows, shared + warp * Layout::kPassBytes, tile_barrier,
                                  first, last);
  constexpr bool kFewRows = kShared && kColumns <= kMostNormedRows;
  const bool norms = kFewRows && Tile::kParts == 1 && p.norm_input != nullptr;
  // Beside a kernel nothing is waited for: then activations come first.
  const bool ahead = first < last && !p.beside_previous && warp < WarpsAhead(kColumns, norms);
  if (ahead) stream.Start();
  if (!p.beside_next) LetNextKernelStart();
  if (IsElected()) {
    InitCopyBarrier(activation_barrier);
    if (warp == 0) {
      // All lanes arrive: one for its warp is no faster, and racecheck does not follow it.
      for (int i = 0; i < 3; ++i) InitBarrier(pass_barriers + i, kStreamThreads);
    }
  }
  __syncthreads();

  // What results are added to is read a pass ahead. Of one column, where less code is worth more,
  // and of 16, which need the registers, only while the others complete the pass.
  constexpr bool kReadsEarly = kColumns > 1 && kColumns < 16;
  PassSums<Tile, Layout> sums(p, block_rows);
  const uint8_t* const x = kShared ? activations : p.x;
  SplitNorm<kFewRows ? kColumns : 1> norm(p, norms, split);
  bool prepared = false;
  // What has to wait for the kernel before this one. In few places: each kernel reads its code from
  // memory as it comes to it.
  const auto prepare = [&] {
    if (prepared) return;
    prepared = true;
    BeginReading(p);
    // Free until the second pass, which all warps reach together.
    float* const squares = both_partials + Layout::kPartials;
    if (norms) {
      norm.Begin(p);
    } else if (kShared && first < last) {
      const int begin = first * ActivationBlockBytes(rows), end = last * ActivationBlockBytes(rows);
      if (IsElected()) {
        ExpectCopies(activation_barrier, end - begin);
        CopyBulk(activations + begin, p.x + begin, end - begin, activation_barrier);
      }
    }
    if (!ahead) stream.Start();  // behind what is waited for
    if (norms) norm.AddUp(p, squares, norm_barrier);
    if (kReadsEarly) sums.Begin(0);  // behind what takes longer
    if (norms) {
      norm.Finish(p, first, last, squares, norm_barrier, activations);
    } else if (kShared && first < last) {
      AwaitPhase(activation_barrier, 0);
    }
  };

  // Where many rows of activations are waited for, some warps take their first tiles before, so
  // that the next ones are on their way. Elsewhere shorter code is worth more.
  constexpr bool kTakesFirst = kShared && !kFewRows;
  const auto prepare_late = [&] {
    if (kTakesFirst) prepare();
  };
  if (!kTakesFirst || !ahead) prepare();
  const int passes = (block_rows.count + kTiles - 1) / kTiles;
#pragma unroll 1
  for (int pass = 0;; ++pass) {
    float acc[kTiles][kColumnTiles][4] = {};
    // If the first pass has but one tile, the second is what lies in its place: nobody stores the
    // sums. So there is one place where prepare_late is called.
    const bool begins = kTakesFirst && pass == 0;
    if (pass == passes) {
      // Nothing but to finish the last one.
    } else if (kTiles == 1 || begins || pass * kTiles + 1 < block_rows.count) {
      AddPass<kTiles, Tile, kColumns, kShared>(stream, first, last, x, rows, prepare_late, acc);
    } else {
      AddPass<1, Tile, kColumns, kShared>(
          stream, first, last, x, rows, [] {}, acc);
    }
    if (pass > 0) {
      const int before = pass - 1;
      if (!kReadsEarly) sums.Begin(before);
      AwaitPhase(pass_barriers + (before & 1), before / 2 & 1);
      sums.Finish(before, both_partials + (before & 1) * Layout::kPartials);
      if (pass == passes) break;
      if (kReadsEarly) sums.Begin(pass);
    }
    // Nobody reads what this overwrites: all of pass - 2 is stored before pass - 1 is complete.
    float* own =
        both_partials + (pass & 1) * Layout::kPartials + split * kColumns * Layout::kColumnStride;
#pragma unroll
    for (int i = 0; i < kTiles * kColumnTiles * 4; ++i) {
      const int n = i / 4 / kColumnTiles, c = i / 4 % kColumnTiles;
      const int column = c * 8 + 2 * t + i % 2, row = n * kTileRows + g + i % 4 / 2 * 8;
      if (column < kColumns) own[column * Layout::kColumnStride + row] = acc[n][c][i % 4];
    }
    Arrive(pass_barriers + (pass & 1));
  }
  EndReading(p);
}

template <typename Tile, int kColumns, bool kShared>
__global__ void __launch_bounds__(kStreamThreads, 1)
    StreamKernel(const __grid_constant__ MatmulParameters p) {
  if (!kBulkCode) return;  // not in that set
  RunStreamBlock<Tile, kColumns, kShared>(p, blockIdx.x);
}

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_STREAM_KERNEL_CUH_
