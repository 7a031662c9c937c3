#include <cuda_fp16.h>

#include <cmath>

#include "kernels/cuda/attention_task.cuh"
#include "kernels/cuda/device_ops.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/warp.cuh"

namespace stagecoach::cuda {
namespace {

// A tile of kKvBlockPositions is a warp's, a chunk of eight tiles a block's. Within a chunk, each
// tile starts fresh, and they are merged in order.
constexpr int kWarps = kTilesPerChunk;
constexpr int kThreads = kWarps * kWarpLanes;
static_assert(kWarpLanes == kKvBlockPositions, "a lane per position");

constexpr int CeilDivide(int a, int b) { return (a + b - 1) / b; }

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
  MergeFactors tile_merge[kWarps][kHeads];
  Softmax softmax[kHeads];  // of the chunks so far
  MergeFactors merge[kHeads];
  float values[kHeads][kValues];

  __device__ void LoadQueries(const AttentionTask& task, size_t first_head, int heads_here) {
    const int length = task.kv.key_length;
    for (int j = threadIdx.x; j < kHeads * kMaxHeadLength; j += kThreads) {
      const int h = j / kMaxHeadLength, d = j % kMaxHeadLength;
      q[h][d] = h < heads_here && d < length ? task.in.q[(first_head + h) * length + d] : 0.0f;
    }
    __syncthreads();
  }

  // One warp, one tile at `keys`, of which the row sees `visible` positions.
  __device__ void RunTile(const AttentionTask& task, const Element* keys, int visible) {
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
      const float weight = seen ? exp2f(score - max) : 0.0f;
      weights[warp][h][lane] = weight;
      const float sum = WarpSum(weight);
      if (lane == 0) tile_softmax[warp][h] = {max, sum};
    }
    __syncwarp();
    SumValues(task, keys + task.kv.padded_keys() * kKvBlockPositions, visible);
  }

  __device__ void SumValues(const AttentionTask& task, const Element* values_of_tile, int visible) {
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
__global__ void __launch_bounds__(kThreads)
    AttendKernel(const __grid_constant__ AttentionTask task) {
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
  const int first_of_row = kv_head * group + first_of_group;
  const size_t first_head = row * task.heads + first_of_row;
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
      AttendedHead(task, static_cast<int>(row), first_of_row + h, kv.value_length)
          .Store(d, state.values[h][d] * (1.0f / state.softmax[h].sum));
    }
  }
}

template <typename Element, int kVector, int kVectors>
cudaError_t LaunchAttend(const AttentionPlan& plan, const AttentionTask& task,
                         cudaStream_t stream) {
  const int group = plan.heads / task.kv.kv_heads;
  const auto launch = [&](auto kernel, int heads) {
    const dim3 grid(task.partials != nullptr ? plan.chunks : 1,
                    task.kv.kv_heads * CeilDivide(group, heads), plan.rows);
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
cudaError_t LaunchAttend(const AttentionPlan& plan, const AttentionTask& task,
                         cudaStream_t stream) {
  if (task.kv.value_length <= 64) return LaunchAttend<Element, 2, 1>(plan, task, stream);
  if (task.kv.value_length <= 128) return LaunchAttend<Element, 4, 1>(plan, task, stream);
  return LaunchAttend<Element, 4, 2>(plan, task, stream);
}

}  // namespace

cudaError_t LaunchGeneralAttention(const AttentionPlan& plan, const AttentionTask& task,
                                   cudaStream_t stream) {
  return task.kv.half ? LaunchAttend<__half>(plan, task, stream)
                      : LaunchAttend<float>(plan, task, stream);
}

}  // namespace stagecoach::cuda
