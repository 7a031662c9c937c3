// How the stream kernel (stream_kernel.cuh) lies in shared memory, and when it fits.
#ifndef STAGECOACH_KERNELS_CUDA_STREAM_LAYOUT_CUH_
#define STAGECOACH_KERNELS_CUDA_STREAM_LAYOUT_CUH_

#include <cstddef>

#include "kernels/cuda/kernel_set.h"
#include "kernels/cuda/matmul_parameters.cuh"

namespace stagecoach::cuda {

inline constexpr int kStreamThreads = kSplits * 32;  // a warp for each split of k

// Warps that fetch their first tiles while the kernel before this one still runs. If all did, what
// that kernel waits for would wait behind them, and what this one needs besides: residual rows, if
// it norms them itself. More for one row, as measured.
constexpr int WarpsAhead(int columns, bool norms) {
  return (norms ? 4 : 10) + (columns == 1 ? 2 : 0);
}

// Rows of activations, rounded up to what there is a kernel for.
constexpr int StreamColumns(int rows) {
  return rows <= 2 ? rows : rows <= 4 ? 4 : rows <= 8 ? 8 : 16;
}

// columns: of StreamColumns. kShared: the activations lie in shared memory.
template <typename Tile, int columns, bool kShared>
struct StreamLayout {
  static constexpr int kColumns = columns;
  // Rows of tiles that a block works on at a time. Of two, one's instructions fill the other's
  // waits, and activations that are read serve both. One, where partial sums of 16 columns leave no
  // room beside the activations, and where a lane has no registers for more.
  static constexpr int kTiles = (kColumns == 16 && kShared) || Tile::kBytes > 5000 ? 1 : 2;
  static constexpr int kPassRows = kTiles * kTileRows;
  static constexpr int kPassBytes = kTiles * Tile::kBytes;  // of one split and superblock
  static constexpr int kColumnStride = kPassRows + 4;       // of partial sums; 4: other banks
  static constexpr int kPartials = kSplits * kColumns * kColumnStride;  // floats of a pass
  static constexpr int kFixedBytes = kSplits * kPassBytes + 2 * 4 * kPartials;
  static constexpr int kBarriers = 2 * kSplits + 3;

  // In this order: tiles, partial sums of two passes, activations, barriers.
  static constexpr size_t Bytes(int superblocks, int rows) {
    const size_t activations =
        kShared ? static_cast<size_t>(superblocks) * ActivationBlockBytes(rows) : 0;
    return kFixedBytes + activations + 8 * kBarriers;
  }
  static_assert(kColumns > kMostNormedRows || !kShared ||
                kFixedBytes + kMostNormedSuperblocks * ActivationBlockBytes(kColumns) +
                        8 * kBarriers <=
                    kMostSharedBytes);
};

// Whether so many rows of activations fit shared memory; if not, they are read as they are needed,
// for which there is always room.
template <typename Tile>
bool SharesActivations(int superblocks, int rows, const DeviceLimits& device) {
  const auto fits = [&]<int kColumns>() {
    static_assert(StreamLayout<Tile, kColumns, false>::Bytes(0, 0) <= kMostSharedBytes);
    return StreamLayout<Tile, kColumns, true>::Bytes(superblocks, rows) <= device.shared_bytes;
  };
  switch (StreamColumns(rows)) {
    case 1:
      return fits.template operator()<1>();
    case 2:
      return fits.template operator()<2>();
    case 4:
      return fits.template operator()<4>();
    case 8:
      return fits.template operator()<8>();
    default:
      return fits.template operator()<16>();
  }
}

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_STREAM_LAYOUT_CUH_
