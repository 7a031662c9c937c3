// Attention by tensor cores: products of halves, sums in float32.
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
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>

#include "kernels/cuda/attention_task.cuh"
#include "kernels/cuda/device_ops.cuh"
#include "kernels/cuda/kv_store.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/warp.cuh"

namespace stagecoach::cuda {
namespace {

constexpr int kTilesOfChunk = kTensorChunkPositions / kKvBlockPositions;
constexpr int kGroups = 4;     // of 8 positions in a KV block
constexpr int kHalfDims = 64;  // of the result that are summed up at once
constexpr int kHalfSums = kHalfDims / 8;

constexpr int CeilDivide(int a, int b) { return (a + b - 1) / b; }

__device__ uint32_t PackHalves(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ float QuadMax(float value) {
  value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, 1));
  return fmaxf(value, __shfl_xor_sync(kAllLanes, value, 2));
}
__device__ float QuadSum(float value) {
  value += __shfl_xor_sync(kAllLanes, value, 1);
  return value + __shfl_xor_sync(kAllLanes, value, 2);
}

// The 16 queries of a warp; query m is head m % heads of row m / heads.
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
  // -1: sees nothing.
  __device__ int Position(int m, const int32_t* positions) const {
    return Valid(m) ? positions[first_row + RowOf(m)] : -1;
  }
};

// slice: of the KV head's query heads.
__device__ QueryTile MakeTile(const AttentionTask& task, int tile, int kv_head, int slice) {
  const HeadGroups& groups = task.groups;
  const uint32_t packed = task.table.tiles[tile];
  return {.first_row = static_cast<int>(packed / (kQueryTile + 1)),
          .rows = static_cast<int>(packed % (kQueryTile + 1)),
          .first_head = kv_head * groups.group + slice * groups.heads,
          .heads = groups.heads,
          .valid_heads = min(groups.heads, groups.group - slice * groups.heads),
          .reciprocal = groups.reciprocal};
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

// What a warp makes of one chunk for rows g and g + 8 of its tile, before values are added up.
struct ChunkWeights {
  uint32_t weights[kTilesOfChunk][kGroups][2];  // two positions each
  Softmax softmax[2];
};

// KV blocks of a chunk; one beyond the sequence's last is that one again.
template <int kDims>
__device__ const uint4* BlockOfTile(const AttentionTask& task, const int32_t* blocks, int kv_head,
                                    int tile, int last_position) {
  const size_t block = blocks[min(tile, last_position / kKvBlockPositions)];
  const size_t bytes_per_head = size_t{kKvBlockPositions} * 2 * kDims * sizeof(__half);
  return reinterpret_cast<const uint4*>(task.kv.data +
                                        (block * task.kv.kv_heads + kv_head) * bytes_per_head);
}

// positions: of rows g and g + 8; only the first counts with kHalves = 1, where no query is in the
// upper half. block(i): the chunk's i-th KV block.
template <int kHalves, int kDims, typename BlockOf>
__device__ ChunkWeights WeighChunk(const AttentionTask& task, const Queries<kDims>& queries,
                                   const int (&positions)[2], int chunk, const BlockOf& block) {
  constexpr int kPairs = kDims / 32;  // of products along the dims
  const int lane = threadIdx.x % kWarpLanes, g = lane / 4, t = lane % 4;
  float scores[kTilesOfChunk][kGroups][4];
#pragma unroll
  for (int i = 0; i < kTilesOfChunk; ++i) {
    const uint4* keys = block(i) + t * kKvBlockPositions + g / 2 * 8 + g % 2;
    uint4 k[kPairs][kGroups];
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        k[pair][j] = keys[pair * 4 * kKvBlockPositions + 2 * j];
      }
    }
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const uint4 a = queries.Operand(pair, 0, lane), b = queries.Operand(pair, 1, lane);
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        float(&sums)[4] = scores[i][j];
        if (pair == 0) {
          Multiply(sums, a.x, a.y, a.z, a.w, k[pair][j].x, k[pair][j].y);
        } else {
          MultiplyAdd(sums, a.x, a.y, a.z, a.w, k[pair][j].x, k[pair][j].y);
        }
        MultiplyAdd(sums, b.x, b.y, b.z, b.w, k[pair][j].z, k[pair][j].w);
      }
    }
  }
  ChunkWeights result = {};
#pragma unroll
  for (int row = 0; row < kHalves; ++row) {
    float max = -INFINITY;
#pragma unroll
    for (int i = 0; i < kTilesOfChunk; ++i) {
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
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
      for (int j = 0; j < kGroups; ++j) {
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

  template <typename BlockOf>
  __device__ void Load(int half, const BlockOf& block) {
    const int lane = threadIdx.x % kWarpLanes, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < kTilesOfChunk; ++i) {
      // They lie behind the keys, 32 positions of a dim in a row.
      const uint4* own = block(i) + kDims / 8 * kKvBlockPositions + (half * kHalfDims + g) * 4 + t;
#pragma unroll
      for (int m = 0; m < kHalfSums; ++m) values[i][m] = own[m * 8 * 4];
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

// One warp walks all chunks of its tile.
template <int kDims>
__device__ void Walk(const AttentionTask& task, const QueryTile& tile,
                     const Queries<kDims>& queries, int kv_head) {
  constexpr int kHalves = kDims / kHalfDims;
  const int lane = threadIdx.x % kWarpLanes, g = lane / 4, t = lane % 4;
  const int32_t* const positions = task.table.positions;
  const int32_t* const blocks = task.table.blocks + task.table.first[tile.first_row];
  const int last_position = positions[tile.first_row + tile.rows - 1];
  const int mine[2] = {tile.Position(g, positions), tile.Position(g + 8, positions)};
  Softmax softmax[2] = {};
  float values[kHalves][kHalfSums][4];
  for (int chunk = 0; chunk * kTensorChunkPositions <= last_position; ++chunk) {
    const auto block = [&](int i) {
      return BlockOfTile<kDims>(task, blocks, kv_head, chunk * kTilesOfChunk + i, last_position);
    };
    const ChunkWeights weights = WeighChunk<2>(task, queries, mine, chunk, block);
    MergeFactors factors[2];
    bool seen[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      seen[row] = chunk * kTensorChunkPositions <= mine[row];
      if (chunk == 0) {
        softmax[row] = weights.softmax[row];
      } else if (seen[row]) {
        factors[row] = MergeInto(softmax[row], weights.softmax[row]);
      }
    }
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      Values<kDims> v;
      v.Load(half, block);
      float sums[kHalfSums][4];
      SumValues(weights, v, sums);
#pragma unroll
      for (int m = 0; m < kHalfSums; ++m) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          float& value = values[half][m][c];
          if (chunk == 0) {
            value = sums[m][c];
          } else if (seen[c / 2]) {
            value = value * factors[c / 2].keep + sums[m][c] * factors[c / 2].add;
          }
        }
      }
    }
  }
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int query = g + 8 * row;
    if (!tile.Valid(query)) continue;
    const AttendedHead out(task, tile.Head(query, task.heads), kDims);
    const float inverse = 1.0f / softmax[row].sum;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int m = 0; m < kHalfSums; ++m) {
        out.StorePair(half * kHalfDims + m * 8 + 2 * t, values[half][m][2 * row] * inverse,
                      values[half][m][2 * row + 1] * inverse);
      }
    }
  }
}

// What a warp knows of its chunk from the table alone, before queries, keys and values are there.
template <int kDims>
struct ChunkPlace {
  int chunk;
  bool needed;       // some query sees it
  int positions[2];  // of rows g and g + 8
  const uint4* tiles[kTilesOfChunk];

  __device__ ChunkPlace(const AttentionTask& task, const QueryTile& tile, int kv_head, int chunk)
      : chunk(chunk) {
    const int g = threadIdx.x % kWarpLanes / 4;
    const int32_t* const table = task.table.positions;
    const int32_t* const blocks = task.table.blocks + task.table.first[tile.first_row];
    const int last_position = table[tile.first_row + tile.rows - 1];
    needed = chunk * kTensorChunkPositions <= last_position;
    for (int i = 0; i < 2; ++i) positions[i] = tile.Position(g + 8 * i, table);
    for (int i = 0; i < kTilesOfChunk; ++i) {
      tiles[i] =
          BlockOfTile<kDims>(task, blocks, kv_head, chunk * kTilesOfChunk + i, last_position);
    }
  }
  // Has keys and values brought from memory to the second-level cache.
  __device__ void Prefetch() const {
    if (!needed || !IsElected()) return;
    for (const uint4* tile : tiles) PrefetchBulk(tile, kKvBlockPositions * 2 * kDims * 2);
  }
};

// One warp, one chunk; results of query m to partial(m), [kDims + 2] floats. kEarly: there are
// registers for values before their weights are known.
template <int kHalves, bool kEarly, int kDims, typename PartialOf>
__device__ void RunChunk(const AttentionTask& task, const ChunkPlace<kDims>& place,
                         const Queries<kDims>& queries, const PartialOf& partial) {
  const int lane = threadIdx.x % kWarpLanes, g = lane / 4, t = lane % 4;
  const auto block = [&](int i) { return place.tiles[i]; };
  Values<kDims> v;
  if constexpr (kEarly) v.Load(0, block);
  const ChunkWeights weights =
      WeighChunk<kHalves>(task, queries, place.positions, place.chunk, block);
#pragma unroll
  for (int half = 0; half < kDims / kHalfDims; ++half) {
    if (!kEarly || half > 0) v.Load(half, block);
    float sums[kHalfSums][4];
    SumValues(weights, v, sums);
#pragma unroll
    for (int row = 0; row < kHalves; ++row) {
      if (place.chunk * kTensorChunkPositions > place.positions[row]) continue;
      float* out = partial(g + 8 * row);
#pragma unroll
      for (int m = 0; m < kHalfSums; ++m) {
        *reinterpret_cast<float2*>(out + half * kHalfDims + m * 8 + 2 * t) =
            make_float2(sums[m][2 * row], sums[m][2 * row + 1]);
      }
      if (half == 0 && t == 0) {
        *reinterpret_cast<float2*>(out + kDims) =
            make_float2(weights.softmax[row].max, weights.softmax[row].sum);
      }
    }
  }
}

// Grid: x = groups of eight tiles, y = KV heads (times slices of more than 16 query heads).
template <int kDims>
__global__ void __launch_bounds__(kTensorWarps* kWarpLanes)
    WalkKernel(const __grid_constant__ AttentionTask task) {
  __shared__ Queries<kDims> queries[kTensorWarps];
  LetNextKernelStart();
  WaitForPreviousKernel();
  const int warp = threadIdx.x / kWarpLanes, tile_index = blockIdx.x * kTensorWarps + warp;
  if (tile_index >= task.tiles) return;
  const int kv_head = task.groups.KvHead(blockIdx.y);
  const QueryTile tile = MakeTile(task, tile_index, kv_head, task.groups.Slice(blockIdx.y));
  queries[warp].Load(task, tile, threadIdx.x % kWarpLanes, kWarpLanes);
  __syncwarp();
  Walk(task, tile, queries[warp], kv_head);
}

// Grid: x = groups of kWarps chunks (one if the block merges them), y as above, z = tiles.
// kHalves: of 8 queries, of a tile.
template <int kDims, bool kMergeInBlock, int kHalves, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarpLanes)
    ChunksKernel(const __grid_constant__ AttentionTask task) {
  constexpr int kPartial = kDims + 2, kThreads = kWarps * kWarpLanes;
  __shared__ Queries<kDims> queries;
  LetNextKernelStart();
  const int kv_head = task.groups.KvHead(blockIdx.y);
  const QueryTile tile = MakeTile(task, blockIdx.z, kv_head, task.groups.Slice(blockIdx.y));
  const int last_position = task.table.positions[tile.first_row + tile.rows - 1];
  const int warp = threadIdx.x / kWarpLanes;
  const ChunkPlace<kDims> place(task, tile, kv_head, blockIdx.x * kWarps + warp);
  place.Prefetch();
  WaitForPreviousKernel();
  // Queries by the threads behind those that store: both have to wait for memory.
  queries.Load(task, tile, (threadIdx.x + kThreads / 2) % kThreads, kThreads);
  // The block that attends to the row's own position puts it there.
  const bool has_last = last_position / kTensorChunkPositions / kWarps == blockIdx.x;
  if (task.store && has_last) {
    const size_t row = tile.first_row;
    StoreHead<uint16_t, kThreads>(task.kv, task.table, row, kv_head, task.in.k, task.in.v,
                                  task.in.turns + row * task.in.pairs, task.in.pairs);
  }
  __syncthreads();
  if constexpr (kMergeInBlock) {
    float* const partials = reinterpret_cast<float*>(SharedMemory());  // [query][chunk][kPartial]
    const int queries_here = tile.rows * tile.heads;
    if (place.needed) {
      RunChunk<kHalves, kWarps == kTensorWarps>(
          task, place, queries, [&](int m) { return partials + (m * kWarps + warp) * kPartial; });
    }
    __syncthreads();
    for (int i = threadIdx.x; i < queries_here * kDims; i += kThreads) {
      const int m = i / kDims, d = i % kDims;
      if (!tile.Valid(m)) continue;
      const int chunks = tile.Position(m, task.table.positions) / kTensorChunkPositions + 1;
      AttendedHead(task, tile.Head(m, task.heads), kDims)
          .Store(d, MergeChunks(partials + m * kWarps * kPartial, chunks, kDims, d));
    }
  } else {
    if (!place.needed) return;
    RunChunk<kHalves, kWarps == kTensorWarps>(task, place, queries, [&](int m) {
      return task.partials + (tile.Head(m, task.heads) * task.chunks + place.chunk) * kPartial;
    });
  }
}

template <int kDims, bool kMergeInBlock, int kHalves, int kWarps>
cudaError_t LaunchChunks(const AttentionPlan& plan, const AttentionTask& task, int queries,
                         cudaStream_t stream) {
  const auto kernel = ChunksKernel<kDims, kMergeInBlock, kHalves, kWarps>;
  LaunchShape shape = {.threads = kWarps * kWarpLanes};
  shape.grid = dim3(kMergeInBlock ? 1 : CeilDivide(plan.chunks, kWarps),
                    task.kv.kv_heads * task.groups.slices, plan.tiles);
  if (kMergeInBlock) {
    constexpr int kQueryBytes = sizeof(float) * kWarps * (kDims + 2);
    shape.shared_bytes = queries * kQueryBytes;
    const cudaError_t error = AllowSharedMemory(kernel, kQueryTile / 2 * kHalves * kQueryBytes);
    if (error != cudaSuccess) return error;
  }
  return LaunchKernel(kernel, shape, stream, task);
}

template <int kDims, int kHalves>
cudaError_t LaunchHalves(const AttentionPlan& plan, const AttentionTask& task, int queries,
                         cudaStream_t stream) {
  if (plan.merge != AttentionPlan::Merge::kBlock) {
    return LaunchChunks<kDims, false, kHalves, kTensorWarps>(plan, task, queries, stream);
  }
  if constexpr (kHalves == 1) {
    if (plan.chunks > kTensorWarps) {
      return LaunchChunks<kDims, true, kHalves, WarpsThatMerge(1)>(plan, task, queries, stream);
    }
  }
  return LaunchChunks<kDims, true, kHalves, kTensorWarps>(plan, task, queries, stream);
}

template <int kDims>
cudaError_t LaunchDims(const AttentionPlan& plan, const AttentionTask& task, cudaStream_t stream) {
  if (plan.merge == AttentionPlan::Merge::kWalker) {
    LaunchShape shape = {.threads = kTensorWarps * kWarpLanes};
    shape.grid = dim3(CeilDivide(plan.tiles, kTensorWarps), task.kv.kv_heads * task.groups.slices);
    return LaunchKernel(WalkKernel<kDims>, shape, stream, task);
  }
  const int queries = QueriesTogether(plan, task.groups.group);
  return queries <= kQueryTile / 2 ? LaunchHalves<kDims, 1>(plan, task, queries, stream)
                                   : LaunchHalves<kDims, 2>(plan, task, queries, stream);
}

}  // namespace

cudaError_t LaunchTensorAttention(const AttentionPlan& plan, const AttentionTask& task,
                                  cudaStream_t stream) {
  return task.kv.key_length == 64 ? LaunchDims<64>(plan, task, stream)
                                  : LaunchDims<128>(plan, task, stream);
}

}  // namespace stagecoach::cuda
