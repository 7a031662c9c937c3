// What the attention kernels share.
#ifndef STAGECOACH_KERNELS_CUDA_ATTENTION_TASK_CUH_
#define STAGECOACH_KERNELS_CUDA_ATTENTION_TASK_CUH_

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/cuda/activation_ops.cuh"
#include "kernels/cuda/attention.h"

namespace stagecoach::cuda {

// How the query heads of a KV head are taken together, up to kQueryTile at a time; precomputed, as
// divisions take long.
struct HeadGroups {
  int group;       // query heads of a KV head
  int heads;       // of a slice
  int slices;      // of a KV head
  int reciprocal;  // m / heads is m * reciprocal >> 16 for m up to kQueryTile

  static HeadGroups Of(int heads, int kv_heads) {
    HeadGroups result = {.group = heads / kv_heads};
    result.heads = result.group < kQueryTile ? result.group : kQueryTile;
    result.slices = (result.group + result.heads - 1) / result.heads;
    result.reciprocal = 65536 / result.heads + 1;
    return result;
  }
  // head_slice: counts the slices of all KV heads.
  __device__ int KvHead(int head_slice) const {
    return slices == 1 ? head_slice : head_slice / slices;
  }
  __device__ int Slice(int head_slice) const { return slices == 1 ? 0 : head_slice % slices; }
};

struct AttentionTask {
  RowTable table;
  AttentionInputs in;
  bool store;       // `in` has neither been turned nor stored; each row is a tile
  Activations out;  // [rows][heads * value_length]
  float* partials;  // kScratch: [rows][heads][chunks]{ values [value_length], maximum, sum }
  KvLayout kv;
  int heads;
  HeadGroups groups;
  int tiles;
  int chunks;
  float scale;  // log2(e) / sqrt(key_length): scores are exponents of 2
};

// Where the result of one row and head goes.
class AttendedHead {
 public:
  // length: of values.
  __device__ AttendedHead(const AttentionTask& task, int row, int head, int length)
      : out_(task.out), row_(row), column_(head * length) {}

  __device__ void Store(int d, float value) const {
    if (out_.form == ActivationForm::kFloat) {
      out_.values[static_cast<size_t>(row_) * out_.k + column_ + d] = value;
    } else {
      out_.halves[out_.HalfPlace(row_, column_ + d)] = ToHalfActivation(value);
    }
  }
  // Of d and d + 1; d is even.
  __device__ void StorePair(int d, float first, float second) const {
    if (out_.form == ActivationForm::kFloat) {
      *reinterpret_cast<float2*>(out_.values + static_cast<size_t>(row_) * out_.k + column_ + d) =
          make_float2(first, second);
    } else {
      *reinterpret_cast<__half2*>(out_.halves + out_.HalfPlace(row_, column_ + d)) =
          ToHalfActivations(first, second);
    }
  }

 private:
  const Activations& out_;
  int row_, column_;
};

// Of x <= 0, without care for results below 2^-126, which are 0.
__device__ inline float Exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// The maximum score, and the sum of 2^(score - maximum), over some positions.
struct Softmax {
  float max;
  float sum;
};

// What the earlier and the later values are multiplied by when they are added up.
struct MergeFactors {
  float keep;
  float add;
};

__device__ inline MergeFactors MergeInto(Softmax& state, Softmax part) {
  const float max = fmaxf(state.max, part.max);
  const MergeFactors factors = {Exp2(state.max - max), Exp2(part.max - max)};
  state = {max, state.sum * factors.keep + part.sum * factors.add};
  return factors;
}

// Dim d of the result of partials [chunks]{ values [length], maximum, sum }, merged in order.
__device__ inline float MergeChunks(const float* partials, int chunks, int length, int d) {
  Softmax softmax = {partials[length], partials[length + 1]};
  float value = partials[d];
#pragma unroll 4  // several chunks are read at once
  for (int chunk = 1; chunk < chunks; ++chunk) {
    const float* next = partials + static_cast<size_t>(chunk) * (length + 2);
    const MergeFactors factors = MergeInto(softmax, {next[length], next[length + 1]});
    value = value * factors.keep + next[d] * factors.add;
  }
  return value * (1.0f / softmax.sum);
}

// The two kernels' launchers. Chunks of the general one:
inline constexpr int kTilesPerChunk = 8;  // of kKvBlockPositions
inline constexpr int kGeneralChunkPositions = kTilesPerChunk * kKvBlockPositions;
cudaError_t LaunchGeneralAttention(const AttentionPlan& plan, const AttentionTask& task,
                                   cudaStream_t stream);
// Of the one with tensor cores:
inline constexpr int kTensorChunkPositions = 2 * kKvBlockPositions;
inline constexpr int kTensorWarps = 8;
// Of a block that merges the chunks of so many queries, a warp each: shared memory holds them.
constexpr int WarpsThatMerge(int queries) {
  return queries <= kQueryTile / 2 ? 2 * kTensorWarps : kTensorWarps;
}
// Of a cluster, each with kTensorWarps chunks.
inline constexpr int kMostClusterBlocks = 8;
// Queries of a tile: of one row if each tile has one, as in decode steps.
inline int QueriesTogether(const AttentionPlan& plan, int group) {
  return plan.tiles == plan.rows ? std::min(group, kQueryTile) : kQueryTile;
}
cudaError_t LaunchTensorAttention(const AttentionPlan& plan, const AttentionTask& task,
                                  cudaStream_t stream);

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_ATTENTION_TASK_CUH_
