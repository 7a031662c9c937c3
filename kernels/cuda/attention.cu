#include "kernels/cuda/attention.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "kernels/cuda/attention_task.cuh"
#include "kernels/cuda/device_ops.cuh"
#include "kernels/cuda/launch.cuh"

namespace stagecoach::cuda {
namespace {

constexpr int kMergeThreads = 128;

// Grid: x = heads, y = rows.
__global__ void MergeChunksKernel(const __grid_constant__ AttentionTask task, int chunk_positions) {
  LetNextKernelStart();
  WaitForPreviousKernel();
  const size_t row = blockIdx.y, head = row * task.heads + blockIdx.x;
  const int length = task.kv.value_length;
  const int chunks = task.table.positions[row] / chunk_positions + 1;
  const float* partials = task.partials + head * task.chunks * (length + 2);
  const AttendedHead out(task, blockIdx.y, blockIdx.x, length);
  for (int d = threadIdx.x; d < length; d += kMergeThreads) {
    out.Store(d, MergeChunks(partials, chunks, length, d));
  }
}

int ChunkPositions(const KvLayout& kv) {
  return kv.tensor_cores() ? kTensorChunkPositions : kGeneralChunkPositions;
}

// How many clusters of so many blocks there is room for at once. Some multiprocessors of a part of
// the GPU make up no cluster of 4 or 8: an H200, which has 132, runs 66 of 2, 30 of 4 or 15 of 8.
int ClustersAtOnce(int blocks, int multiprocessors) {
  return (blocks == 2 ? multiprocessors : multiprocessors * 10 / 11) / blocks;
}

// The most blocks that a cluster for each of so many tiles (of a KV head) may have, all at once, if
// that is enough for the chunks; otherwise 0.
int ClusterBlocks(int tiles, int chunks, int multiprocessors) {
  for (int blocks = kMostClusterBlocks; blocks > 1; blocks /= 2) {
    if (tiles <= ClustersAtOnce(blocks, multiprocessors)) {
      return chunks <= blocks * kTensorWarps ? blocks : 0;
    }
  }
  return 0;
}

}  // namespace

int RowsPerQueryTile(int group) { return std::max(1, kQueryTile / group); }

size_t PartialFloats(int rows, int heads, int chunks, int value_length) {
  return static_cast<size_t>(rows) * heads * chunks * (value_length + 2);
}

AttentionPlan PlanAttention(const AttentionShape& shape, int heads, const KvLayout& kv,
                            const GpuTraits& gpu, size_t scratch_floats) {
  AttentionPlan plan = {.rows = shape.rows, .heads = heads, .tiles = shape.tiles};
  plan.chunks =
      static_cast<int>(std::bit_ceil(unsigned(shape.last_position) / ChunkPositions(kv) + 1));
  if (!kv.tensor_cores()) {
    constexpr int kEnoughBlocks = 2;  // per multiprocessor
    if (plan.chunks > 1 && plan.rows * kv.kv_heads < kEnoughBlocks * gpu.multiprocessors &&
        PartialFloats(plan.rows, heads, plan.chunks, kv.value_length) <= scratch_floats) {
      plan.merge = AttentionPlan::Merge::kScratch;
    }
    return plan;
  }
  if (plan.tiles * kv.kv_heads >= kTensorWarps * gpu.multiprocessors) return plan;
  const HeadGroups groups = HeadGroups::Of(heads, kv.kv_heads);
  const int tiles = plan.tiles * kv.kv_heads * groups.slices;
  const bool bulk = gpu.kernels == KernelSet::kBulk;
  const int cluster = bulk ? ClusterBlocks(tiles, plan.chunks, gpu.multiprocessors) : 0;
  if (cluster > 0 && plan.chunks > kTensorWarps / 2) {
    plan.chunks = cluster * kTensorWarps;  // costs no more, and fewer shapes
    plan.merge = AttentionPlan::Merge::kCluster;
  } else if (plan.chunks <= WarpsThatMerge(QueriesTogether(plan, groups.group))) {
    plan.chunks = std::max(plan.chunks, kTensorWarps);  // as above
    plan.merge = AttentionPlan::Merge::kBlock;
    plan.alone = bulk && plan.chunks == kTensorWarps && tiles <= gpu.multiprocessors;
  } else if (PartialFloats(plan.rows, heads, plan.chunks, kv.value_length) <= scratch_floats) {
    plan.merge = AttentionPlan::Merge::kScratch;
  }
  plan.stores = plan.merge != AttentionPlan::Merge::kWalker && shape.sequences == shape.rows &&
                heads / kv.kv_heads <= kQueryTile;
  return plan;
}

cudaError_t StoreAndAttend(const AttentionPlan& plan, const RowTable& table,
                           const AttentionInputs& in, const KvLayout& kv, float* scratch,
                           const Activations& out, cudaStream_t stream) {
  if (!plan.stores) {
    const cudaError_t error = RopeAndStore(in.turns, in.pairs, table, plan.rows, plan.heads, in.q,
                                           in.k, in.v, kv, stream);
    if (error != cudaSuccess) return error;
  }
  constexpr float kLog2E = 1.44269504f;
  const bool to_scratch = plan.merge == AttentionPlan::Merge::kScratch;
  const AttentionTask task = {.table = table,
                              .in = in,
                              .store = plan.stores,
                              .out = out,
                              .partials = to_scratch ? scratch : nullptr,
                              .kv = kv,
                              .heads = plan.heads,
                              .groups = HeadGroups::Of(plan.heads, kv.kv_heads),
                              .tiles = plan.tiles,
                              .chunks = plan.chunks,
                              .scale = kLog2E / std::sqrt(static_cast<float>(kv.key_length))};
  const cudaError_t error = kv.tensor_cores() ? LaunchTensorAttention(plan, task, stream)
                                              : LaunchGeneralAttention(plan, task, stream);
  if (error != cudaSuccess || !to_scratch) return error;
  return LaunchKernel(MergeChunksKernel,
                      LaunchShape{.grid = dim3(plan.heads, plan.rows), .threads = kMergeThreads},
                      stream, task, ChunkPositions(kv));
}

}  // namespace stagecoach::cuda
