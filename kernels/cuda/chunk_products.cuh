// The products of attention with tensor cores, of one chunk by one warp.
//
// A warp takes a tile of 16 queries (some rows of one sequence times the query heads of one KV
// head) and chunks of 64 positions. Of mma.m16n8k16, with g = lane / 4 and t = lane % 4, a lane
// holds of
//   a: rows g and g + 8, columns 2t, 2t + 1, 2t + 8, 2t + 9     b: the same rows of column g
//   c: rows g and g + 8, columns 2t, 2t + 1
// The k index of a product may be dealt out as one likes, as long as a and b agree. So that a lane
// reads 16 bytes at once, its eight values of two products are neighbours: dims 8t .. 8t + 7 of 32
// for scores, positions 8t .. 8t + 7 of a KV block for values. And column 2t or 2t + 1 of the j-th
// product of scores is position 8t + 2j or 8t + 2j + 1, so that the results of scores are the
// operands of values as they are.
#ifndef STAGECOACH_KERNELS_CUDA_CHUNK_PRODUCTS_CUH_
#define STAGECOACH_KERNELS_CUDA_CHUNK_PRODUCTS_CUH_

#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

#include "kernels/cuda/attention_task.cuh"
#include "kernels/cuda/device_ops.cuh"
#include "kernels/cuda/kv_chunk.cuh"
#include "kernels/cuda/query_tile.cuh"
#include "kernels/cuda/warp.cuh"

namespace stagecoach::cuda {

inline constexpr int kKeyGroups = 4;  // of 8 positions in a KV block
inline constexpr int kHalfDims = 64;  // of the result that are summed up at once
inline constexpr int kHalfSums = kHalfDims / 8;

__device__ inline float QuadMax(float value) {
  value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, 1));
  return fmaxf(value, __shfl_xor_sync(kAllLanes, value, 2));
}
__device__ inline float QuadSum(float value) {
  value += __shfl_xor_sync(kAllLanes, value, 1);
  return value + __shfl_xor_sync(kAllLanes, value, 2);
}

// What a warp makes of one chunk for rows g and g + 8 of its tile, before values are added up.
struct ChunkWeights {
  uint32_t weights[kTilesOfChunk][kKeyGroups][2];  // two positions each
  Softmax softmax[2];
};

// What a lane needs of the keys of a KV block.
template <int kPairs, typename Chunk>
__device__ void LoadKeys(const Chunk& kv, int tile, uint4 (&keys)[kPairs][kKeyGroups]) {
  const int lane = threadIdx.x % kWarpLanes, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
    for (int j = 0; j < kKeyGroups; ++j) {
      keys[pair][j] = kv.Key(tile, pair * 4 + t, g / 2 * 8 + g % 2 + 2 * j);
    }
  }
}

// positions: of rows g and g + 8; only the first counts with kHalves = 1, where no query is in the
// upper half. kTilesAtOnce: as there are registers for their keys; those are free when `keys_done`
// is called.
template <int kHalves, int kTilesAtOnce, int kDims, typename Chunk, typename KeysDone>
__device__ ChunkWeights WeighChunk(const AttentionTask& task, const Queries<kDims>& queries,
                                   const int (&positions)[2], int chunk, const Chunk& kv,
                                   const KeysDone& keys_done) {
  constexpr int kPairs = kDims / 32;  // of products along the dims
  const int lane = threadIdx.x % kWarpLanes, t = lane % 4;
  float scores[kTilesOfChunk][kKeyGroups][4];
  uint4 keys[kTilesAtOnce][kPairs][kKeyGroups];
#pragma unroll
  for (int first = 0; first < kTilesOfChunk; first += kTilesAtOnce) {
#pragma unroll
    for (int i = 0; i < kTilesAtOnce; ++i) LoadKeys(kv, first + i, keys[i]);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const uint4 a = queries.Operand(pair, 0, lane), b = queries.Operand(pair, 1, lane);
#pragma unroll
      for (int ij = 0; ij < kTilesAtOnce * kKeyGroups; ++ij) {
        const uint4& k = keys[ij / kKeyGroups][pair][ij % kKeyGroups];
        float(&sums)[4] = scores[first + ij / kKeyGroups][ij % kKeyGroups];
        if (pair == 0) {
          Multiply(sums, a.x, a.y, a.z, a.w, k.x, k.y);
        } else {
          MultiplyAdd(sums, a.x, a.y, a.z, a.w, k.x, k.y);
        }
      }
#pragma unroll
      for (int ij = 0; ij < kTilesAtOnce * kKeyGroups; ++ij) {
        const uint4& k = keys[ij / kKeyGroups][pair][ij % kKeyGroups];
        MultiplyAdd(scores[first + ij / kKeyGroups][ij % kKeyGroups], b.x, b.y, b.z, b.w, k.z, k.w);
      }
    }
  }
  keys_done();
  ChunkWeights result = {};
#pragma unroll
  for (int row = 0; row < kHalves; ++row) {
    float max = -INFINITY;
#pragma unroll
    for (int i = 0; i < kTilesOfChunk; ++i) {
#pragma unroll
      for (int j = 0; j < kKeyGroups; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int at = chunk * kTensorChunkPositions + i * kKvBlockPositions + 8 * t + 2 * j + c;
          float& score = scores[i][j][2 * row + c];
          score = at <= positions[row] ? score * task.scale : -INFINITY;
          max = fmaxf(max, score);
        }
      }
    }
    max = QuadMax(max);
    const float base = max == -INFINITY ? 0.0f : max;  // nothing seen: all weights are 0
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kTilesOfChunk; ++i) {
#pragma unroll
      for (int j = 0; j < kKeyGroups; ++j) {
        const __half2 pair = __floats2half2_rn(Exp2(scores[i][j][2 * row] - base),
                                               Exp2(scores[i][j][2 * row + 1] - base));
        result.weights[i][j][row] = *reinterpret_cast<const uint32_t*>(&pair);
        const float2 rounded = __half22float2(pair);
        sum += rounded.x + rounded.y;
      }
    }
    result.softmax[row] = {max, QuadSum(sum)};
  }
  return result;
}

// What a lane needs of the values' dims [kHalfDims * half, ...) in a chunk.
template <int kDims>
struct Values {
  uint4 values[kTilesOfChunk][kHalfSums];

  template <typename Chunk>
  __device__ void Load(int half, const Chunk& kv) {
    const int lane = threadIdx.x % kWarpLanes, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < kTilesOfChunk; ++i) {
#pragma unroll
      for (int m = 0; m < kHalfSums; ++m) {
        values[i][m] = kv.Value(i, half * kHalfDims + g + m * 8, t);
      }
    }
  }
};

// Their weighted sums over the chunk.
template <int kDims>
__device__ void SumValues(const ChunkWeights& chunk, const Values<kDims>& v,
                          float (&sums)[kHalfSums][4]) {
#pragma unroll
  for (int m = 0; m < kHalfSums; ++m) sums[m][0] = sums[m][1] = sums[m][2] = sums[m][3] = 0;
#pragma unroll
  for (int i = 0; i < kTilesOfChunk; ++i) {
    const auto& w = chunk.weights[i];
#pragma unroll
    for (int m = 0; m < kHalfSums; ++m) {
      const uint4& own = v.values[i][m];
      MultiplyAdd(sums[m], w[0][0], w[0][1], w[1][0], w[1][1], own.x, own.y);
      MultiplyAdd(sums[m], w[2][0], w[2][1], w[3][0], w[3][1], own.z, own.w);
    }
  }
}

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_CHUNK_PRODUCTS_CUH_
