#include <cuda_fp16.h>

#include <bit>
#include <cmath>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/device_ops.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/warp.cuh"

namespace stagecoach::cuda {
namespace {

constexpr int kWarps = kTilesPerChunk;  // one tile each
constexpr int kThreads = kWarps * kWarpLanes;
static_assert(kWarpLanes == kKvBlockPositions, "a lane per position");

constexpr int CeilDivide(int a, int b) { return (a + b - 1) / b; }

struct Task {
  RowTable table;
  const float* q;   // [rows][heads][key_length]
  float* out;       // [rows][heads][value_length]
  float* partials;  // [rows][heads][chunks]{ values [value_length], maximum, sum }; null: no split
  KvLayout kv;
  int heads;
  int chunks;
  float scale;
};

// Maximum of the scores, and sum of e^(score - maximum), over some positions.
struct Softmax {
  float max;
  float sum;
};

// What the merge of a later part multiplies the earlier and the later values by.
struct Merge {
  float keep;
  float add;
};

__device__ Merge MergeInto(Softmax& state, Softmax part) {
  const float max = fmaxf(state.max, part.max);
  const Merge merge = {expf(state.max - max), expf(part.max - max)};
  state = {max, state.sum * merge.keep + part.sum * merge.add};
  return merge;
}

// kCount consecutive elements, as one or two 16-byte loads or less.
template <int kCount>
__device__ void LoadElements(const float* p, float* out) {
  if constexpr (kCount == 2) {
    const float2 v = *reinterpret_cast<const float2*>(p);
    out[0] = v.x, out[1] = v.y;
  } else {
    for (int i = 0; i < kCount; i += 4) {
      const float4 v = *reinterpret_cast<const float4*>(p + i);
      out[i] = v.x, out[i + 1] = v.y, out[i + 2] = v.z, out[i + 3] = v.w;
    }
  }
}
template <int kCount>
__device__ void LoadElements(const __half* p, float* out) {
  struct alignas(kCount * sizeof(__half)) Halves {
    __half2 pairs[kCount / 2];
  };
  const Halves halves = *reinterpret_cast<const Halves*>(p);
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const float2 v = __half22float2(halves.pairs[i]);
    out[2 * i] = v.x, out[2 * i + 1] = v.y;
  }
}

// The work of one thread block: kHeads query heads that share a KV head, of one row. A lane holds
// kVector consecutive values, and the same again every 32 * kVector, kVectors times.
template <typename Element, int kHeads, int kVector, int kVectors>
struct BlockState {
  static constexpr int kValues = kVector * kVectors * kWarpLanes;

  float q[kHeads][kMaxHeadLength];
  float weights[kWarps][kHeads][kWarpLanes];
  float tile_values[kWarps][kHeads][kValues];
  Softmax tile_softmax[kWarps][kHeads];
  Merge tile_merge[kWarps][kHeads];
  Softmax softmax[kHeads];  // of the chunks so far
  Merge merge[kHeads];
  float values[kHeads][kValues];

  __device__ void LoadQueries(const Task& task, size_t first_head, int heads_here) {
    const int length = task.kv.key_length;
    for (int j = threadIdx.x; j < kHeads * kMaxHeadLength; j += kThreads) {
      const int h = j / kMaxHeadLength, d = j % kMaxHeadLength;
      q[h][d] = h < heads_here && d < length ? task.q[(first_head + h) * length + d] : 0.0f;
    }
    __syncthreads();
  }

  // One warp, one tile at `keys`, of which the row sees `visible` positions.
  __device__ void RunTile(const Task& task, const Element* keys, int visible) {
    const int warp = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
    float scores[kHeads] = {};
    const Element* key = keys + lane * 8;
#pragma unroll 8
    for (int d = 0; d < task.kv.key_length; d += 8, key += 8 * kKvBlockPositions) {
      float k[8];
      LoadElements<8>(key, k);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
#pragma unroll
        for (int i = 0; i < 8; ++i) scores[h] = fmaf(q[h][d + i], k[i], scores[h]);
      }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const bool seen = lane < visible;
      const float score = seen ? scores[h] * task.scale : -INFINITY;
      const float max = WarpMax(score);
      const float weight = seen ? expf(score - max) : 0.0f;
      weights[warp][h][lane] = weight;
      const float sum = WarpSum(weight);
      if (lane == 0) tile_softmax[warp][h] = {max, sum};
    }
    __syncwarp();
    SumValues(task, keys + task.kv.padded_keys() * kKvBlockPositions, visible);
  }

  __device__ void SumValues(const Task& task, const Element* values_of_tile, int visible) {
    const int warp = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
    const int stride = task.kv.padded_values();
    float sums[kHeads][kVectors][kVector] = {};
#pragma unroll 8
    for (int p = 0; p < visible; ++p) {
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        const int d = (j * kWarpLanes + lane) * kVector;
        float v[kVector] = {};
        if (d < stride) LoadElements<kVector>(values_of_tile + p * stride + d, v);
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            sums[h][j][i] = fmaf(weights[warp][h][p], v[i], sums[h][j][i]);
          }
        }
      }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          tile_values[warp][h][(j * kWarpLanes + lane) * kVector + i] = sums[h][j][i];
        }
      }
    }
  }

  // All threads: merges the first `tiles` tiles in order, and the result into what was before.
  __device__ void MergeTiles(int tiles, bool first_chunk) {
    __syncthreads();
    if (threadIdx.x < kHeads) {
      const int h = threadIdx.x;
      Softmax chunk = tile_softmax[0][h];
      for (int t = 1; t < tiles; ++t) tile_merge[t][h] = MergeInto(chunk, tile_softmax[t][h]);
      if (first_chunk) {
        softmax[h] = chunk;
      } else {
        merge[h] = MergeInto(softmax[h], chunk);
      }
    }
    __syncthreads();
    for (int j = threadIdx.x; j < kHeads * kValues; j += kThreads) {
      const int h = j / kValues, d = j % kValues;
      float value = tile_values[0][h][d];
      for (int t = 1; t < tiles; ++t) {
        value = value * tile_merge[t][h].keep + tile_values[t][h][d] * tile_merge[t][h].add;
      }
      values[h][d] = first_chunk ? value : values[h][d] * merge[h].keep + value * merge[h].add;
    }
    __syncthreads();
  }
};

template <typename Element, int kHeads, int kVector, int kVectors>
__global__ void __launch_bounds__(kThreads) AttendKernel(Task task) {
  using State = BlockState<Element, kHeads, kVector, kVectors>;
  __shared__ State state;
  LetNextKernelStart();
  WaitForPreviousKernel();
  const KvLayout& kv = task.kv;
  const size_t row = blockIdx.z;
  const int position = task.table.positions[row];
  const int tiles = position / kKvBlockPositions + 1, chunks = CeilDivide(tiles, kTilesPerChunk);
  const bool split = task.partials != nullptr;
  const int first_chunk = split ? blockIdx.x : 0;
  if (first_chunk >= chunks) return;
  const int last_chunk = split ? first_chunk + 1 : chunks;

  const int group = task.heads / kv.kv_heads, slices = CeilDivide(group, kHeads);
  const int kv_head = blockIdx.y / slices, first_of_group = blockIdx.y % slices * kHeads;
  const int heads_here = min(kHeads, group - first_of_group);
  const size_t first_head = row * task.heads + kv_head * group + first_of_group;
  state.LoadQueries(task, first_head, heads_here);

  const int32_t* blocks = task.table.blocks + task.table.first[row];
  const Element* head = reinterpret_cast<const Element*>(kv.data) + kv_head * kv.head_elements();
  for (int chunk = first_chunk; chunk < last_chunk; ++chunk) {
    const int tile = chunk * kTilesPerChunk + threadIdx.x / kWarpLanes;
    if (tile < tiles) {
      const size_t block = blocks[tile];
      state.RunTile(task, head + block * kv.kv_heads * kv.head_elements(),
                    min(kKvBlockPositions, position + 1 - tile * kKvBlockPositions));
    }
    state.MergeTiles(min(kTilesPerChunk, tiles - chunk * kTilesPerChunk), chunk == first_chunk);
  }

  for (int j = threadIdx.x; j < heads_here * State::kValues; j += kThreads) {
    const int h = j / State::kValues, d = j % State::kValues;
    if (d >= kv.value_length) continue;
    if (split) {
      float* partial =
          task.partials + ((first_head + h) * task.chunks + first_chunk) * (kv.value_length + 2);
      partial[d] = state.values[h][d];
      if (d == 0) {
        partial[kv.value_length] = state.softmax[h].max;
        partial[kv.value_length + 1] = state.softmax[h].sum;
      }
    } else {
      task.out[(first_head + h) * kv.value_length + d] =
          state.values[h][d] * (1.0f / state.softmax[h].sum);
    }
  }
}

// Merges the chunks of one head of one row in order.
__global__ void MergeChunksKernel(Task task) {
  LetNextKernelStart();
  WaitForPreviousKernel();
  const size_t row = blockIdx.y, head = row * task.heads + blockIdx.x;
  const int length = task.kv.value_length;
  const int chunks = CeilDivide(task.table.positions[row] + 1, kChunkPositions);
  const float* partial = task.partials + head * task.chunks * (length + 2);
  for (int d = threadIdx.x; d < length; d += blockDim.x) {
    Softmax softmax = {partial[length], partial[length + 1]};
    float value = partial[d];
    for (int chunk = 1; chunk < chunks; ++chunk) {
      const float* next = partial + chunk * (length + 2);
      const Merge merge = MergeInto(softmax, {next[length], next[length + 1]});
      value = value * merge.keep + next[d] * merge.add;
    }
    task.out[head * length + d] = value * (1.0f / softmax.sum);
  }
}

template <typename Element, int kVector, int kVectors>
cudaError_t LaunchAttend(const AttentionPlan& plan, const Task& task, cudaStream_t stream) {
  const int group = plan.heads / task.kv.kv_heads;
  const auto launch = [&](auto kernel, int heads) {
    const dim3 grid(plan.split ? plan.chunks : 1, task.kv.kv_heads * CeilDivide(group, heads),
                    plan.rows);
    return LaunchKernel(kernel, LaunchShape{.grid = grid, .threads = kThreads}, stream, task);
  };
  if (group == 1) return launch(AttendKernel<Element, 1, kVector, kVectors>, 1);
  if (group == 2) return launch(AttendKernel<Element, 2, kVector, kVectors>, 2);
  if constexpr (kVectors > 1) {
    return launch(AttendKernel<Element, 2, kVector, kVectors>, 2);  // shared memory
  } else {
    return launch(AttendKernel<Element, 4, kVector, kVectors>, 4);
  }
}

template <typename Element>
cudaError_t LaunchAttend(const AttentionPlan& plan, const Task& task, cudaStream_t stream) {
  if (task.kv.value_length <= 64) return LaunchAttend<Element, 2, 1>(plan, task, stream);
  if (task.kv.value_length <= 128) return LaunchAttend<Element, 4, 1>(plan, task, stream);
  return LaunchAttend<Element, 4, 2>(plan, task, stream);
}

}  // namespace

size_t PartialFloats(int rows, int heads, int chunks, int value_length) {
  return static_cast<size_t>(rows) * heads * chunks * (value_length + 2);
}

AttentionPlan PlanAttention(int rows, int heads, int kv_heads, int value_length, int last_position,
                            int multiprocessors, size_t scratch_floats) {
  AttentionPlan plan = {.rows = rows, .heads = heads};
  plan.chunks = static_cast<int>(std::bit_ceil(unsigned(last_position) / kChunkPositions + 1));
  constexpr int kBlocksPerMultiprocessor = 2;
  const bool few = rows * kv_heads < kBlocksPerMultiprocessor * multiprocessors;
  plan.split = few && plan.chunks > 1 &&
               PartialFloats(rows, heads, plan.chunks, value_length) <= scratch_floats;
  return plan;
}

cudaError_t Attend(const AttentionPlan& plan, const RowTable& table, const float* q,
                   const KvLayout& kv, float* scratch, float* out, cudaStream_t stream) {
  const Task task = {.table = table,
                     .q = q,
                     .out = out,
                     .partials = plan.split ? scratch : nullptr,
                     .kv = kv,
                     .heads = plan.heads,
                     .chunks = plan.chunks,
                     .scale = 1.0f / std::sqrt(static_cast<float>(kv.key_length))};
  const cudaError_t error =
      kv.half ? LaunchAttend<__half>(plan, task, stream) : LaunchAttend<float>(plan, task, stream);
  if (error != cudaSuccess || !plan.split) return error;
  constexpr int kMergeThreads = 128;
  return LaunchKernel(MergeChunksKernel,
                      LaunchShape{.grid = dim3(plan.heads, plan.rows), .threads = kMergeThreads},
                      stream, task);
}

}  // namespace stagecoach::cuda
