// What the matmul kernels share: their parameters, the split of k, and how results are stored.
#ifndef STAGECOACH_KERNELS_CUDA_MATMUL_PARAMETERS_CUH_
#define STAGECOACH_KERNELS_CUDA_MATMUL_PARAMETERS_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/device_ops.cuh"
#include "kernels/cuda/kernel_set.h"
#include "kernels/cuda/quant_matmul.h"
#include "kernels/cuda/tile_format.cuh"

namespace stagecoach::cuda {

// Of k, and how they are added up: part of the contract (quant_matmul.h).
inline constexpr int kSplits = 16;
inline constexpr int kQuarters = 4;
inline constexpr int kQuarterSplits = kSplits / kQuarters;

// The first superblock of a split.
__host__ __device__ inline int SplitBegin(unsigned split, unsigned superblocks) {
  return static_cast<int>(split * superblocks / kSplits);
}

// What the stream kernel norms itself. More rows are better normed by a kernel of their own: it
// does once what every block would do.
inline constexpr int kMostNormedRows = 2;
inline constexpr int kMostNormedSuperblocks = 32;

// What fits a MatmulScratch: groups of kQuarters blocks that add their sums up.
inline constexpr int kMostSplitGroups = 64;
inline constexpr int kSplitGroupFloats = kQuarters * 128 * 64;
static_assert(size_t{4} * (1 + kSplitGroupFloats) * kMostSplitGroups <= kMatmulScratchBytes);

__device__ inline float SumOfQuarters(const float (&quarters)[kQuarters]) {
  float sum = quarters[0];
#pragma unroll
  for (int i = 1; i < kQuarters; ++i) sum = __fadd_rn(sum, quarters[i]);
  return sum;
}

// How rows of tiles are dealt out to blocks.
struct BlockShares {
  int units;          // rows of a block,
  int longer_blocks;  // the first of which have one more
  int blocks;         // in all

  // No more blocks than rows; of no rows, none.
  static BlockShares Of(int units, int multiprocessors) {
    const int blocks = units < multiprocessors ? units : multiprocessors;
    if (blocks == 0) return {};
    return {units / blocks, units % blocks, blocks};
  }
  __device__ int Begin(int block) const { return block * units + min(block, longer_blocks); }
  __device__ int Units(int block) const { return units + (block < longer_blocks ? 1 : 0); }
};

// Terms of one type over the same activations, by value in a kernel's parameters. Their tile rows
// are numbered through. What a kernel needs for its first weights comes first: it waits for each 64
// bytes of its parameters when it comes to them.
struct MatmulParameters {
  // y: a result + (bias + what y was), of what there is, added in this order by every kernel.
  struct Term {
    float* y;
    const float* bias;
    int y_stride;
    int n;
    bool accumulate;
  };
  BlockShares shares;  // of StreamKernel's and PlainKernel's blocks
  int superblocks;     // per row
  uint32_t row_bytes;  // of a row of tiles
  int rows;            // of halves
  // Whether the two terms are gate and up, and SwiGLU of them is all that is stored (gated).
  bool is_gated;
  // Two kernels in turn may run side by side, as the second one reads nothing of the first: see
  // BeginReading.
  bool beside_next, beside_previous;
  int first_tile_rows[kMaxMatmulTerms];  // of terms; of none: kNoTileRow
  uintptr_t origins[kMaxMatmulTerms];    // where the first tile of row 0 would be: see TileRow
  const uint8_t* x;                      // Activations::halves; or made from this (Fusion):
  const float* norm_input;
  const float* norm_weight;
  float norm_epsilon, norm_share;  // NormShare(k)
  int k;
  int term_count;
  int tile_rows;  // of all terms
  Term terms[kMaxMatmulTerms];
  Activations gated;
  // Of TileKernel and PlainTileKernel, in a MatmulScratch; null if there is none.
  unsigned*
      arrivals;     // [kMostSplitGroups], of blocks that have come so far; multiples of kQuarters
  float* partials;  // [groups][kQuarters][results of a block]

  // Index of the term that a row of tiles is of.
  __device__ int TermOf(int tile_row) const {
    int term = 0;
#pragma unroll
    for (int i = 1; i < kMaxMatmulTerms; ++i) term += tile_row >= first_tile_rows[i];
    return term;
  }
  // The first tile of a row of tiles.
  __device__ const uint8_t* TileRow(uint32_t tile_row) const {
    return reinterpret_cast<const uint8_t*>(origins[TermOf(tile_row)] +
                                            uint64_t{tile_row} * row_bytes);
  }
};
inline constexpr int kNoTileRow = 1 << 30;

// A block's rows of tiles, counted from 0: neighbours; of paired gate and up, of both in turn.
// Place: which of all terms' the i-th is.
struct BlockRows {
  bool gated;
  int begin;
  int count;

  // block: of p.shares.
  __device__ BlockRows(const MatmulParameters& p, int block)
      : gated(p.is_gated), begin(p.shares.Begin(block)), count(p.shares.Units(block)) {}
  __device__ int Place(const MatmulParameters& p, int i) const {
    const unsigned row = begin + i;
    return gated ? row / 2 + row % 2 * p.first_tile_rows[1] : row;
  }
};

// Before a thread reads anything but weights. Where two kernels run side by side, the second one is
// let go only when all that is before the first is complete; it waits for the first itself before
// it ends (EndReading), so that whoever waits for the second waits for both.
__device__ inline void BeginReading(const MatmulParameters& p) {
  if (!p.beside_previous) WaitForPreviousKernel();
  if (p.beside_next) LetNextKernelStart();
}
__device__ inline void EndReading(const MatmulParameters& p) {
  if (p.beside_previous) WaitForPreviousKernel();
}

// What a sum of products stands for.
template <typename Tile>
__device__ inline float ResultOf(float sum) {
  return __fmul_rn(sum, 1 / (kActivationScale * Tile::kWeightScale));
}

// The sum of products of a row of activations, from those of its rows of halves.
template <typename Tile>
__device__ inline float JoinParts(float first, float rest) {
  return Tile::kParts == 1 ? first : __fmaf_rn(rest, kRestScale, first);
}

// The sum of products of one result, from those of its splits of k: partials
// [kSplits][Layout::kColumns][Layout::kColumnStride], from its row and (first) column on.
template <typename Tile, typename Layout>
__device__ inline float SumOfSplits(const float* partials) {
  float quarters[Tile::kParts][kQuarters] = {};
#pragma unroll
  for (int j = 0; j < kSplits; ++j) {
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) {
      float& quarter = quarters[part][j / kQuarterSplits];
      quarter = __fadd_rn(quarter, partials[(j * Layout::kColumns + part) * Layout::kColumnStride]);
    }
  }
  return JoinParts<Tile>(SumOfQuarters(quarters[0]), SumOfQuarters(quarters[Tile::kParts - 1]));
}

// Where one result goes, and what is added to it. Made ahead of the sum, since it reads memory.
// Results outside the matrix and the activations are left out.
class ResultPlace {
 public:
  ResultPlace() = default;  // left out
  // row: of activations.
  template <typename Tile>
  static __device__ ResultPlace Of(const MatmulParameters& p, int tile_row, int row_in_tile,
                                   int row) {
    ResultPlace result;
    if (row >= p.rows / Tile::kParts) return result;
    const int index = p.TermOf(tile_row);
    const MatmulParameters::Term& term = p.terms[index];
    const int n = (tile_row - p.first_tile_rows[index]) * kTileRows + row_in_tile;
    if (n >= term.n) return result;
    float* const y = term.y + static_cast<size_t>(row) * term.y_stride + n;
    result.at_ = y;
    if (term.accumulate && term.bias != nullptr) [[unlikely]] {
      result.added_ = __fadd_rn(__ldcg(term.bias + n), __ldcg(y));
    } else if (term.accumulate || term.bias != nullptr) {
      result.added_ = __ldcg(term.accumulate ? y : term.bias + n);  // under way on return
    }
    return result;
  }
  // Of gate and up: a half, always inside.
  static __device__ ResultPlace OfHalf(uint16_t* half) {
    ResultPlace result;
    result.at_ = half;
    return result;
  }
  __device__ void Store(float result) const {
    if (at_ != nullptr) *static_cast<float*>(at_) = __fadd_rn(result, added_);
  }
  __device__ void StoreHalf(uint16_t half) const { *static_cast<uint16_t*>(at_) = half; }

 private:
  void* at_ = nullptr;  // a float, or (OfHalf) a half
  float added_ = 0;
};

// Terms of the two types of most files, Q4_K and Q6_K, of each for blocks of its own in one kernel,
// beside no other. A type may have no terms: then all of it is zero.
struct MixedParameters {
  MatmulParameters q4_k, q6_k;
};
inline constexpr int kMostMixedRows = 4;  // 8 are slower so

// What launchers must know of the current device.
struct DeviceLimits {
  KernelSet kernels = KernelSet::kBulk;
  int multiprocessors = 0;
  size_t shared_bytes = 0;  // that a block may have
};

// Chooses a kernel for one type; defined and instantiated for each in quant_matmul_*.cu.
// p.terms are of `type`.
template <TensorType type>
cudaError_t LaunchTypedMatmul(const MatmulParameters& p, const DeviceLimits& device,
                              cudaStream_t stream);

// As many rows in both parts, up to kMostMixedRows, whose activations fit shared memory
// (SharesActivations). `shares` are set.
cudaError_t LaunchMixedMatmul(const MixedParameters& p, const DeviceLimits& device,
                              cudaStream_t stream);

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_MATMUL_PARAMETERS_CUH_
