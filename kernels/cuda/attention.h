// Causal attention over paged keys and values.
//
// The context is walked in tiles of 32 positions, each with its own maximum, sum and weighted
// values. Eight tiles make a chunk and are merged in order; chunks are merged in order. So a row's
// bits depend on its position alone, whether one thread block walks all its chunks (many rows) or
// each chunk has a block of its own (few rows, long contexts).
#ifndef STAGECOACH_KERNELS_CUDA_ATTENTION_H_
#define STAGECOACH_KERNELS_CUDA_ATTENTION_H_

#include <cuda_runtime.h>

#include <cstddef>

#include "kernels/cuda/cuda_kv_cache.h"
#include "kernels/cuda/rope.h"

namespace stagecoach::cuda {

inline constexpr int kTilesPerChunk = 8;
inline constexpr int kChunkPositions = kTilesPerChunk * kKvBlockPositions;

// What one launch is made for; anything that needs less may run in it, too.
struct AttentionPlan {
  int rows = 0;
  int heads = 0;       // a multiple of the KV heads
  int chunks = 1;      // at least as many as the longest row has
  bool split = false;  // a thread block per chunk; needs PartialFloats(...) of scratch
};

// Floats of scratch for the partial results of a split.
size_t PartialFloats(int rows, int heads, int chunks, int value_length);

// Chooses chunks and split for rows whose last position is at most `last_position`.
AttentionPlan PlanAttention(int rows, int heads, int kv_heads, int value_length, int last_position,
                            int multiprocessors, size_t scratch_floats);

// out [rows][heads][value_length] of q [rows][heads][key_length] at table.positions, whose keys and
// values have been stored; scale 1 / sqrt(key_length).
cudaError_t Attend(const AttentionPlan& plan, const RowTable& table, const float* q,
                   const KvLayout& kv, float* scratch, float* out, cudaStream_t stream);

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_ATTENTION_H_
