#include "tools/load.h"

#include <nlohmann/json.hpp>

#include "gtest/gtest.h"

namespace stagecoach {
namespace {

TEST(LoadTest, PercentilesAreNearestRanks) {
  EXPECT_EQ(Percentile({}, 50), 0);
  EXPECT_EQ(Percentile({5}, 99), 5);
  EXPECT_EQ(Percentile({4, 1, 3, 2}, 50), 2);
  EXPECT_EQ(Percentile({4, 1, 3, 2}, 90), 4);
  EXPECT_EQ(Percentile({4, 1, 3, 2}, 25), 1);
}

TEST(LoadTest, PromptsShareThePrefixAndNothingElse) {
  const LoadOptions options{.prompt_tokens = 20, .shared_prefix = 8, .vocab_size = 32000};
  const std::vector<int32_t> a = LoadPrompt(options, 0), b = LoadPrompt(options, 1);
  ASSERT_EQ(a.size(), 20);
  EXPECT_EQ(a, LoadPrompt(options, 0));
  EXPECT_TRUE(std::equal(a.begin(), a.begin() + 8, b.begin()));
  EXPECT_NE(a, b);
  for (const int32_t token : a) {
    EXPECT_GE(token, 3);
    EXPECT_LT(token, 32000);
  }
}

TEST(LoadTest, SummaryCountsAndRates) {
  LoadResult result{.seconds = 2};
  result.samples.push_back(
      {.ttft = 0.1, .e2el = 0.5, .itl = {0.2, 0.2}, .input_tokens = 10, .output = {1, 2, 3}});
  result.samples.push_back(
      {.ttft = 0.3, .e2el = 0.3, .input_tokens = 4, .cached_tokens = 3, .output = {7}});
  result.samples.push_back({.status = absl::UnavailableError("gone"), .input_tokens = 99});
  const nlohmann::json out = SummariseLoad(result);
  EXPECT_EQ(out["completed"], 2);
  EXPECT_EQ(out["failed"], 1);
  EXPECT_EQ(out["total_input_tokens"], 14);
  EXPECT_EQ(out["total_output_tokens"], 4);
  EXPECT_EQ(out["total_cached_tokens"], 3);
  EXPECT_DOUBLE_EQ(out["output_throughput"], 2);
  EXPECT_DOUBLE_EQ(out["request_throughput"], 1);
  EXPECT_DOUBLE_EQ(out["mean_ttft_ms"], 200);
  EXPECT_DOUBLE_EQ(out["p99_ttft_ms"], 300);
  EXPECT_DOUBLE_EQ(out["median_tpot_ms"], 200);
  EXPECT_DOUBLE_EQ(out["mean_itl_ms"], 200);
  EXPECT_DOUBLE_EQ(out["p90_e2el_ms"], 500);
}

}  // namespace
}  // namespace stagecoach
