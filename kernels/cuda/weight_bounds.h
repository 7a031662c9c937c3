// Which weights the products of tile_decode.cuh can hold as halves.
#ifndef STAGECOACH_KERNELS_CUDA_WEIGHT_BOUNDS_H_
#define STAGECOACH_KERNELS_CUDA_WEIGHT_BOUNDS_H_

#include "kernels/weight_bounds.h"

namespace stagecoach::cuda {

// A scale times TileFormat::kQuantFactor and kLowerFactor is a half in types of 4 bits.
inline constexpr float kScaleBound4Bits = 2;
// Of Q4_K: 1024 * delta * TileFormat::kQuantFactor and 8 * delta_min (ScaledBytes) are halves.
// Scales are within the bound above then.
inline constexpr float kDeltaBoundQ4K = 1.0f / 32;
inline constexpr float kDeltaMinBoundQ4K = 8192;
// The largest half: of scales, minimums and weights of all types.
inline constexpr float kLargestHalf = 65504;
// 1024 deltas are a half where other integer scales have no sign.
inline constexpr float kDeltaBoundUnsigned = 64;

WeightBounds BoundsOfTiles(TensorType type);  // none for F32, F16

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_WEIGHT_BOUNDS_H_
