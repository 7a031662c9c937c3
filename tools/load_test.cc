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

// A stream of a round: `gap` seconds from token to token, `group` of them in a message.
RequestSample Stream(double start, double ttft, int tokens, double gap, int group = 1) {
  RequestSample sample{.start = start, .ttft = ttft, .input_tokens = 100};
  for (int i = 0; i < tokens; ++i) sample.token_times.push_back(ttft + gap * (i / group * group));
  return sample;
}

TEST(LoadTest, ARoundsPhasesEndWithTheLastFirstTokenAndTheFirstLastOne) {
  // All decode from 4 to 19.5 s: the first stream's tokens come at 2, 3 ... 41, the second's at 4,
  // 4.5 ... 19.5.
  const std::vector<RequestSample> round = {Stream(1, 1, 40, 1), Stream(1.5, 2.5, 32, 0.5)};
  const RoundRates rates = RatesOfRound(round);
  EXPECT_DOUBLE_EQ(rates.prompt.value(), 200 / 3.0);
  EXPECT_DOUBLE_EQ(rates.decode.value(), (15 + 31) / 15.5);
}

TEST(LoadTest, ARoundCountsTokensOfGroupsAndNoCachedPrompts) {
  // In groups of four at 1, 3, 5, 7, 9 s.
  std::vector<RequestSample> round = {Stream(0, 1, 20, 0.5, 4), Stream(0, 1, 20, 0.5, 4)};
  round[1].cached_tokens = 60;
  const RoundRates rates = RatesOfRound(round);
  EXPECT_DOUBLE_EQ(rates.prompt.value(), 140);
  EXPECT_DOUBLE_EQ(rates.decode.value(), 2 * 16 / 8.0);
}

TEST(LoadTest, ARoundOfOneStream) {
  const RoundRates rates = RatesOfRound(std::vector{Stream(5, 2, 9, 0.25)});
  EXPECT_DOUBLE_EQ(rates.prompt.value(), 50);
  EXPECT_DOUBLE_EQ(rates.decode.value(), 4);
}

TEST(LoadTest, ARoundWithHardlyAnyDecodingHasPromptsOnly) {
  const std::vector<std::vector<RequestSample>> rounds = {
      {Stream(0, 1, 8, 1), Stream(0, 1, 9, 1)},        // 7 tokens a stream
      {Stream(0, 1, 1, 1), Stream(0, 1, 1, 1)},        // one each, at once
      {Stream(0, 1, 20, 1, 20), Stream(0, 1, 20, 1)},  // all of a stream in one message
      {Stream(0, 1, 20, 1), Stream(0, 30, 20, 1)},     // one ends before the other begins
  };
  for (size_t i = 0; i < rounds.size(); ++i) {
    const RoundRates rates = RatesOfRound(rounds[i]);
    EXPECT_DOUBLE_EQ(rates.prompt.value_or(0), i == 3 ? 200 / 30.0 : 200) << i;
    EXPECT_FALSE(rates.decode.has_value()) << i;
  }
}

TEST(LoadTest, ARoundWithAFailureHasNoRates) {
  std::vector<RequestSample> failed = {Stream(0, 1, 40, 1), Stream(0, 1, 40, 1)};
  failed[1].status = absl::UnavailableError("gone");
  const std::vector<RequestSample> silent = {Stream(0, 1, 40, 1), Stream(0, 1, 0, 1)};
  const std::vector<RequestSample> empty;
  for (const std::vector<RequestSample>& round : {failed, silent, empty}) {
    EXPECT_FALSE(RatesOfRound(round).prompt.has_value());
    EXPECT_FALSE(RatesOfRound(round).decode.has_value());
  }
}

}  // namespace
}  // namespace stagecoach
