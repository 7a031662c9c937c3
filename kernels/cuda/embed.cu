#include "kernels/cuda/embed.h"

#include "kernels/cuda/device_ops.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/sampling.h"
#include "model/block_decode.h"

namespace stagecoach::cuda {
namespace {

constexpr int kThreads = 256;

// Grid: x = rows, y = runs of kThreads columns.
template <typename Block>
__global__ void EmbedKernel(const Block* table, int columns, const int32_t* ids,
                            const int32_t* picks, float* out) {
  LetNextKernelStart();
  WaitForPreviousKernel();
  const int blocks_per_row = columns / Block::kElements;
  int id = ids[blockIdx.x];
  if (id < 0) id = max(picks[PickOf(id)], 0);  // PickOf is its own inverse
  const Block* row = table + static_cast<size_t>(id) * blocks_per_row;
  out += static_cast<size_t>(blockIdx.x) * columns;
  const int k = static_cast<int>(blockIdx.y * kThreads + threadIdx.x);
  if (k >= columns) return;
  const Block& block = row[k / Block::kElements];
  if constexpr (Block::kElements == 1) {
    out[k] = block.value();
  } else {  // as DecodeBlock
    const int i = k % Block::kElements, group = i / Block::kGroup;
    const float scale = block.delta() * static_cast<float>(block.scale(group));
    const float min = block.delta_min() * static_cast<float>(block.min(group));
    out[k] = scale * static_cast<float>(block.quant(i)) - min;
  }
}

}  // namespace

cudaError_t EmbedRows(TensorType type, const void* table, int columns, const int32_t* ids,
                      const int32_t* picks, int rows, float* out, cudaStream_t stream) {
  const LaunchShape shape = {.grid = dim3(rows, (columns + kThreads - 1) / kThreads),
                             .threads = kThreads};
  return VisitBlockType(type, [&]<typename Block>() {
    return LaunchKernel(EmbedKernel<Block>, shape, stream, static_cast<const Block*>(table),
                        columns, ids, picks, out);
  });
}

}  // namespace stagecoach::cuda
