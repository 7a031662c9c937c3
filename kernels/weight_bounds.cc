#include "kernels/weight_bounds.h"

#include <cmath>
#include <cstring>
#include <string>

#include "fmt/format.h"
#include "model/block_decode.h"
#include "model/dequantize.h"
#include "model/gguf.h"
#include "model/model_error.h"

namespace stagecoach {
namespace {

// The largest magnitudes that the integers of a block can have.
struct Largest {
  float scale, quant, min;
};
template <typename Block>
constexpr Largest kLargest = {1, 1, 0};
template <>
constexpr Largest kLargest<BlockQ4_0> = {1, 8, 0};
template <>
constexpr Largest kLargest<BlockQ4_1> = {1, 15, 1};
template <>
constexpr Largest kLargest<BlockQ5_0> = {1, 16, 0};
template <>
constexpr Largest kLargest<BlockQ5_1> = {1, 31, 1};
template <>
constexpr Largest kLargest<BlockQ8_0> = {1, 128, 0};
template <>
constexpr Largest kLargest<BlockQ2_K> = {15, 3, 15};
template <>
constexpr Largest kLargest<BlockQ3_K> = {32, 4, 0};
template <>
constexpr Largest kLargest<BlockQ4_K> = {63, 15, 63};
template <>
constexpr Largest kLargest<BlockQ5_K> = {63, 31, 63};
template <>
constexpr Largest kLargest<BlockQ6_K> = {128, 32, 0};

// Whatever its integers are. False if a scale is not finite, too.
template <typename Block>
bool SurelyWithin(const Block& block, const WeightBounds& bounds) {
  const float d = std::fabs(block.delta()), m = std::fabs(block.delta_min());
  constexpr Largest kMost = kLargest<Block>;
  const float scale = d * kMost.scale, min = m * kMost.min;
  return d < bounds.delta && m < bounds.delta_min && 2 * scale < bounds.scale &&
         scale * kMost.quant + min < bounds.weight;
}

// What is not within the bounds, in words; empty if all is. Scales are finite.
template <typename Block>
std::string Excess(const Block& block, const WeightBounds& bounds) {
  const float deltas[] = {block.delta(), block.delta_min()};
  const float delta_bounds[] = {bounds.delta, bounds.delta_min};
  for (int i = 0; i < 2; ++i) {
    if (std::fabs(deltas[i]) >= delta_bounds[i]) {
      return fmt::format("a block scale of {} (less than {} is held)", deltas[i], delta_bounds[i]);
    }
  }
  for (int g = 0; g < Block::kElements / Block::kGroup; ++g) {
    const float scale = HalfToFloat(FloatToHalf(deltas[0] * static_cast<float>(block.scale(g))));
    if (std::fabs(scale) >= bounds.scale) {
      return fmt::format("a scale of {} (less than {} is held)", scale, bounds.scale);
    }
    const float min = deltas[1] * static_cast<float>(block.min(g));
    if (std::fabs(min) > bounds.weight) {
      return fmt::format("a minimum of {} ({} at most is held)", min, bounds.weight);
    }
  }
  float weights[Block::kElements];
  DecodeBlock(block, weights);
  for (const float weight : weights) {
    if (std::fabs(weight) > bounds.weight) {
      return fmt::format("a weight of {} ({} at most is held)", weight, bounds.weight);
    }
  }
  return "";
}

absl::Status WithName(const TensorInfo& tensor, const absl::Status& finite) {
  if (finite.ok()) return finite;
  return MakeModelError(ModelError::kCorrupt,
                        fmt::format("tensor {}: {}", tensor.name, std::string(finite.message())));
}

}  // namespace

absl::Status CheckWeights(const TensorInfo& tensor, size_t first_row,
                          std::span<const std::byte> raw, const WeightBounds& bounds) {
  if (!bounds.any()) return WithName(tensor, FiniteScales(tensor.type, raw));
  return VisitBlockType(tensor.type, [&]<typename Block>() -> absl::Status {
    if constexpr (Block::kElements > 1) {
      const size_t row_blocks = tensor.columns() / Block::kElements;
      for (size_t i = 0; i < raw.size() / sizeof(Block); ++i) {
        Block block;
        memcpy(&block, raw.data() + i * sizeof(Block), sizeof(Block));
        if (SurelyWithin(block, bounds)) continue;
        if (!HasFiniteScales(block)) return WithName(tensor, FiniteScales(tensor.type, raw));
        const std::string excess = Excess(block, bounds);
        if (excess.empty()) continue;
        return MakeModelError(
            ModelError::kUnsupported,
            fmt::format("tensor {}: row {}, {} block {} has {}; such weights run on --device cpu",
                        tensor.name, first_row + i / row_blocks,
                        GetTensorTypeInfo(tensor.type).name, i % row_blocks, excess));
      }
      return absl::OkStatus();
    } else {
      for (size_t i = 0; i < raw.size() / sizeof(Block); ++i) {
        Block block;
        memcpy(&block, raw.data() + i * sizeof(Block), sizeof(Block));
        if (!HasFiniteScales(block)) return WithName(tensor, FiniteScales(tensor.type, raw));
        if (std::fabs(block.value()) <= bounds.weight) continue;
        return MakeModelError(
            ModelError::kUnsupported,
            fmt::format("tensor {}: row {}, column {} has a weight of {} ({} at most is held); "
                        "such weights run on --device cpu",
                        tensor.name, first_row + i / tensor.columns(), i % tensor.columns(),
                        block.value(), bounds.weight));
      }
      return absl::OkStatus();
    }
  });
}

}  // namespace stagecoach
