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
cudaError_t LaunchStream(const MatmulParameters& p, const DeviceLimits& device,
                         cudaStream_t stream) {
  // With gate and up, rows of tiles go in pairs.
  const int units = p.fusion.gated.halves != nullptr ? p.tile_rows / 2 : p.tile_rows;
  const int blocks = std::min(units, device.multiprocessors);
  const int block_units = (units + blocks - 1) / blocks;  // at most
  int warps = kMaxStreamWarps;
  while (StreamBytes<Tile>(warps, p.superblocks, p.rows) > device.shared_bytes) {
    warps -= kLeastTeamWarps;
  }
  MatmulParameters own = p;
  // Small teams have less to do per row of tiles, but there must be rows for all of them.
  own.team_warps = kLeastTeamWarps;
  while (own.team_warps < kSplits && warps / own.team_warps > block_units) own.team_warps *= 2;
  warps = std::min(warps / own.team_warps, block_units) * own.team_warps;
  own.block_units = units / blocks;
  own.longer_blocks = units % blocks;
  LaunchShape shape;
  shape.grid = dim3(blocks);
  shape.threads = warps * 32;
  // One block at a time on a multiprocessor, so that all have the same share: where two fit, those
  // of the next kernel crowd on the multiprocessors that finish first.
  shape.shared_bytes = std::max<size_t>(StreamBytes<Tile>(warps, p.superblocks, p.rows),
                                        device.shared_bytes / 2 + 1024);
  const cudaError_t status = AllowSharedMemory(StreamKernel<Tile, kColumns>, device.shared_bytes);
  if (status != cudaSuccess) return status;
  return LaunchKernel(StreamKernel<Tile, kColumns>, shape, stream, own);
}

template <typename Tile, int kColumns, bool kSplitK>
cudaError_t LaunchTileKernel(const MatmulParameters& p, int row_blocks, const DeviceLimits& device,
                             cudaStream_t stream) {
  using Layout = TileLayout<Tile, kColumns, kSplitK>;
  LaunchShape shape;
  shape.cluster = kSplitK ? kCluster : 1;
  shape.grid = dim3(row_blocks * shape.cluster,
                    (p.tile_rows * kTileRows + Layout::kBlockRows - 1) / Layout::kBlockRows);
  shape.threads = Layout::kThreads;
  shape.shared_bytes = Layout::kSharedBytes;
  const auto kernel = TileKernel<Tile, kColumns, kSplitK>;
  const cudaError_t status = AllowSharedMemory(kernel, device.shared_bytes);
  if (status != cudaSuccess) return status;
  return LaunchKernel(kernel, shape, stream, p);
}

template <typename Tile, int kColumns>
cudaError_t LaunchTiles(const MatmulParameters& p, const DeviceLimits& device,
                        cudaStream_t stream) {
  using Layout = TileLayout<Tile, kColumns, false>;
  const int row_blocks = (p.rows + kColumns - 1) / kColumns;
  const int output_blocks = (p.tile_rows * kTileRows + Layout::kBlockRows - 1) / Layout::kBlockRows;
  const int places = device.multiprocessors * Layout::kBlocks;
  if (row_blocks * output_blocks < places * 3 / 4) {
    return LaunchTileKernel<Tile, kColumns, true>(p, row_blocks, device, stream);
  }
  return LaunchTileKernel<Tile, kColumns, false>(p, row_blocks, device, stream);
}

template <TensorType type>
cudaError_t LaunchTypedMatmul(const MatmulParameters& p, const DeviceLimits& device,
                              cudaStream_t stream) {
  using Tile = TileOf<type>;
  if (StreamFits<Tile>(p.superblocks, p.rows, device)) {
    switch (StreamColumns(p.rows)) {
      case 1:
        return LaunchStream<Tile, 1>(p, device, stream);
      case 2:
        return LaunchStream<Tile, 2>(p, device, stream);
      case 4:
        return LaunchStream<Tile, 4>(p, device, stream);
      case 8:
        return LaunchStream<Tile, 8>(p, device, stream);
      default:
        return LaunchStream<Tile, 16>(p, device, stream);
    }
  }
  if (p.rows <= 8) return LaunchTiles<Tile, 8>(p, device, stream);
  if (p.rows <= 16) return LaunchTiles<Tile, 16>(p, device, stream);
  if (p.rows <= 32) return LaunchTiles<Tile, 32>(p, device, stream);
  return LaunchTiles<Tile, 64>(p, device, stream);
}

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_TYPED_MATMUL_CUH_
