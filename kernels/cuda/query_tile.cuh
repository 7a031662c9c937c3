// The 16 queries that a warp of attention with tensor cores takes together, and how products take
// them.
#ifndef STAGECOACH_KERNELS_CUDA_QUERY_TILE_CUH_
#define STAGECOACH_KERNELS_CUDA_QUERY_TILE_CUH_

#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/attention_task.cuh"
#include "kernels/cuda/kv_store.cuh"
#include "kernels/cuda/warp.cuh"

namespace stagecoach::cuda {

// Query m is head m % heads of row m / heads.
struct QueryTile {
  int first_row;
  int rows;
  int first_head;   // of all query heads
  int heads;        // taken together
  int valid_heads;  // of those, beyond the last of the KV head
  int reciprocal;   // of heads

  __device__ int RowOf(int m) const { return m * reciprocal >> 16; }
  __device__ int HeadOf(int m) const { return m - RowOf(m) * heads; }
  __device__ bool Valid(int m) const { return RowOf(m) < rows && HeadOf(m) < valid_heads; }
  // Index of query m among [rows][all heads].
  __device__ size_t Head(int m, int all_heads) const {
    return static_cast<size_t>(first_row + RowOf(m)) * all_heads + first_head + HeadOf(m);
  }
  __device__ AttendedHead Out(int m, const AttentionTask& task, int length) const {
    return AttendedHead(task, first_row + RowOf(m), first_head + HeadOf(m), length);
  }
  // -1: sees nothing.
  __device__ int Position(int m, const int32_t* positions) const {
    return Valid(m) ? positions[first_row + RowOf(m)] : -1;
  }
};

// slice: of the KV head's query heads.
__device__ inline QueryTile MakeTile(const AttentionTask& task, int tile, int kv_head, int slice) {
  const HeadGroups& groups = task.groups;
  // Of steps that store, each row is a tile: there is no need to wait for the table.
  const uint32_t packed = task.store ? tile * (kQueryTile + 1) + 1 : task.table.tiles[tile];
  return {.first_row = static_cast<int>(packed / (kQueryTile + 1)),
          .rows = static_cast<int>(packed % (kQueryTile + 1)),
          .first_head = kv_head * groups.group + slice * groups.heads,
          .heads = groups.heads,
          .valid_heads = min(groups.heads, groups.group - slice * groups.heads),
          .reciprocal = groups.reciprocal};
}

__device__ inline uint32_t PackHalves(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Queries as halves, as operands of products: of products 2p and 2p + 1 along the dims, each lane's
// four registers.
template <int kDims>
struct Queries {
  static constexpr int kPairs = kDims / 32;
  alignas(16) uint32_t operands[kPairs][2][kWarpLanes][4];

  // The share of one of `threads`.
  __device__ void Load(const AttentionTask& task, const QueryTile& tile, int thread, int threads) {
    constexpr int kVectors = kDims / 8;
    for (int i = thread; i < kQueryTile * kVectors; i += threads) {
      const int m = i / kVectors, vector = i % kVectors, d = vector * 8;
      const bool valid = tile.Valid(m);
      const float2* from = reinterpret_cast<const float2*>(
          task.in.q + (valid ? tile.Head(m, task.heads) : 0) * kDims + d);
      const float2* turns =
          task.in.turns + static_cast<size_t>(tile.first_row + tile.RowOf(m)) * task.in.pairs;
      uint32_t(*to)[kWarpLanes][4] = operands[vector / 4];
      const int lane = m % 8 * 4 + vector % 4;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float2 pair = valid ? from[j] : make_float2(0, 0);
        if (valid && task.store && d / 2 + j < task.in.pairs) {
          pair = TurnPair(pair.x, pair.y, turns[d / 2 + j]);
        }
        to[j / 2][lane][j % 2 * 2 + m / 8] = PackHalves(pair.x, pair.y);
      }
    }
  }
  __device__ uint4 Operand(int pair, int product, int lane) const {
    return *reinterpret_cast<const uint4*>(operands[pair][product][lane]);
  }
};

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_QUERY_TILE_CUH_
