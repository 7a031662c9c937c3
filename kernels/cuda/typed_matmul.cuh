// Which kernel runs a product of one quantised type. Each type is instantiated in a file of its
// own, quant_matmul_*.cu, so that they compile side by side.
#ifndef STAGECOACH_KERNELS_CUDA_TYPED_MATMUL_CUH_
#define STAGECOACH_KERNELS_CUDA_TYPED_MATMUL_CUH_

#include <algorithm>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/plain_kernel.cuh"
#include "kernels/cuda/plain_tile_kernel.cuh"
#include "kernels/cuda/stream_kernel.cuh"
#include "kernels/cuda/tile_kernel.cuh"

namespace stagecoach::cuda {

// A kernel of StreamKernel's kind, whose blocks need so many bytes of shared memory.
template <typename Parameters>
cudaError_t LaunchStreaming(void (*kernel)(Parameters), int blocks, size_t bytes,
                            const DeviceLimits& device, cudaStream_t stream, const Parameters& p) {
  LaunchShape shape;
  shape.grid = dim3(blocks);
  shape.threads = kStreamThreads;
  // One block at a time on a multiprocessor, so that all have the same share: where two fit, those
  // of the next kernel crowd on the multiprocessors that finish first.
  shape.shared_bytes = std::max<size_t>(bytes, device.shared_bytes / 2 + 1024);
  shape.most_shared_bytes = device.shared_bytes;
  return LaunchKernel(kernel, shape, stream, p);
}

template <typename Tile, int kColumns, bool kShared>
cudaError_t LaunchStreamKernel(const MatmulParameters& p, const DeviceLimits& device,
                               cudaStream_t stream) {
  MatmulParameters own = p;
  own.shares = BlockShares::Of(p.tile_rows, device.multiprocessors);
  return LaunchStreaming(StreamKernel<Tile, kColumns, kShared>, own.shares.blocks,
                         StreamLayout<Tile, kColumns, kShared>::Bytes(p.superblocks, p.rows),
                         device, stream, own);
}

template <typename Tile, bool kShared>
cudaError_t LaunchStream(const MatmulParameters& p, const DeviceLimits& device,
                         cudaStream_t stream) {
  const int columns = StreamColumns(p.rows);  // fewer than 4 fit shared memory in most shapes
  if constexpr (kShared) {
    if (columns == 1) return LaunchStreamKernel<Tile, 1, kShared>(p, device, stream);
    if (columns == 2) return LaunchStreamKernel<Tile, 2, kShared>(p, device, stream);
  }
  if (columns <= 4) return LaunchStreamKernel<Tile, 4, kShared>(p, device, stream);
  if (columns == 8) return LaunchStreamKernel<Tile, 8, kShared>(p, device, stream);
  return LaunchStreamKernel<Tile, 16, kShared>(p, device, stream);
}

// Kernels for more rows than those above, of the bulk and of the plain set.
template <typename Tile, int columns>
struct BulkTileKernels {
  static constexpr int kColumns = columns;
  template <bool kSplitK>
  using Layout = TileLayout<Tile, kColumns, kSplitK>;
  template <bool kSplitK>
  static constexpr auto* kKernel = TileKernel<Tile, kColumns, kSplitK>;
};
template <typename Tile, int columns>
struct PlainTileKernels {
  static constexpr int kColumns = columns;
  template <bool kSplitK>
  using Layout = PlainTileLayout<kColumns, kSplitK>;
  template <bool kSplitK>
  static constexpr auto* kKernel = PlainTileKernel<Tile, kColumns, kSplitK>;
};

// Of a kernel whose blocks have what its layout says.
template <typename Layout>
LaunchShape ShapeOf(dim3 grid) {
  return {.grid = grid,
          .threads = Layout::kThreads,
          .shared_bytes = Layout::kSharedBytes,
          .most_shared_bytes = Layout::kSharedBytes};
}

template <typename Kernels, bool kSplitK>
cudaError_t LaunchTileKernel(const MatmulParameters& p, int row_blocks, int groups_of_tiles,
                             cudaStream_t stream) {
  const dim3 grid(row_blocks * (kSplitK ? kQuarters : 1),
                  groups_of_tiles);  // as TileBlock wants it
  return LaunchKernel(Kernels::template kKernel<kSplitK>,
                      ShapeOf<typename Kernels::template Layout<kSplitK>>(grid), stream, p);
}

template <typename Kernels>
cudaError_t LaunchTiles(const MatmulParameters& p, const DeviceLimits& device,
                        cudaStream_t stream) {
  const auto divide = [](int a, int b) { return (a + b - 1) / b; };
  const int row_blocks = divide(p.rows, Kernels::kColumns);
  // Costs: in the time that a multiprocessor takes for a superblock of 16 rows of tiles. To add
  // sums up takes as long as a few. A group's blocks wait for each other, so that all must run at
  // once.
  constexpr int kAddCost = 3;
  const auto turns = [&](int blocks) { return divide(blocks, device.multiprocessors); };
  using Whole = typename Kernels::template Layout<false>;
  using Split = typename Kernels::template Layout<true>;
  const int of_whole = divide(p.tile_rows, Whole::kBlockTiles);
  const int of_split = divide(p.tile_rows, Split::kBlockTiles);
  const int groups = row_blocks * of_split;
  const int whole_cost = turns(row_blocks * of_whole) * p.superblocks * Whole::kBlockTiles / 16;
  const int split_cost =
      turns(kQuarters * groups) * (p.superblocks / kQuarters * Split::kBlockTiles / 16 + kAddCost);
  static_assert(Split::kStoring * Kernels::kColumns / 2 <= kSplitGroupFloats / kQuarters);
  if (!p.is_gated && p.partials != nullptr && groups <= kMostSplitGroups &&
      device.multiprocessors >= kQuarters && split_cost < whole_cost) {
    return LaunchTileKernel<Kernels, true>(p, row_blocks, of_split, stream);
  }
  return LaunchTileKernel<Kernels, false>(p, row_blocks, of_whole, stream);
}

template <typename Tile, int kColumns>
cudaError_t LaunchPlainKernel(const MatmulParameters& p, const DeviceLimits& device,
                              cudaStream_t stream) {
  MatmulParameters own = p;
  own.shares = BlockShares::Of(p.tile_rows, device.multiprocessors);
  return LaunchKernel(PlainKernel<Tile, kColumns>,
                      ShapeOf<PlainLayout<Tile, kColumns>>(dim3(own.shares.blocks)), stream, own);
}

template <typename Tile>
cudaError_t LaunchPlain(const MatmulParameters& p, const DeviceLimits& device,
                        cudaStream_t stream) {
  if (p.rows <= 8) return LaunchPlainKernel<Tile, 8>(p, device, stream);
  if (p.rows <= kMostStreamRows) return LaunchPlainKernel<Tile, 16>(p, device, stream);
  return p.rows <= 32 ? LaunchTiles<PlainTileKernels<Tile, 32>>(p, device, stream)
                      : LaunchTiles<PlainTileKernels<Tile, 64>>(p, device, stream);
}

template <TensorType type>
cudaError_t LaunchTypedMatmul(const MatmulParameters& p, const DeviceLimits& device,
                              cudaStream_t stream) {
  using Tile = TileOf<type>;
  if (device.kernels == KernelSet::kPlain) return LaunchPlain<Tile>(p, device, stream);
  if (p.rows <= kMostStreamRows) {
    return SharesActivations<Tile>(p.superblocks, p.rows, device)
               ? LaunchStream<Tile, true>(p, device, stream)
               : LaunchStream<Tile, false>(p, device, stream);
  }
  return p.rows <= 32 ? LaunchTiles<BulkTileKernels<Tile, 32>>(p, device, stream)
                      : LaunchTiles<BulkTileKernels<Tile, 64>>(p, device, stream);
}

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_TYPED_MATMUL_CUH_
