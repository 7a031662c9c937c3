// Which kernel runs a product of one quantised type. Each type is instantiated in a file of its
// own, quant_matmul_*.cu, so that they compile side by side.
#ifndef STAGECOACH_KERNELS_CUDA_TYPED_MATMUL_CUH_
#define STAGECOACH_KERNELS_CUDA_TYPED_MATMUL_CUH_

#include <algorithm>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/stream_kernel.cuh"
#include "kernels/cuda/tile_kernel.cuh"

namespace stagecoach::cuda {

template <typename Tile, int kColumns>
bool StreamFits(const MatmulParameters& p) {
  return StreamLayout<Tile, kColumns>::SharedBytes(1, p.superblocks) <= kMostSharedBytes;
}

template <typename Tile, int kColumns>
cudaError_t LaunchStream(const MatmulParameters& p, int multiprocessors, cudaStream_t stream) {
  using Layout = StreamLayout<Tile, kColumns>;
  const bool two_teams = Layout::SharedBytes(kMaxTeams, p.superblocks) <= kMostSharedBytes;
  const int teams = two_teams ? kMaxTeams : 1;
  LaunchShape shape;
  shape.grid = dim3(std::min((p.tile_rows + teams - 1) / teams, multiprocessors));
  shape.threads = teams * kTeamThreads;
  // One block at a time on a multiprocessor, so that all have the same share: where two fit, those
  // of the next kernel crowd on the multiprocessors that finish first.
  shape.shared_bytes =
      std::max<size_t>(Layout::SharedBytes(teams, p.superblocks), kMostSharedBytes / 2 + 1024);
  const cudaError_t status = AllowSharedMemory(StreamKernel<Tile, kColumns>, kMostSharedBytes);
  if (status != cudaSuccess) return status;
  return LaunchKernel(StreamKernel<Tile, kColumns>, shape, stream, p);
}

template <typename Tile, int kColumns>
cudaError_t LaunchTiles(const MatmulParameters& p, int multiprocessors, cudaStream_t stream) {
  const int row_blocks = (p.quant_rows + kColumns - 1) / kColumns;
  const int output_blocks = (p.tile_rows + kTileWarps - 1) / kTileWarps;
  const bool split_k = row_blocks * output_blocks < multiprocessors * 3 / 2;
  LaunchShape shape;
  shape.grid = dim3(row_blocks * (split_k ? kSplits : 1), output_blocks);
  shape.threads = kTileThreads;
  shape.cluster = split_k ? kSplits : 1;
  shape.shared_bytes = split_k ? TileLayout<Tile, kColumns, true>::kSharedBytes
                               : TileLayout<Tile, kColumns, false>::kSharedBytes;
  const auto kernel =
      split_k ? TileKernel<Tile, kColumns, true> : TileKernel<Tile, kColumns, false>;
  const cudaError_t status = AllowSharedMemory(kernel, kMostSharedBytes);
  if (status != cudaSuccess) return status;
  return LaunchKernel(kernel, shape, stream, p);
}

template <TensorType type>
cudaError_t LaunchTypedMatmul(const MatmulParameters& p, int multiprocessors, cudaStream_t stream) {
  using Tile = TileOf<type>;
  const int rows = p.quant_rows;
  if (rows == 1 && StreamFits<Tile, 1>(p)) return LaunchStream<Tile, 1>(p, multiprocessors, stream);
  if (rows <= 2 && StreamFits<Tile, 2>(p)) return LaunchStream<Tile, 2>(p, multiprocessors, stream);
  if (rows <= 8 && StreamFits<Tile, 8>(p)) return LaunchStream<Tile, 8>(p, multiprocessors, stream);
  if (rows <= 16) return LaunchTiles<Tile, 16>(p, multiprocessors, stream);
  if (rows <= 32) return LaunchTiles<Tile, 32>(p, multiprocessors, stream);
  return LaunchTiles<Tile, 64>(p, multiprocessors, stream);
}

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_TYPED_MATMUL_CUH_
