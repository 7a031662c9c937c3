// What is sampled from the best logits alone is what is sampled from all of them.
#include "worker/step_output.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/sampling_units.h"
#include "worker/fake_backend.h"

namespace stagecoach {
namespace {

constexpr int kVocab = 300;
constexpr int kSequences = 40;  // more than go through the head at once

// Logits are a function of the row's number. With most_top > 0 it offers HeadTop, and HeadDraw if
// it is told to.
class LogitsBackend : public FakeBackend {
 public:
  explicit LogitsBackend(int most_top, bool draws = false) : most_top_(most_top), draws_(draws) {}

  int MaxTopLogits() const override { return most_top_; }
  bool DrawsTokens() const override { return draws_; }
  absl::Status HeadDraw(Workspace&, const UnitWeights&, std::span<const int32_t> rows,
                        std::span<const TokenDraw> draws, std::span<int32_t> tokens) override {
    drawn_rows += static_cast<int>(rows.size());
    for (size_t i = 0; i < rows.size(); ++i) {
      const std::vector<float> logits = Logits(rows[i]);
      tokens[i] = std::isfinite(logits[bad_token]) ? Draw(logits, draws[i]) : -1;
    }
    return absl::OkStatus();
  }
  absl::Status Head(Workspace&, const UnitWeights&, std::span<const int32_t> rows,
                    std::span<float> logits) override {
    full_rows += static_cast<int>(rows.size());
    for (size_t i = 0; i < rows.size(); ++i) {
      std::ranges::copy(Logits(rows[i]), logits.begin() + static_cast<ptrdiff_t>(i * kVocab));
    }
    return absl::OkStatus();
  }
  absl::Status HeadTop(Workspace&, const UnitWeights&, std::span<const int32_t> rows, int count,
                       std::span<TopLogit> top, std::span<uint64_t> totals) override {
    EXPECT_LE(count, most_top_);
    top_rows += static_cast<int>(rows.size());
    for (size_t i = 0; i < rows.size(); ++i) {
      const std::vector<float> logits = Logits(rows[i]);
      if (!totals.empty()) totals[i] = UnitsUpTo(logits, 1).back();
      std::vector<TopLogit> all;
      for (int id = 0; id < kVocab; ++id) all.push_back({logits[id], id});
      std::ranges::stable_sort(all, std::greater<>(), &TopLogit::logit);
      if (!std::isfinite(logits[bad_token])) all[0].logit = std::nanf("");
      std::copy_n(all.begin(), count, top.begin() + static_cast<ptrdiff_t>(i) * count);
    }
    return absl::OkStatus();
  }

  int bad_row = -1;
  int full_rows = 0;
  int top_rows = 0;
  int drawn_rows = 0;

 private:
  static int32_t Draw(const std::vector<float>& logits, const TokenDraw& draw) {
    const std::vector<uint64_t> upto = UnitsUpTo(logits, draw.temperature);
    const uint64_t target = DrawTarget(upto.back(), draw.uniform);
    return static_cast<int32_t>(std::ranges::upper_bound(upto, target) - upto.begin());
  }
  static std::vector<uint64_t> UnitsUpTo(const std::vector<float>& logits, double temperature) {
    const float best = std::ranges::max(logits);
    std::vector<uint64_t> upto;
    uint64_t total = 0;
    for (const float logit : logits) {
      total += SamplingUnits(portable_math_internal::kPowerTable.data(), logit, best, temperature);
      upto.push_back(total);
    }
    return upto;
  }
  static constexpr int bad_token = 7;
  std::vector<float> Logits(int row) const {
    std::vector<float> logits;
    for (int id = 0; id < kVocab; ++id) {
      logits.push_back(static_cast<float>((id * 37 + row * 101) % 64) / 8);  // with ties
    }
    if (row == bad_row) logits[bad_token] = -std::numeric_limits<float>::infinity();
    return logits;
  }

  const int most_top_;
  const bool draws_;
};

// A bit of everything: greedy, top-k within and beyond what HeadTop gives, penalties, a bias, draws
// among all tokens, raw logits.
SamplingParams ParamsOf(int sequence) {
  switch (sequence % 5) {
    case 0:
      return {};
    case 1:
      return {.temperature = 1, .top_k = 20, .top_p = 0.9f, .seed = 5};
    case 2:
      return {.temperature = 1, .top_k = 100, .seed = 6};
    case 3:
      return {.temperature = 0.5f, .top_k = 4, .repetition_penalty = 1.5f, .seed = 7};
    default:
      if (sequence % 2 == 0) return {.logit_bias = {{17, 100}}};
      return {.temperature = 2, .seed = static_cast<uint64_t>(sequence)};
  }
}

struct Output {
  v1::StepResult result;
  std::vector<float> payload;
};

// One row of each sequence; every seventh wants its logits, too.
Output RunOn(LogitsBackend& backend,
             const std::function<SamplingParams(int)>& params_of = ParamsOf) {
  KvSlots slots(kSequences, 64, 2 * kSequences, /*keep_history=*/true);
  Workspace workspace;
  const FakeWeights head(std::make_shared<LiveBytes>());
  StepOutput output(&backend, &workspace, kVocab, kSequences);
  v1::StepHeader step;
  slots.Begin();
  for (int i = 0; i < kSequences; ++i) {
    slots.Open(i, {.open = true, .sequence_id = 100u + i, .sampling = params_of(i)});
    const int32_t token = i;
    slots.SetTokens(i, 0, {&token, 1});
    slots.next(i).length = 1;
    v1::SequenceRows& rows = *step.add_rows();
    rows.set_slot(i);
    rows.set_sequence_id(100u + i);
    rows.set_row_count(1);
    rows.set_sample(true);
    rows.set_logits(i % 7 == 0);
  }
  Output out;
  EXPECT_TRUE(output.Run(head, step, slots, out.result, out.payload).ok());
  return out;
}

TEST(StepOutput, BestLogitsSufficeWhereTheyDo) {
  LogitsBackend all(0), best(64), draws(64, /*draws=*/true);
  const Output want = RunOn(all), got = RunOn(best);
  for (const Output& output : {got, RunOn(draws)}) {
    ASSERT_EQ(output.result.sequences_size(), kSequences);
    for (int i = 0; i < kSequences; ++i) {
      EXPECT_EQ(output.result.sequences(i).SerializeAsString(),
                want.result.sequences(i).SerializeAsString())
          << i;
    }
    EXPECT_EQ(output.payload, want.payload);
  }
  EXPECT_EQ(best.drawn_rows, 0);
  EXPECT_EQ(draws.drawn_rows, 4);  // 9, 19, 29 and 39
  EXPECT_EQ(draws.full_rows + draws.drawn_rows, best.full_rows);
  EXPECT_EQ(draws.top_rows, best.top_rows);
  EXPECT_EQ(all.top_rows, 0);
  EXPECT_EQ(all.full_rows, kSequences);
  // Greedy ones and those with top-k of 20, unless their logits are wanted.
  EXPECT_EQ(best.full_rows + best.top_rows, kSequences);
  EXPECT_GT(best.top_rows, kSequences / 4);
  EXPECT_LT(best.top_rows, kSequences / 2);
  for (int i = 4; i < kSequences; i += 10) EXPECT_EQ(got.result.sequences(i).token_id(), 17);
}

// Where the best 64 of 300 do not reach far enough, all logits are asked for after all.
TEST(StepOutput, TopPAndMinPFromTheBestLogitsWhereTheySuffice) {
  const auto params_of = [](int sequence) -> SamplingParams {
    const auto seed = static_cast<uint64_t>(sequence);
    switch (sequence % 4) {
      case 0:
        return {.temperature = 0.8f, .top_p = 0.6f, .seed = seed};
      case 1:
        return {.temperature = 0.8f, .top_p = 0.999f, .seed = seed};
      case 2:
        return {.temperature = 1.5f, .top_p = 0.9f, .min_p = 0.3f, .seed = seed};
      default:
        return {.temperature = 1.5f, .min_p = 1e-4f, .seed = seed};
    }
  };
  LogitsBackend all(0), best(64);
  const Output want = RunOn(all, params_of), got = RunOn(best, params_of);
  for (int i = 0; i < kSequences; ++i) {
    EXPECT_EQ(got.result.sequences(i).SerializeAsString(),
              want.result.sequences(i).SerializeAsString())
        << i;
  }
  const int logits_wanted = (kSequences + 6) / 7;
  EXPECT_EQ(best.top_rows, kSequences - logits_wanted);
  EXPECT_GT(best.full_rows, logits_wanted + kSequences / 4);
  EXPECT_LT(best.full_rows, logits_wanted + 3 * kSequences / 4);
}

TEST(StepOutput, NonFiniteLogitsEndTheirSequenceEitherWay) {
  for (const int bad_row : {10, 19}) {  // greedy, a draw among all tokens
    for (const auto& [most_top, draws] : {std::pair(0, false), std::pair(64, true)}) {
      LogitsBackend backend(most_top, draws);
      backend.bad_row = bad_row;
      const Output out = RunOn(backend);
      for (int i = 0; i < kSequences; ++i) {
        EXPECT_EQ(out.result.sequences(i).status_code() != 0, i == bad_row) << i;
        EXPECT_EQ(out.result.sequences(i).sampled(), i != bad_row) << i;
      }
      EXPECT_EQ(out.result.sequences(bad_row).status_code(),
                static_cast<uint32_t>(absl::StatusCode::kDataLoss));
    }
  }
}

}  // namespace
}  // namespace stagecoach
