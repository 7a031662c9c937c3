// Causal attention over paged keys and values.
//
// The context is walked in chunks of a fixed number of positions. Each starts fresh, with its own
// maximum, sum and weighted values; chunks are merged in order. So a row's bits depend on its
// position alone, whether one warp or block walks all its chunks (many rows) or they are spread
// over the blocks of a cluster or over the GPU and merged afterwards (few rows, long contexts).
//
// Two kernels: halves of 64 or 128 values per head go through tensor cores (keys and values as they
// are, queries and weights rounded to half), everything else through a general one. Which of them
// runs depends on the KV cache's shape alone.
#ifndef STAGECOACH_KERNELS_CUDA_ATTENTION_H_
#define STAGECOACH_KERNELS_CUDA_ATTENTION_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/cuda_kv_cache.h"
#include "kernels/cuda/kernel_set.h"
#include "kernels/cuda/quant_matmul.h"
#include "kernels/cuda/rope.h"

namespace stagecoach::cuda {

// What one launch is made for; anything that needs less may run in it, too. kCluster and `alone`
// are of the bulk set of kernels (kernel_set.h); otherwise the launch says cudaErrorNotSupported.
struct AttentionPlan {
  // Who merges a row's chunks.
  enum class Merge {
    kWalker,   // who walks them all
    kBlock,    // the thread block, whose warps have a chunk each
    kCluster,  // a cluster of 2, 4 or 8 blocks, with 8 of the plan's chunks each
    kScratch,  // another kernel, from PartialFloats(...) of scratch
  };
  int rows = 0;
  int heads = 0;   // a multiple of the KV heads
  int tiles = 0;   // of queries (RowTable)
  int chunks = 1;  // at least as many as the longest row has
  Merge merge = Merge::kWalker;
  // The kernel itself turns queries and stores keys and values: for steps of one row per sequence,
  // whose only new position is the row's own.
  bool stores = false;
  // kBlock of 8 chunks: so few blocks that each has a multiprocessor for itself (which follows from
  // tiles, chunks and merge). Makes a difference for tiles of up to 8 queries.
  bool alone = false;
};

// Of all rows of a step, before they are turned and stored.
struct AttentionInputs {
  float* q = nullptr;             // [rows][heads][key_length]; afterwards turned, or not
  const float* k = nullptr;       // [rows][kv_heads][key_length]
  const float* v = nullptr;       // [rows][kv_heads][value_length]
  const float2* turns = nullptr;  // [rows][pairs]
  int pairs = 0;                  // 0: nothing turns
};

// Queries of one sequence that attention takes together: as many rows of `group` query heads per KV
// head as make up to kQueryTile, at least one.
inline constexpr int kQueryTile = 16;
int RowsPerQueryTile(int group);
inline int32_t PackQueryTile(int first_row, int rows) {
  return first_row * (kQueryTile + 1) + rows;
}

// Floats of scratch for the partial results of every chunk.
size_t PartialFloats(int rows, int heads, int chunks, int value_length);

struct AttentionShape {
  int rows = 0;
  int sequences = 0;
  int tiles = 0;          // of queries
  int last_position = 0;  // the largest, at most
};
// Depends on its arguments alone.
AttentionPlan PlanAttention(const AttentionShape& shape, int heads, const KvLayout& kv,
                            const GpuTraits& gpu, size_t scratch_floats);

// Turns, stores, and attends: out [rows][heads * value_length] of the rows at table.positions;
// scale 1 / sqrt(key_length). Halves only if they have no columns to pad.
cudaError_t StoreAndAttend(const AttentionPlan& plan, const RowTable& table,
                           const AttentionInputs& in, const KvLayout& kv, float* scratch,
                           const Activations& out, cudaStream_t stream);

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_ATTENTION_H_
