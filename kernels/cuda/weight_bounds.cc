#include "kernels/cuda/weight_bounds.h"

namespace stagecoach::cuda {

WeightBounds BoundsOfTiles(TensorType type) {
  switch (type) {
    case TensorType::kQ4_0:
    case TensorType::kQ4_1:
      return {.scale = kScaleBound4Bits, .weight = kLargestHalf};
    case TensorType::kQ4_K:
      return {.delta = kDeltaBoundQ4K, .delta_min = kDeltaMinBoundQ4K, .weight = kLargestHalf};
    case TensorType::kQ2_K:
    case TensorType::kQ5_K:
      return {.delta = kDeltaBoundUnsigned,
              .delta_min = kDeltaBoundUnsigned,
              .scale = kLargestHalf,
              .weight = kLargestHalf};
    case TensorType::kQ5_0:
    case TensorType::kQ5_1:
    case TensorType::kQ8_0:
    case TensorType::kQ3_K:
    case TensorType::kQ6_K:
      return {.scale = kLargestHalf, .weight = kLargestHalf};
    case TensorType::kBF16:
      return {.weight = kLargestHalf};
    case TensorType::kF32:
    case TensorType::kF16:
      return {};
  }
  __builtin_unreachable();
}

}  // namespace stagecoach::cuda
