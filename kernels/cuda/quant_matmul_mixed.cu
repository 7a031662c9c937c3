// Products of few rows of activations and terms of Q4_K and Q6_K, as q and k are of the one and v
// of the other in half of a Q4_K_M file's layers: in one kernel, some blocks for each. Two kernels
// in turn would each wait, norm and fill their multiprocessors' queues anew.
//
// Products of one of the two types are made by this kernel, too, unless they are beside a third one
// or their activations do not fit shared memory. Otherwise a layer would have more code, which
// costs more than this kernel gains (docs/tuning.md).
#include <algorithm>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/stream_kernel.cuh"
#include "kernels/cuda/typed_matmul.cuh"

namespace stagecoach::cuda {
namespace {

using Q4Tile = TileOf<TensorType::kQ4_K>;
using Q6Tile = TileOf<TensorType::kQ6_K>;

template <int kColumns>
__global__ void __launch_bounds__(kStreamThreads, 1)
    MixedStreamKernel(const __grid_constant__ MixedParameters p) {
  if (!kBulkCode) return;  // not in that set
  const int block = blockIdx.x, q6_block = block - p.q4_k.shares.blocks;
  if (q6_block < 0) {
    RunStreamBlock<Q4Tile, kColumns, true>(p.q4_k, block);
  } else {
    RunStreamBlock<Q6Tile, kColumns, true>(p.q6_k, q6_block);
  }
}

template <int kColumns>
cudaError_t Launch(const MixedParameters& p, const DeviceLimits& device, cudaStream_t stream) {
  const size_t bytes =
      std::max(StreamLayout<Q4Tile, kColumns, true>::Bytes(p.q4_k.superblocks, p.q4_k.rows),
               StreamLayout<Q6Tile, kColumns, true>::Bytes(p.q6_k.superblocks, p.q6_k.rows));
  const int blocks = p.q4_k.shares.blocks + p.q6_k.shares.blocks;
  return LaunchStreaming(MixedStreamKernel<kColumns>, blocks, bytes, device, stream, p);
}

}  // namespace

cudaError_t LaunchMixedMatmul(const MixedParameters& p, const DeviceLimits& device,
                              cudaStream_t stream) {
  switch (StreamColumns(std::max(p.q4_k.rows, p.q6_k.rows))) {
    case 1:
      return Launch<1>(p, device, stream);
    case 2:
      return Launch<2>(p, device, stream);
    default:
      static_assert(StreamColumns(kMostMixedRows) == 4);
      return Launch<4>(p, device, stream);
  }
}

}  // namespace stagecoach::cuda
