#include "kernels/sampling.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <set>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/philox.h"
#include "kernels/portable_math.h"
#include "kernels/sampling_units.h"

namespace stagecoach {
namespace {

using testing::ElementsAre;

constexpr float kInf = std::numeric_limits<float>::infinity();

int32_t SampleId(std::span<const float> logits, const SamplingParams& params,
                 std::span<const int32_t> history = {}, size_t prompt_tokens = 0,
                 uint64_t position = 0) {
  const auto token = Sample(logits, params, history, prompt_tokens, position);
  EXPECT_TRUE(token.ok()) << token.status();
  return token.ok() ? token->token_id : -1;
}

// How often each token is drawn at positions 0..draws.
std::vector<int> Histogram(std::span<const float> logits, const SamplingParams& params, int draws) {
  std::vector<int> counts(logits.size());
  for (int position = 0; position < draws; ++position) {
    ++counts[SampleId(logits, params, {}, 0, position)];
  }
  return counts;
}

// Tokens that are ever drawn.
std::set<int32_t> Support(std::span<const float> logits, const SamplingParams& params) {
  const std::vector<int> counts = Histogram(logits, params, 3000);
  std::set<int32_t> ids;
  for (size_t i = 0; i < counts.size(); ++i) {
    if (counts[i] > 0) ids.insert(static_cast<int32_t>(i));
  }
  return ids;
}

std::vector<float> LogitsOf(std::span<const double> probabilities) {
  std::vector<float> logits;
  for (const double p : probabilities) logits.push_back(static_cast<float>(std::log(p)) + 3);
  return logits;
}

// The published known answers of the Random123 distribution.
TEST(Philox, KnownAnswers) {
  EXPECT_THAT(Philox({0, 0, 0, 0}, {0, 0}),
              ElementsAre(0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8));
  constexpr uint32_t kOnes = 0xffffffff;
  EXPECT_THAT(Philox({kOnes, kOnes, kOnes, kOnes}, {kOnes, kOnes}),
              ElementsAre(0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd));
  EXPECT_THAT(Philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
              ElementsAre(0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1));
}

TEST(PortableMath, AgreesWithTheLibrary) {
  for (double x = -707; x < 708; x += 0.0973) {
    ASSERT_NEAR(PortableExp(x) / std::exp(x), 1, 1e-15) << x;
  }
  for (double x = 1e-300; x < 1e300; x *= 1.37) {
    ASSERT_NEAR(PortableLog(x), std::log(x), 1e-15 * std::max(1.0, std::abs(std::log(x)))) << x;
  }
  EXPECT_EQ(PortableExp(0), 1);
  EXPECT_EQ(PortableLog(1), 0);
  EXPECT_EQ(PortableExp(-kInf), 0);
  EXPECT_EQ(PortableExp(kInf), kInf);
  EXPECT_TRUE(std::isnan(PortableExp(std::nan(""))));
}

TEST(Sample, GreedyTakesTheBestAndTheLowerIdOnTies) {
  EXPECT_EQ(SampleId(std::vector<float>{1, 3, 2, 3}, {}), 1);
  EXPECT_EQ(SampleId(std::vector<float>{-kInf, -5, -kInf}, {}), 1);
  EXPECT_EQ(SampleId(std::vector<float>{7}, {}), 0);
}

TEST(Sample, RefusesLogitsThatAreNoDistribution) {
  const float nan = std::nanf("");
  const std::vector<std::vector<float>> cases = {
      {}, {1, nan, 2}, {1, kInf, 2}, {-kInf, -kInf}, {nan}};
  for (const std::vector<float>& logits : cases) {
    for (const float temperature : {0.0f, 1.0f}) {
      SamplingParams params;
      params.temperature = temperature;
      EXPECT_EQ(Sample(logits, params, {}, 0, 0).status().code(), absl::StatusCode::kDataLoss);
    }
    if (!logits.empty()) {
      EXPECT_EQ(LogProbability(logits, 0).status().code(), absl::StatusCode::kDataLoss);
    }
  }
}

TEST(Sample, DrawsFromTheDistribution) {
  const std::vector<double> p = {0.05, 0.4, 0.01, 0.24, 0.1, 0.2};
  constexpr int kDraws = 60000;
  SamplingParams params;
  params.temperature = 1;
  for (const uint64_t seed : {uint64_t{0}, uint64_t{1}, uint64_t{0xdeadbeefcafef00d}}) {
    params.seed = seed;
    const std::vector<int> counts = Histogram(LogitsOf(p), params, kDraws);
    double chi_square = 0;
    for (size_t i = 0; i < p.size(); ++i) {
      const double expected = p[i] * kDraws;
      chi_square += (counts[i] - expected) * (counts[i] - expected) / expected;
    }
    EXPECT_LT(chi_square, 20.5) << "5 degrees of freedom: probability 0.001";
  }
}

TEST(Sample, TemperatureSharpensAndFlattens) {
  const std::vector<double> p = {0.5, 0.25, 0.25};
  SamplingParams params;
  params.temperature = 0.5;  // squares the probabilities: 4 : 1 : 1
  EXPECT_NEAR(Histogram(LogitsOf(p), params, 20000)[0] / 20000.0, 4.0 / 6, 0.015);
  params.temperature = 100;
  EXPECT_NEAR(Histogram(LogitsOf(p), params, 20000)[0] / 20000.0, 1.0 / 3, 0.015);
  params.temperature = 1e-30f;
  EXPECT_THAT(Support(LogitsOf(p), params), ElementsAre(0));
}

TEST(Sample, IsAFunctionOfSeedAndPosition) {
  const std::vector<float> logits(1000, 0.0f);
  SamplingParams a, b;
  a.temperature = b.temperature = 1;
  a.seed = 1;
  b.seed = 2;
  int same_seed = 0, same_position = 0;
  for (uint64_t position = 0; position < 1000; ++position) {
    const int32_t id = SampleId(logits, a, {}, 0, position);
    EXPECT_EQ(id, SampleId(logits, a, {}, 0, position));
    same_seed += id == SampleId(logits, a, {}, 0, position + 1);
    same_position += id == SampleId(logits, b, {}, 0, position);
  }
  EXPECT_LT(same_seed, 10);  // 1 expected by chance
  EXPECT_LT(same_position, 10);
}

TEST(Sample, TopKKeepsTheBestAndTheLowerIdOnTies) {
  SamplingParams params;
  params.temperature = 2;
  params.top_k = 3;
  EXPECT_THAT(Support(std::vector<float>{1, 2, 1.5, 1.5, 1.5, 0}, params), ElementsAre(1, 2, 3));
  params.top_k = 1;
  EXPECT_THAT(Support(std::vector<float>{1, 2, 2, 0}, params), ElementsAre(1));
  params.top_k = 100;
  EXPECT_THAT(Support(std::vector<float>{1, 2, 2, 0}, params), ElementsAre(0, 1, 2, 3));
}

TEST(Sample, TopPKeepsTheSmallestSetThatReachesIt) {
  const std::vector<double> p = {0.1, 0.5, 0.3, 0.1};
  SamplingParams params;
  params.temperature = 5;  // comes after the filter: the set is that of the plain distribution
  params.top_p = 0.4f;
  EXPECT_THAT(Support(LogitsOf(p), params), ElementsAre(1));
  params.top_p = 0.6f;
  EXPECT_THAT(Support(LogitsOf(p), params), ElementsAre(1, 2));
  params.top_p = 0.85f;
  EXPECT_THAT(Support(LogitsOf(p), params), ElementsAre(0, 1, 2));
  params.top_p = 1;
  EXPECT_THAT(Support(LogitsOf(p), params), ElementsAre(0, 1, 2, 3));
}

TEST(Sample, TopPOverManyEqualTokensTakesTheLowestIds) {
  SamplingParams params;
  params.temperature = 1;
  params.top_p = 0.1005f;
  const std::set<int32_t> support = Support(std::vector<float>(1000, 0.5f), params);
  EXPECT_EQ(*support.rbegin(), 100);
  EXPECT_GT(support.size(), 95u);
}

TEST(Sample, TopPSeesWhatTopKLeft) {
  const std::vector<double> p = {0.4, 0.3, 0.2, 0.1};
  SamplingParams params;
  params.temperature = 1;
  params.top_p = 0.56f;
  EXPECT_THAT(Support(LogitsOf(p), params), ElementsAre(0, 1));
  params.top_k = 2;  // renormalised: 0.57, 0.43
  EXPECT_THAT(Support(LogitsOf(p), params), ElementsAre(0));
}

TEST(Sample, MinPDropsWhatIsFarBelowTheBest) {
  const std::vector<double> p = {0.5, 0.3, 0.15, 0.05};
  SamplingParams params;
  params.temperature = 5;
  params.min_p = 0.2f;
  EXPECT_THAT(Support(LogitsOf(p), params), ElementsAre(0, 1, 2));
  params.min_p = 0.99f;
  EXPECT_THAT(Support(LogitsOf(p), params), ElementsAre(0));
}

TEST(Sample, NeverDrawsAnImpossibleToken) {
  SamplingParams params;
  params.temperature = 100;
  EXPECT_THAT(Support(std::vector<float>{-kInf, 0, -kInf, 1}, params), ElementsAre(1, 3));
}

TEST(Sample, RepetitionPenaltyCoversPromptAndOutput) {
  SamplingParams params;
  params.repetition_penalty = 2;
  const std::vector<int32_t> history = {0, 1};
  // Positive logits are divided, negative ones multiplied.
  EXPECT_EQ(SampleId(std::vector<float>{4, 3.9f, 2.1f}, params, history, 1), 2);
  EXPECT_EQ(SampleId(std::vector<float>{-1, -1.1f, -1.9f}, params, history, 1), 2);
  // Once, however often a token occurs.
  EXPECT_EQ(SampleId(std::vector<float>{4, 1.9f}, params, std::vector<int32_t>{0, 0, 0}, 0), 0);
}

TEST(Sample, PresenceAndFrequencyCountGeneratedTokensOnly) {
  const std::vector<int32_t> history = {0, 0, 0, 1, 1, 2};
  SamplingParams presence;
  presence.presence_penalty = 1;
  EXPECT_EQ(SampleId(std::vector<float>{2.5f, 3, 3.4f, 0}, presence, history, 3), 0);
  EXPECT_EQ(SampleId(std::vector<float>{2.3f, 3, 3.4f, 0}, presence, history, 3), 2);
  SamplingParams frequency;
  frequency.frequency_penalty = 1;  // 1 for token 2, 2 for token 1, nothing for the prompt's 0
  EXPECT_EQ(SampleId(std::vector<float>{0.9f, 3, 1.8f}, frequency, history, 3), 1);
  EXPECT_EQ(SampleId(std::vector<float>{1.1f, 3, 1.8f}, frequency, history, 3), 0);
  frequency.frequency_penalty = -1;  // negative: a reward
  EXPECT_EQ(SampleId(std::vector<float>{1.5f, 0, 0.8f}, frequency, history, 3), 1);
}

TEST(Sample, HistoryOutsideTheVocabularyIsIgnored) {
  SamplingParams params;
  params.repetition_penalty = 2;
  const std::vector<int32_t> history = {-1, 3, 1 << 30, 0};
  EXPECT_EQ(SampleId(std::vector<float>{4, 3, 1}, params, history, 0), 1);
}

TEST(Sample, BiasComesBeforeEverythingElse) {
  const std::vector<float> logits = {1, 5, 2, 4};
  EXPECT_EQ(SampleId(logits, {.logit_bias = {{1, -100}}}), 3);
  EXPECT_EQ(SampleId(logits, {.logit_bias = {{0, 100}}}), 0);
  EXPECT_EQ(SampleId(logits, {.logit_bias = {{0, 3.5f}, {3, 1.5f}}}), 3);
  // 1 + 6 = 7, halved by the penalty, is less than 4; after a penalty first it would be more.
  EXPECT_EQ(SampleId(logits, {.repetition_penalty = 2, .logit_bias = {{0, 6}, {1, -5}}},
                     std::vector<int32_t>{0}, 1),
            3);
  EXPECT_EQ(SampleId(logits, {.logit_bias = {{-1, 100}, {4, 100}}}), 1);  // not in the vocabulary
  // A forced token is drawn at any temperature, also with top-k.
  for (int position = 0; position < 100; ++position) {
    const SamplingParams params = {
        .temperature = 2, .top_k = 2, .seed = 3, .logit_bias = {{0, 100}}};
    EXPECT_EQ(SampleId(logits, params, {}, 0, position), 0);
  }
  // Log-probabilities stay those of the model.
  const auto plain = Sample(logits, {.logprobs = 2}, {}, 0, 0);
  const auto biased = Sample(logits, {.logprobs = 2, .logit_bias = {{2, 1}}}, {}, 0, 0);
  ASSERT_TRUE(plain.ok() && biased.ok());
  EXPECT_EQ(plain->top_logprobs, biased->top_logprobs);
}

TEST(Sample, LogprobsAreOfTheRawDistribution) {
  const std::vector<double> p = {0.5, 0.125, 0.25, 0.125};
  SamplingParams params;
  params.repetition_penalty = 100;
  params.logprobs = 3;
  const auto token = Sample(LogitsOf(p), params, std::vector<int32_t>{0, 2}, 1, 0);
  ASSERT_TRUE(token.ok());
  EXPECT_EQ(token->token_id, 1);
  EXPECT_NEAR(token->logprob, std::log(0.125), 1e-6);
  EXPECT_THAT(token->top_ids, ElementsAre(0, 2, 1)) << "ties to the lower id";
  EXPECT_THAT(token->top_logprobs, ElementsAre(testing::FloatNear(std::log(0.5f), 1e-6f),
                                               testing::FloatNear(std::log(0.25f), 1e-6f),
                                               testing::FloatNear(std::log(0.125f), 1e-6f)));
  EXPECT_EQ(*LogProbability(LogitsOf(p), 1), token->logprob);
}

TEST(Sample, LogprobsAreBoundedByVocabularyAndLimit) {
  SamplingParams params;
  params.logprobs = 1000;
  EXPECT_EQ(Sample(std::vector<float>{1, 2}, params, {}, 0, 0)->top_ids.size(), 2u);
  EXPECT_EQ(Sample(std::vector<float>(100, 0), params, {}, 0, 0)->top_ids.size(),
            static_cast<size_t>(kMaxLogprobs));
}

// The `count` best of `logits` as a device would give them.
std::vector<TopLogit> BestOf(std::span<const float> logits, int count) {
  std::vector<TopLogit> all;
  for (size_t i = 0; i < logits.size(); ++i) all.push_back({logits[i], static_cast<int32_t>(i)});
  std::ranges::stable_sort(all, std::greater<>(), &TopLogit::logit);
  all.resize(count);
  return all;
}

TEST(SampleFromBest, IsSampleWhereItAnswers) {
  constexpr int kTokens = 400;
  const double* const powers = portable_math_internal::kPowerTable.data();
  int answers = 0, refusals = 0;
  for (uint64_t seed = 0; seed < 2000; ++seed) {
    const auto uniform = [&](uint64_t i) { return PhiloxUniform(seed, 1000 + i); };
    const double spread = 1 + 8 * uniform(kTokens);
    std::vector<float> logits;
    for (int id = 0; id < kTokens; ++id) {
      logits.push_back(std::round(static_cast<float>(spread * uniform(id)) * 16) / 16);  // ties
    }
    SamplingParams params = {.temperature = static_cast<float>(0.2 + 2 * uniform(kTokens + 1)),
                             .seed = seed};
    if (seed % 3 != 0) params.top_p = static_cast<float>(0.02 + 0.979 * uniform(kTokens + 2));
    if (seed % 3 != 1) params.min_p = static_cast<float>(0.001 + 0.9 * uniform(kTokens + 3));
    ASSERT_TRUE(BestMayDecide(params, kTokens));
    std::vector<TopLogit> top;
    uint64_t total = 0;
    const float best = std::ranges::max(logits);
    for (int id = 0; id < kTokens; ++id) {
      top.push_back({logits[id], id});
      total += SamplingUnits(powers, logits[id], best, 1);
    }
    std::ranges::stable_sort(top, std::greater<>(), &TopLogit::logit);
    const int32_t want = Sample(logits, params, {}, 0, 9).value().token_id;
    EXPECT_EQ(SampleFromBest(top, kTokens, total, params, 9).value(), want) << seed;
    for (const size_t count : {1, 7, 64, 200}) {
      const auto token = SampleFromBest(std::span(top).first(count), kTokens, total, params, 9);
      ASSERT_TRUE(token.ok()) << token.status();
      ++(token->has_value() ? answers : refusals);
      if (token->has_value()) {
        EXPECT_EQ(**token, want) << seed << ", best " << count;
      }
    }
  }
  EXPECT_GT(answers, 2000);
  EXPECT_GT(refusals, 1000);
}

TEST(SampleFromBest, RefusesNonFiniteLogitsAndWhatItIsNotFor) {
  const std::vector<TopLogit> top = {{std::nanf(""), 3}, {1, 2}};
  const SamplingParams params = {.temperature = 1, .top_p = 0.5f};
  EXPECT_EQ(SampleFromBest(top, 10, 1, params, 0).status().code(), absl::StatusCode::kDataLoss);
  EXPECT_FALSE(BestMayDecide({.temperature = 1}, 10));
  EXPECT_FALSE(BestMayDecide({.top_p = 0.5f}, 10));
  EXPECT_FALSE(BestMayDecide({.temperature = 1, .top_k = 9, .top_p = 0.5f}, 10));
  EXPECT_FALSE(BestMayDecide({.temperature = 1, .top_p = 0.5f, .logprobs = 1}, 10));
}

TEST(DrawAmongAll, OnlyWhatNothingElseDecides) {
  const SamplingParams plain = {.temperature = 0.8f, .seed = 3};
  const auto draw = DrawAmongAll(plain, 100, 5);
  ASSERT_TRUE(draw.has_value());
  EXPECT_EQ(draw->temperature, double{0.8f});
  EXPECT_EQ(draw->uniform, PhiloxUniform(3, 5));
  for (const auto& change : std::vector<std::function<void(SamplingParams&)>>{
           [](SamplingParams& p) { p.top_k = 99; }, [](SamplingParams& p) { p.top_p = 0.9f; },
           [](SamplingParams& p) { p.min_p = 0.1f; }, [](SamplingParams& p) { p.logprobs = 1; },
           [](SamplingParams& p) { p.presence_penalty = 1; },
           [](SamplingParams& p) {
             p.logit_bias = {{1, 2}};
           }}) {
    SamplingParams params = plain;
    change(params);
    EXPECT_FALSE(DrawAmongAll(params, 100, 5).has_value());
  }
  for (const SamplingParams& greedy :
       {SamplingParams{.temperature = 0, .top_p = 0.9f}, {.temperature = 1, .top_k = 1}}) {
    const auto best = DrawAmongAll(greedy, 100, 5);
    ASSERT_TRUE(best.has_value());
    EXPECT_EQ(best->temperature, 0);
  }
  EXPECT_FALSE(DrawAmongAll({.temperature = 0, .presence_penalty = 1}, 100, 5).has_value());
  SamplingParams off = plain;  // filters that leave everything
  off.top_k = 100, off.top_p = 1;
  EXPECT_TRUE(DrawAmongAll(off, 100, 5).has_value());
}

// Sums may be taken in parts of any size: nothing is rounded in them.
TEST(SamplingUnits, TheBestTokenHas2To40AndTargetsLieWithinTheTotal) {
  const double* const powers = portable_math_internal::kPowerTable.data();
  EXPECT_EQ(SamplingUnits(powers, 3, 3, 0.5), uint64_t{1} << 40);
  EXPECT_EQ(SamplingUnits(powers, -100, 3, 0.5), 0u);
  EXPECT_EQ(SamplingUnits(powers, 2, 3, 1), static_cast<uint64_t>(PortableExp(-1) * 0x1p40));
  EXPECT_EQ(DrawTarget(10, 0), 0u);
  EXPECT_EQ(DrawTarget(10, 0.95), 9u);
  for (const uint64_t total : {uint64_t{1}, uint64_t{1} << 53, UINT64_MAX >> 1}) {
    EXPECT_LT(DrawTarget(total, 1 - 0x1p-53), total);
  }
}

TEST(SampleFromTop, ChoosesAsSample) {
  std::vector<float> logits;
  uint32_t state = 1;
  for (int i = 0; i < 500; ++i) {
    state = state * 1664525 + 1013904223;
    logits.push_back(static_cast<float>(state >> 24) / 32 - 4);  // with ties
  }
  for (const SamplingParams& params :
       {SamplingParams{}, SamplingParams{.temperature = 1, .top_k = 40},
        SamplingParams{.temperature = 0.7f, .top_k = 50, .top_p = 0.9f, .min_p = 0.05f},
        SamplingParams{.temperature = 2, .top_k = 3, .top_p = 0.5f, .repetition_penalty = 1},
        SamplingParams{.temperature = 1, .top_k = 499}}) {
    const int needed = TopLogitsNeeded(params, 500);
    ASSERT_GT(needed, 0);
    const std::vector<TopLogit> top = BestOf(logits, needed);
    for (int position = 0; position < 300; ++position) {
      const auto token = SampleFromTop(top, params, position);
      ASSERT_TRUE(token.ok());
      EXPECT_EQ(*token, SampleId(logits, params, {}, 0, position));
    }
  }
}

TEST(SampleFromTop, IsNotForWhatNeedsAllLogits) {
  for (const SamplingParams& params :
       {SamplingParams{.temperature = 1}, SamplingParams{.temperature = 1, .top_k = 500},
        SamplingParams{.repetition_penalty = 1.1f}, SamplingParams{.presence_penalty = 1},
        SamplingParams{.frequency_penalty = -1}, SamplingParams{.logprobs = 1},
        SamplingParams{.logit_bias = {{3, 1}}}}) {
    EXPECT_EQ(TopLogitsNeeded(params, 500), 0);
  }
}

TEST(SampleFromTop, RefusesNonFiniteLogits) {
  const std::vector<TopLogit> top = {{std::nanf(""), 7}};
  EXPECT_EQ(SampleFromTop(top, {}, 0).status().code(), absl::StatusCode::kDataLoss);
}

TEST(LogProbability, RefusesTokensOutsideTheVocabulary) {
  const std::vector<float> logits = {1, 2};
  for (const int32_t token : {-1, 2}) {
    EXPECT_EQ(LogProbability(logits, token).status().code(), absl::StatusCode::kInvalidArgument);
  }
}

}  // namespace
}  // namespace stagecoach
