// Attention by tensor cores: products of halves (chunk_products.cuh), sums in float32. A warp takes
// a tile of 16 queries and chunks of 64 positions.
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "kernels/cuda/attention_merge.cuh"
#include "kernels/cuda/attention_task.cuh"
#include "kernels/cuda/chunk_products.cuh"
#include "kernels/cuda/device_ops.cuh"
#include "kernels/cuda/kv_chunk.cuh"
#include "kernels/cuda/kv_store.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/query_tile.cuh"
#include "kernels/cuda/warp.cuh"

namespace stagecoach::cuda {
namespace {

using Merge = AttentionPlan::Merge;

constexpr int CeilDivide(int a, int b) { return (a + b - 1) / b; }

// KV blocks of a chunk; one beyond the sequence's last is that one again.
template <int kDims>
__device__ const uint4* BlockOfTile(const AttentionTask& task, const int32_t* blocks, int kv_head,
                                    int tile, int last_position) {
  const size_t block = blocks[min(tile, last_position / kKvBlockPositions)];
  const size_t bytes_per_head = size_t{kKvBlockPositions} * 2 * kDims * sizeof(__half);
  return reinterpret_cast<const uint4*>(task.kv.data +
                                        (block * task.kv.kv_heads + kv_head) * bytes_per_head);
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
    CachedChunk<kDims> kv;
    for (int i = 0; i < kTilesOfChunk; ++i) {
      kv.tiles[i] =
          BlockOfTile<kDims>(task, blocks, kv_head, chunk * kTilesOfChunk + i, last_position);
    }
    const ChunkWeights weights = WeighChunk<2, 1>(task, queries, mine, chunk, kv, [] {});
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
      v.Load(half, kv);
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
    const AttendedHead out = tile.Out(query, task, kDims);
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
  CachedChunk<kDims> cached;

  __device__ ChunkPlace(const AttentionTask& task, const QueryTile& tile, int kv_head, int chunk)
      : chunk(chunk) {
    const int g = threadIdx.x % kWarpLanes / 4;
    const int32_t* const table = task.table.positions;
    const int32_t* const blocks = task.table.blocks + task.table.first[tile.first_row];
    const int last_position = table[tile.first_row + tile.rows - 1];
    needed = chunk * kTensorChunkPositions <= last_position;
    for (int i = 0; i < 2; ++i) positions[i] = tile.Position(g + 8 * i, table);
    for (int i = 0; i < kTilesOfChunk; ++i) {
      cached.tiles[i] =
          BlockOfTile<kDims>(task, blocks, kv_head, chunk * kTilesOfChunk + i, last_position);
    }
  }
  // Has keys and values brought from memory to the second-level cache.
  __device__ void Prefetch() const {
    if constexpr (kBulkCode) {
      if (!needed || !IsElected()) return;
      for (const uint4* tile : cached.tiles) PrefetchBulk(tile, kKvBlockPositions * 2 * kDims * 2);
    }
  }
};

// How much of a chunk there are registers for before it is needed.
enum class ReadAhead {
  kKeys,        // of a KV block, alone
  kSomeValues,  // and those of the first kHalfDims
  kAll,         // all keys, and then, where those were, all values
};

// One warp, one chunk; of query m dims d and d + 1 go to store(m, d, pair), maximum and sum too, as
// d = kDims.
template <int kHalves, ReadAhead kAhead, int kDims, typename Chunk, typename StorePair>
__device__ void RunChunk(const AttentionTask& task, const ChunkPlace<kDims>& place, const Chunk& kv,
                         const Queries<kDims>& queries, const StorePair& store) {
  constexpr bool kAll = kAhead == ReadAhead::kAll;
  constexpr int kParts = kDims / kHalfDims;
  // Of shared memory keys come soon: then it is products that wait for each other.
  constexpr bool kStaged = std::is_same_v<Chunk, StagedChunk<kDims>>;
  constexpr int kTilesAtOnce = kAll || kStaged ? kTilesOfChunk : 1;
  const int lane = threadIdx.x % kWarpLanes, g = lane / 4, t = lane % 4;
  Values<kDims> v[kAll ? kParts : 1];
  if constexpr (kAhead == ReadAhead::kSomeValues) v[0].Load(0, kv);
  const ChunkWeights weights =
      WeighChunk<kHalves, kTilesAtOnce>(task, queries, place.positions, place.chunk, kv, [&] {
#pragma unroll
        for (int half = 0; half < kParts && kAll; ++half) v[half].Load(half, kv);
      });
#pragma unroll
  for (int half = 0; half < kParts; ++half) {
    if (kAhead == ReadAhead::kKeys || (!kAll && half > 0)) v[0].Load(half, kv);
    float sums[kHalfSums][4];
    SumValues(weights, v[kAll ? half : 0], sums);
#pragma unroll
    for (int row = 0; row < kHalves; ++row) {
      if (place.chunk * kTensorChunkPositions > place.positions[row]) continue;
      const int query = g + 8 * row;
#pragma unroll
      for (int m = 0; m < kHalfSums; ++m) {
        store(query, half * kHalfDims + m * 8 + 2 * t,
              make_float2(sums[m][2 * row], sums[m][2 * row + 1]));
      }
      if (half == 0 && t == 0) {
        store(query, kDims, make_float2(weights.softmax[row].max, weights.softmax[row].sum));
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

// Grid: x = groups of kWarps chunks, one if the block merges them, a cluster if that does; y as
// above, z = tiles. kHalves: of 8 queries, of a tile. kAlone: on the multiprocessor. The compiler
// is told, or it saves registers by reading late.
template <int kDims, Merge kMerge, int kHalves, int kWarps, bool kAlone>
__global__ void __launch_bounds__(kWarps* kWarpLanes, kAlone ? 1 : 0)
    ChunksKernel(const __grid_constant__ AttentionTask task) {
  if (kMerge == Merge::kCluster && !kBulkCode) return;  // not in that set
  constexpr int kThreads = kWarps * kWarpLanes;
  constexpr bool kCluster = kMerge == Merge::kCluster;
  constexpr ReadAhead kAhead = kAlone                   ? ReadAhead::kAll
                               : kWarps == kTensorWarps ? ReadAhead::kSomeValues
                                                        : ReadAhead::kKeys;
  __shared__ Queries<kDims> queries;
  __shared__ int chunks_of[kQueryTile];  // that a query sees
  if (!kAlone) LetNextKernelStart();
  if constexpr (kCluster) TellClusterOfStart();
  const int kv_head = task.groups.KvHead(blockIdx.y);
  const QueryTile tile = MakeTile(task, blockIdx.z, kv_head, task.groups.Slice(blockIdx.y));
  const int last_position = task.table.positions[tile.first_row + tile.rows - 1];
  const int last_chunk = last_position / kTensorChunkPositions;
  const int last_tile = last_position / kKvBlockPositions;
  const int warp = threadIdx.x / kWarpLanes, block = blockIdx.x, blocks = gridDim.x;
  // A cluster's blocks take a chunk each before any takes a second one.
  const ChunkPlace<kDims> place(task, tile, kv_head,
                                kCluster ? warp * blocks + block : block * kWarps + warp);
  uint8_t* const shared = SharedMemory();
  auto* const partials_memory = reinterpret_cast<float*>(shared + StagedBytes<kDims>(kAlone));
  const bool staged = kAlone && warp < kStagedWarps;
  const StagedChunk<kDims> stage = {
      reinterpret_cast<uint4*>(shared + warp * StagedChunk<kDims>::kBytes)};
  // All but the row's own position was there before this step (step_begin.cu).
  const bool early = task.store;
  const auto fetch = [&] {
    stage.Fetch(place.cached, last_tile + 1 - place.chunk * kTilesOfChunk);
  };
  if (staged && early && place.needed) {
    fetch();
  } else {
    place.Prefetch();
  }
  if (kMerge != Merge::kScratch && threadIdx.x < kQueryTile) {
    const int position = tile.Position(threadIdx.x, task.table.positions);
    chunks_of[threadIdx.x] = position < 0 ? 0 : position / kTensorChunkPositions + 1;
  }
  // The block that attends to the row's own position puts it there.
  const size_t row = tile.first_row;
  const HeadPlace<uint16_t> own(task.kv, task.table, row, kv_head);
  const bool has_last = (kCluster ? last_chunk % blocks : last_chunk / kWarps) == block;
  const int last_warp = kCluster ? last_chunk / blocks : last_chunk % kWarps;
  WaitForPreviousKernel();
  if (staged && !early && place.needed) fetch();
  // Queries by the threads behind those that store: both have to wait for memory.
  queries.Load(task, tile, (threadIdx.x + kThreads / 2) % kThreads, kThreads);
  if (task.store && has_last) {
    const auto store = [&](const auto& stage) {
      StoreHead<kThreads>(own, task.kv, row, kv_head, task.in.k, task.in.v,
                          task.in.turns + row * task.in.pairs, task.in.pairs, stage);
    };
    if constexpr (kAlone) {
      using Chunk = StagedChunk<kDims>;
      uint4* const last = reinterpret_cast<uint4*>(shared + last_warp * Chunk::kBytes) +
                          last_tile % kTilesOfChunk * Chunk::kTileVectors;
      store(StagedHead<kDims>{last_warp < kStagedWarps ? last : nullptr});
    } else {
      store(NotStaged());
    }
  }
  // Not sooner, or the next kernel's weights come before what so many blocks wait for.
  if (kAlone) {
    LetNextKernelStart();
    AwaitCopies();
  }
  __syncthreads();
  const auto run = [&](const auto& store) {
    if (kAlone && staged) {
      RunChunk<kHalves, ReadAhead::kKeys>(task, place, stage, queries, store);
    } else {
      RunChunk<kHalves, kAhead>(task, place, place.cached, queries, store);
    }
  };
  if constexpr (kMerge == Merge::kScratch) {
    if (!place.needed) return;
    run([&](int query, int d, float2 pair) {
      float* const partial =
          task.partials + (tile.Head(query, task.heads) * task.chunks + place.chunk) * (kDims + 2);
      *reinterpret_cast<float2*>(partial + d) = pair;
    });
  } else if constexpr (kMerge == Merge::kBlock) {
    const SharedPartials<kDims> partials = {
        .memory = partials_memory, .blocks = 1, .chunks = kWarps};
    if (place.needed) {
      run([&](int query, int d, float2 pair) { partials.StoreHere(query, warp, d, pair); });
    }
    __syncthreads();
    MergeQueries<kThreads>(task, tile, chunks_of, partials);
  } else {
    const SharedPartials<kDims> partials = {
        .memory = partials_memory, .blocks = gridDim.x, .chunks = blocks * kWarps};
    AwaitCluster();  // all have started
    if (place.needed) {
      run([&](int query, int d, float2 pair) {
        partials.StoreInBlocks(query, place.chunk, d, pair);
      });
    }
    ArriveAtCluster();
    AwaitCluster();
    MergeQueries<kThreads>(task, tile, chunks_of, partials);
  }
}

template <int kDims, Merge kMerge, int kHalves, int kWarps, bool kAlone = false>
cudaError_t LaunchChunks(const AttentionPlan& plan, const AttentionTask& task, int queries,
                         cudaStream_t stream) {
  const auto kernel = ChunksKernel<kDims, kMerge, kHalves, kWarps, kAlone>;
  const int groups = CeilDivide(plan.chunks, kWarps);
  LaunchShape shape = {.threads = kWarps * kWarpLanes};
  shape.grid = dim3(groups, task.kv.kv_heads * task.groups.slices, plan.tiles);
  if (kMerge == Merge::kCluster) shape.cluster = groups;
  if (kMerge != Merge::kScratch) {
    constexpr int kMostBlocks = kMerge == Merge::kCluster ? kMostClusterBlocks : 1;
    const auto bytes = [](int queries, int blocks) {
      return StagedBytes<kDims>(kAlone) +
             SharedPartials<kDims>::Bytes(queries, blocks, blocks * kWarps);
    };
    shape.shared_bytes = bytes(queries, groups);
    shape.most_shared_bytes = bytes(kQueryTile / 2 * kHalves, kMostBlocks);
  }
  return LaunchKernel(kernel, shape, stream, task);
}

template <int kDims, int kHalves>
cudaError_t LaunchHalves(const AttentionPlan& plan, const AttentionTask& task, int queries,
                         cudaStream_t stream) {
  if (plan.merge == Merge::kScratch) {
    return LaunchChunks<kDims, Merge::kScratch, kHalves, kTensorWarps>(plan, task, queries, stream);
  }
  if (plan.merge == Merge::kCluster) {
    return LaunchChunks<kDims, Merge::kCluster, kHalves, kTensorWarps, true>(plan, task, queries,
                                                                             stream);
  }
  if constexpr (kHalves == 1) {
    if (plan.chunks > kTensorWarps) {
      return LaunchChunks<kDims, Merge::kBlock, kHalves, WarpsThatMerge(1)>(plan, task, queries,
                                                                            stream);
    }
    if (plan.alone) {
      return LaunchChunks<kDims, Merge::kBlock, kHalves, kTensorWarps, true>(plan, task, queries,
                                                                             stream);
    }
  }
  return LaunchChunks<kDims, Merge::kBlock, kHalves, kTensorWarps>(plan, task, queries, stream);
}

template <int kDims>
cudaError_t LaunchDims(const AttentionPlan& plan, const AttentionTask& task, cudaStream_t stream) {
  if (plan.merge == Merge::kWalker) {
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
  const bool bulk = plan.merge == Merge::kCluster || plan.alone;
  if (bulk && CurrentKernelSet() != KernelSet::kBulk) return cudaErrorNotSupported;
  return task.kv.key_length == 64 ? LaunchDims<64>(plan, task, stream)
                                  : LaunchDims<128>(plan, task, stream);
}

}  // namespace stagecoach::cuda
