// Rotary position embedding, and the store of keys and values into the KV cache.
#ifndef STAGECOACH_KERNELS_CUDA_ROPE_H_
#define STAGECOACH_KERNELS_CUDA_ROPE_H_

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "kernels/cuda/cuda_kv_cache.h"
#include "model/model_file.h"

namespace stagecoach::cuda {

// Radians per position of each pair of dims, [rope_dims / 2]: freq_scale * base^(-2i / rope_dims) /
// freq_factors[i].
std::vector<double> RopeFrequencies(const ModelParams& params);

// The rows of a step on the device, one entry per row. Complete before any kernel of the step
// starts: kernels that overlap the one before them read it right away.
struct RowTable {
  const int32_t* positions;  // [rows]
  const int32_t* first;      // [rows] where the row's sequence begins in `blocks`
  const int32_t* tiles;      // of queries: PackQueryTile
  const int32_t* blocks;     // KV blocks of all sequences
};

// Turns (step_begin.h: TurnsOfRows) the pairs (2i, 2i + 1) of each head's first 2 * pairs dims. x:
// [rows][heads][head_dim], in place.
cudaError_t Rope(const float2* turns, int pairs, int rows, int heads, int head_dim, float* x,
                 cudaStream_t stream);

// Turns q [rows][heads][key_length] in place, and stores the turned k [rows][kv_heads][key_length]
// and v [rows][kv_heads][value_length] at the rows' positions. With pairs = 0 nothing turns.
cudaError_t RopeAndStore(const float2* turns, int pairs, const RowTable& table, int rows, int heads,
                         float* q, const float* k, const float* v, const KvLayout& kv,
                         cudaStream_t stream);

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_ROPE_H_
