#include "worker/residency.h"

#include <vector>

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace stagecoach {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr UnitSize kEmbedding{Unit::Kind::kEmbedding, 20, 20};
constexpr UnitSize kLayer{Unit::Kind::kLayer, 10, 3};
constexpr UnitSize kHead{Unit::Kind::kHead, 30, 31};

std::vector<UnitSize> Layers(int count) { return std::vector<UnitSize>(count, kLayer); }

TEST(ResidencyTest, KeepsEverythingThatFitsWithABufferToLoadIt) {
  const auto residency = PlanResidency(Layers(4), 43, 1);
  ASSERT_TRUE(residency.ok());
  EXPECT_FALSE(residency->streaming);
  EXPECT_THAT(residency->fixed, Each(true));
  EXPECT_TRUE(PlanResidency(Layers(4), 42, 1)->streaming);
}

TEST(ResidencyTest, SpreadsTheFixedLayersEvenly) {
  // Window of two layers and a buffer: 23; three fixed layers: 30.
  const auto residency = PlanResidency(Layers(6), 53, 1);
  ASSERT_TRUE(residency.ok());
  EXPECT_THAT(residency->fixed, ElementsAre(false, true, false, true, false, true));
  EXPECT_EQ(residency->window_units, 2);
}

TEST(ResidencyTest, MoreReadersGetAWiderWindowIfItFits) {
  EXPECT_EQ(PlanResidency(Layers(8), 23, 3)->window_units, 2);
  EXPECT_EQ(PlanResidency(Layers(8), 36, 2)->window_units, 3);
  EXPECT_EQ(PlanResidency(Layers(8), 36, 1)->window_units, 2);  // and a fixed layer
}

TEST(ResidencyTest, PrefersToKeepEmbeddingAndHead) {
  std::vector<UnitSize> units = Layers(8);
  units.insert(units.begin(), kEmbedding);
  units.push_back(kHead);
  // Both: 50, and to load the head 31.
  EXPECT_THAT(PlanResidency(units, 81, 1)->fixed,
              ElementsAre(true, false, false, false, false, false, false, false, false, true));
  EXPECT_THAT(PlanResidency(units, 91, 1)->fixed,
              ElementsAre(true, false, false, false, false, false, false, false, true, true));
  // Two heads and a buffer: 91; with the head fixed: 30, two embeddings and a buffer: 90.
  EXPECT_EQ(SmallestBudget(units), 81);
}

TEST(ResidencyTest, RefusesATooSmallBudgetNamingTheSmallestThatWorks) {
  for (std::vector<UnitSize> units : {Layers(5), Layers(1), {kEmbedding, kLayer, kLayer, kHead}}) {
    const uint64_t smallest = SmallestBudget(units);
    EXPECT_TRUE(PlanResidency(units, smallest, 1).ok());
    const absl::Status status = PlanResidency(units, smallest - 1, 1).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_THAT(std::string(status.message()), HasSubstr(std::to_string(smallest)));
    EXPECT_THAT(std::string(status.message()), HasSubstr(std::to_string(smallest - 1)));
  }
}

// Whatever is granted: the fixed units and two streaming ones with a buffer fit.
TEST(ResidencyTest, NeverPromisesMoreThanTheBudget) {
  std::vector<UnitSize> units = {kEmbedding};
  for (uint64_t i = 0; i < 12; ++i) units.push_back({Unit::Kind::kLayer, 8 + i % 5, 2 + i % 3});
  units.push_back(kHead);
  for (uint64_t budget = SmallestBudget(units); budget < 220; ++budget) {
    for (const int readers : {1, 2, 4}) {
      const auto residency = PlanResidency(units, budget, readers);
      ASSERT_TRUE(residency.ok()) << budget;
      uint64_t fixed = 0, largest = 0, buffer = 0, fixed_buffer = 0;
      for (size_t i = 0; i < units.size(); ++i) {
        if (residency->fixed[i]) {
          fixed += units[i].resident_bytes;
          fixed_buffer = std::max(fixed_buffer, units[i].buffer_bytes);
        } else {
          largest = std::max(largest, units[i].resident_bytes);
          buffer = std::max(buffer, units[i].buffer_bytes);
        }
      }
      EXPECT_LE(fixed + 2 * largest + buffer, budget) << readers;
      EXPECT_LE(fixed + fixed_buffer, budget) << readers;
      EXPECT_GE(residency->window_units, residency->streaming ? 2 : 0);
    }
  }
}

}  // namespace
}  // namespace stagecoach
