// How the stream kernel (stream_kernel.cuh) lies in shared memory, and when it fits.
#ifndef STAGECOACH_KERNELS_CUDA_STREAM_LAYOUT_CUH_
#define STAGECOACH_KERNELS_CUDA_STREAM_LAYOUT_CUH_

#include <cstddef>

#include "kernels/cuda/matmul_parameters.cuh"

namespace stagecoach::cuda {

inline constexpr int kLeastTeamWarps = 8;   // more: twice as many
inline constexpr int kMaxStreamWarps = 16;  // of a block
inline constexpr int kStages = 2;           // of a ring, in tiles: more only stood in others' way

// Rows of activations, rounded up to what there is a kernel for.
constexpr int StreamColumns(int rows) {
  return rows <= 2 ? rows : rows <= 4 ? 4 : rows <= 8 ? 8 : 16;
}

// Shared memory of a block of so many warps, in order: rings, partial sums (twice), activations,
// copy barriers.
template <typename Tile>
constexpr size_t StreamBytes(int warps, int superblocks, int rows) {
  const size_t partials = size_t{8} * kSplits * kTileRows * StreamColumns(rows);  // of a team
  return static_cast<size_t>(warps) * kStages * (Tile::kBytes + 8) +
         warps / kLeastTeamWarps * partials +
         static_cast<size_t>(superblocks) * ActivationBlockBytes(rows) + 8;
}

template <typename Tile>
bool StreamFits(int superblocks, int rows, const DeviceLimits& device) {
  return rows <= kMostFusedRows &&
         StreamBytes<Tile>(kLeastTeamWarps, superblocks, rows) <= device.shared_bytes;
}

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_STREAM_LAYOUT_CUH_
