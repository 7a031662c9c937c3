#include "model/type_mix.h"

#include <array>

#include "absl/strings/match.h"
#include "absl/strings/string_view.h"

namespace stagecoach {
namespace {

constexpr auto kMixes = std::to_array<TypeMix>({
    {"q4_k_s", TensorType::kQ4_K, TensorType::kQ5_K, TensorType::kQ6_K, false},
    {"q4_k_m", TensorType::kQ4_K, TensorType::kQ6_K, TensorType::kQ6_K, true},
    {"q5_k_m", TensorType::kQ5_K, TensorType::kQ6_K, TensorType::kQ6_K, true},
});

}  // namespace

TensorType TypeMix::VAndDown(int layer, int layers) const {
  const int eighth = layers / 8;
  const bool first = layer < eighth;
  const bool half = first || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2;
  return (half_of_layers ? half : first) ? more : base;
}

std::span<const TypeMix> TypeMixes() { return kMixes; }

std::optional<TypeMix> FindTypeMix(std::string_view name) {
  const auto view = [](std::string_view text) {  // Abseil's is a type of its own here
    return absl::string_view(text.data(), text.size());
  };
  for (const TypeMix& mix : kMixes) {
    if (absl::EqualsIgnoreCase(view(mix.name), view(name))) return mix;
  }
  const std::optional<TensorType> type = ParseTensorType(name);
  if (!type) return std::nullopt;
  return TypeMix{GetTensorTypeInfo(*type).name, *type, *type, *type, false};
}

}  // namespace stagecoach
