#include "kernels/compare.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace stagecoach {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

std::vector<float> Ramp(size_t count) {
  std::vector<float> values(count);
  for (size_t i = 0; i < count; ++i) values[i] = std::sin(0.7f * static_cast<float>(i)) + 0.1f;
  return values;
}

TEST(Compare, EqualArraysAreWithinZero) {
  const std::vector<float> values = Ramp(100);
  const Comparison result = Compare(values, values);
  EXPECT_TRUE(result.Within(0));
  EXPECT_EQ(result.relative_rms, 0);
  EXPECT_EQ(result.max_abs, 0);
}

TEST(Compare, RelativeRmsOfAKnownError) {
  const std::vector<float> expected = {3, 0, 4, 0};
  const std::vector<float> actual = {3, 0, 4, 0.5};
  const Comparison result = Compare(actual, expected);
  EXPECT_DOUBLE_EQ(result.relative_rms, 0.1);
  EXPECT_DOUBLE_EQ(result.max_abs, 0.5);
  EXPECT_EQ(result.max_abs_index, 3u);
  EXPECT_TRUE(result.Within(0.1001));
  EXPECT_FALSE(result.Within(0.0999));
}

TEST(Compare, ErrorOfSumsThatCancelIsMeasuredAgainstTypicalOnes) {
  const std::vector<float> expected = {0, 1e-6f}, actual = {0.02f, 1e-6f};
  EXPECT_GT(Compare(actual, expected).relative_rms, 1e3);
  EXPECT_NEAR(Compare(actual, expected, 2).relative_rms, 0.02 / std::sqrt(8), 1e-6);
  const std::vector<float> large = {3, 4}, off = {3, 4.5};
  EXPECT_DOUBLE_EQ(Compare(off, large, 1).relative_rms, 0.1) << "a floor, not a replacement";
}

TEST(Compare, OneNanOrInfinityInEitherArrayFails) {
  const std::vector<float> good = Ramp(100);
  for (const float bad_value : {kNan, kInf, -kInf}) {
    std::vector<float> bad = good;
    bad[42] = bad_value;
    EXPECT_FALSE(Compare(bad, good).Within(1e9));
    EXPECT_FALSE(Compare(good, bad).Within(1e9));
    EXPECT_FALSE(Compare(bad, bad).Within(1e9)) << "equal, but not a result";
    EXPECT_EQ(Compare(bad, good).non_finite, 1u);
    EXPECT_EQ(Compare(bad, good).relative_rms, 0) << "the rest is still measured";
  }
}

TEST(Compare, SwappedRowsFail) {
  const std::vector<float> expected = Ramp(64);
  std::vector<float> swapped = expected;
  std::swap_ranges(swapped.begin(), swapped.begin() + 8, swapped.begin() + 8);
  EXPECT_FALSE(Compare(swapped, expected).Within(0.1));
}

TEST(Compare, ConstantsAndZerosFail) {
  const std::vector<float> expected = Ramp(64);
  EXPECT_FALSE(Compare(std::vector<float>(64, 0.1f), expected).Within(0.5));
  EXPECT_DOUBLE_EQ(Compare(std::vector<float>(64, 0), expected).relative_rms, 1);
  EXPECT_TRUE(std::isinf(Compare(expected, std::vector<float>(64, 0)).relative_rms));
  EXPECT_FALSE(Compare(expected, std::vector<float>(64, 0)).Within(1e9));
  EXPECT_TRUE(Compare(std::vector<float>(64, 0), std::vector<float>(64, 0)).Within(0));
}

TEST(Compare, LengthsThatDifferAndEmptyArraysFail) {
  const std::vector<float> values = Ramp(10);
  EXPECT_FALSE(Compare(values, std::span(values).first(9)).Within(1e9));
  EXPECT_FALSE(Compare({}, {}).Within(1e9));
}

TEST(Compare, NanToleranceFails) {
  const std::vector<float> values = Ramp(10);
  EXPECT_FALSE(Compare(values, values).Within(kNan));
}

TEST(SameBits, ComparesBitsAndNotValues) {
  const std::vector<float> nan = {kNan}, zero = {0.0f}, negative_zero = {-0.0f};
  EXPECT_TRUE(SameBits(nan, nan));
  EXPECT_FALSE(SameBits(zero, negative_zero));
  EXPECT_FALSE(SameBits(zero, {}));
  EXPECT_TRUE(SameBits({}, {}));
}

TEST(Compare, ToStringNamesTheFigures) {
  const std::vector<float> expected = {3, 0, 4, 0}, actual = {3, 0, 4, kNan};
  EXPECT_THAT(ToString(Compare(actual, expected)), testing::HasSubstr("1 not finite"));
}

}  // namespace
}  // namespace stagecoach
