#include "model/type_mix.h"

#include <gtest/gtest.h>

#include <vector>

namespace stagecoach {
namespace {

// Layers of `layers` in which attn_v and ffn_down are not of the base type.
std::vector<int> LayersWithMore(const TypeMix& mix, int layers) {
  std::vector<int> found;
  for (int i = 0; i < layers; ++i) {
    if (mix.VAndDown(i, layers) != mix.base) found.push_back(i);
  }
  return found;
}

TEST(TypeMix, MoreBitsInTheLayersThatLlamaCppGivesThem) {
  const TypeMix medium = FindTypeMix("Q4_K_M").value();
  EXPECT_EQ(medium.more, TensorType::kQ6_K);
  EXPECT_EQ(LayersWithMore(medium, 32),
            (std::vector<int>{0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}));
  // An eighth is rounded down once from either end: 22 / 8 and 7 * 22 / 8.
  EXPECT_EQ(LayersWithMore(medium, 22), (std::vector<int>{0, 1, 4, 7, 10, 13, 16, 19, 20, 21}));
  EXPECT_EQ(LayersWithMore(FindTypeMix("q4_k_s").value(), 32), (std::vector<int>{0, 1, 2, 3}));
}

TEST(TypeMix, ATypeAloneIsAMixOfItself) {
  const TypeMix mix = FindTypeMix("q8_0").value();
  EXPECT_EQ(mix.base, TensorType::kQ8_0);
  EXPECT_EQ(mix.output, TensorType::kQ8_0);
  EXPECT_TRUE(LayersWithMore(mix, 32).empty());
  EXPECT_FALSE(FindTypeMix("q4_k_x").has_value());
}

}  // namespace
}  // namespace stagecoach
