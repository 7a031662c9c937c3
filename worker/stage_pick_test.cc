// Steps whose tokens the backend picks: they lie one behind the other, and their results are
// those of steps run one by one.
#include <algorithm>
#include <cmath>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "gtest/gtest.h"
#include "worker/kv_slots.h"
#include "worker/picking_backend.h"
#include "worker/stage.h"
#include "worker/stage_fixture.h"

namespace stagecoach {
namespace {

using Code = absl::StatusCode;

constexpr int32_t kZero[] = {0};
constexpr int kLayers = 32;  // each adds one to a token

class StagePickTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto model = OpenHookedModel("demo-Q4_K_M.gguf", std::make_shared<ReadHook>());
    ASSERT_TRUE(model.ok()) << model.status();
    model_ = *std::move(model);
    row_.emplace(&backend_, model_, StageRow::Options{.max_slots = 4});
  }
  Stage& stage() { return (*row_)[0]; }
  bool Submit(const Frame& frame) {
    const absl::StatusOr<Stage::Submitted> submitted = stage().Submit(frame);
    EXPECT_TRUE(submitted.ok()) << submitted.status();
    if (!submitted.ok()) return false;
    EXPECT_FALSE(submitted->frame) << "before its tokens are known";
    return submitted->taken;
  }
  bool Ready() { return stage().Ready().value(); }
  v1::StepResult Finish() {
    const auto out = stage().Finish();
    EXPECT_TRUE(out.ok()) << out.status();
    return out.ok() && *out ? (**out).header.result() : v1::StepResult();
  }
  int32_t FinishedToken(int sequence = 0) { return Finish().sequences(sequence).token_id(); }
  // Sequence `slot` + 1 begins in `slot` with one token.
  static StepBuilder& Begin(StepBuilder& step, uint32_t slot, int32_t token,
                            const v1::SamplingParams& sampling = {}) {
    return step.Open(slot, slot + 1, sampling).Rows(slot, slot + 1, 0, {&token, 1}).Sample();
  }
  static StepBuilder& Ahead(StepBuilder& step, uint32_t slot, uint32_t position) {
    return step.Rows(slot, slot + 1, position, kZero).Ahead().Sample();
  }
  static Frame Begin(uint64_t number, uint32_t slot, int32_t token,
                     const v1::SamplingParams& sampling = {}) {
    StepBuilder step(number);
    return Begin(step, slot, token, sampling).Build();
  }
  static Frame Ahead(uint64_t number, uint32_t slot, uint32_t position) {
    StepBuilder step(number);
    return Ahead(step, slot, position).Build();
  }

  PickingBackend backend_;
  std::shared_ptr<const ModelFile> model_;
  std::optional<StageRow> row_;
};

TEST_F(StagePickTest, StepsLieBehindEachOther) {
  backend_.ready = false;
  EXPECT_TRUE(Submit(Begin(1, 0, 7)));
  EXPECT_EQ(stage().pending(), 1);
  EXPECT_TRUE(Submit(Ahead(2, 0, 1)));
  EXPECT_EQ(stage().pending(), 2);
  EXPECT_FALSE(Submit(Ahead(3, 0, 2))) << "more than kStepsInFlight";
  EXPECT_FALSE(Ready());
  backend_.ready = true;
  EXPECT_TRUE(Ready());
  EXPECT_EQ(FinishedToken(), 7 + kLayers);
  EXPECT_TRUE(Submit(Ahead(3, 0, 2)));
  EXPECT_EQ(FinishedToken(), 7 + 2 * kLayers);
  EXPECT_EQ(FinishedToken(), 7 + 3 * kLayers);
  EXPECT_EQ(stage().pending(), 0);
  // Nothing is pending: the token is known.
  EXPECT_TRUE(Submit(Ahead(4, 0, 3)));
  EXPECT_EQ(FinishedToken(), 7 + 4 * kLayers);
  EXPECT_EQ(stage().tokens(), 4u);
}

// The pick of a row is found by its slot, whatever the rows' order; slots come and go meanwhile.
TEST_F(StagePickTest, EachGoesOnWithItsOwnPick) {
  StepBuilder first(1);
  const std::vector<int32_t> prompt = {5, 6};
  Begin(first, 2, 100).Open(3, 4).Rows(3, 4, 0, prompt);
  EXPECT_TRUE(Submit(Begin(first, 0, 7).Build()));
  StepBuilder second(2);
  Ahead(second, 0, 1).Open(1, 2).Rows(1, 2, 0, prompt).Sample();
  EXPECT_TRUE(Submit(Ahead(second, 2, 1).Build()));
  v1::StepResult result = Finish();
  EXPECT_EQ(result.sequences(0).token_id(), 100 + kLayers);
  EXPECT_FALSE(result.sequences(1).sampled());
  EXPECT_EQ(result.sequences(2).token_id(), 7 + kLayers);
  // Slot 3 has no row in the step that is pending, so its end may be told.
  StepBuilder third(3);
  third.Close(3).Open(3, 9).Rows(3, 9, 0, prompt).Sample();
  EXPECT_TRUE(Submit(Ahead(third, 1, 2).Build()));
  result = Finish();
  EXPECT_EQ(result.sequences(0).token_id(), 7 + 2 * kLayers);
  EXPECT_EQ(result.sequences(1).token_id(), 6 + kLayers);
  EXPECT_EQ(result.sequences(2).token_id(), 100 + 2 * kLayers);
  result = Finish();
  EXPECT_EQ(result.sequences(0).token_id(), 6 + kLayers);
  EXPECT_EQ(result.sequences(1).token_id(), 6 + 2 * kLayers);
}

// It chose in a step before the one that is pending: its token is known.
TEST_F(StagePickTest, ASequenceThatSatAStepOutGoesOnWithItsOwnToken) {
  StepBuilder first(1);
  Begin(first, 0, 7);
  EXPECT_TRUE(Submit(Begin(first, 1, 100).Build()));
  EXPECT_EQ(FinishedToken(), 7 + kLayers);
  EXPECT_TRUE(Submit(Ahead(2, 1, 1)));
  EXPECT_TRUE(Submit(Ahead(3, 0, 1)));
  EXPECT_EQ(FinishedToken(), 100 + 2 * kLayers);
  EXPECT_EQ(FinishedToken(), 7 + 2 * kLayers);
}

TEST_F(StagePickTest, WhatNeedsAnEarlierResultWaitsForIt) {
  v1::SamplingParams penalised;
  penalised.set_presence_penalty(1);
  const std::vector<int32_t> prompt = {5, 6};
  const Frame frames[] = {
      StepBuilder(2).Rows(0, 1, 1, kZero).Ahead().Sample().Logits().Build(),
      StepBuilder(2).Open(1, 2).Rows(1, 2, 0, prompt).Targets({prompt.data(), 1}).Build(),
      Begin(2, 1, 9, penalised),
      StepBuilder(2).Copy(0, 9).Open(1, 2).Rows(1, 2, 0, prompt).Sample().Build(),
      StepBuilder(2).Close(0).Open(0, 5).Rows(0, 5, 0, prompt).Sample().Build(),
      StepBuilder(2).Close(0).Build(),
  };
  for (const Frame& frame : frames) {
    row_.emplace(&backend_, model_, StageRow::Options{.max_slots = 4});
    EXPECT_TRUE(Submit(Begin(1, 0, 7)));
    EXPECT_FALSE(Submit(frame)) << frame.header.DebugString();
    EXPECT_EQ(FinishedToken(), 7 + kLayers);
    EXPECT_TRUE(Submit(frame)) << frame.header.DebugString();
    const v1::StepResult result = Finish();
    for (const v1::SequenceResult& sequence : result.sequences()) {
      EXPECT_EQ(sequence.status_code(), 0u) << frame.header.DebugString();
    }
  }
}

// More rows than are picked for at once: as if the backend picked nothing.
TEST_F(StagePickTest, StepsOfManyRowsWait) {
  StepBuilder step(1);
  for (uint32_t slot = 0; slot < 4; ++slot) Begin(step, slot, 10 * static_cast<int32_t>(slot));
  EXPECT_TRUE(Submit(step.Build()));
  backend_.ready = false;
  EXPECT_TRUE(Ready());
  EXPECT_FALSE(Submit(Ahead(2, 0, 1))) << "behind a frame that nobody has taken yet";
  const v1::StepResult result = Finish();
  for (int i = 0; i < 4; ++i) EXPECT_EQ(result.sequences(i).token_id(), 10 * i + kLayers);
}

TEST_F(StagePickTest, ABadFrameBehindAStepChangesNothing) {
  EXPECT_TRUE(Submit(Begin(1, 0, 7)));
  EXPECT_EQ(stage().Submit(Ahead(2, 0, 5)).status().code(), Code::kOutOfRange);
  EXPECT_TRUE(Submit(Ahead(2, 0, 1)));
  EXPECT_EQ(FinishedToken(), 7 + kLayers);
  EXPECT_EQ(FinishedToken(), 7 + 2 * kLayers);
}

// A row that fails takes the row ahead behind it along, which is with the device already; their
// company goes on, and the blocks are clean for who comes next.
TEST_F(StagePickTest, ARowAheadBehindAFailedRowEndsAlike) {
  backend_.poison_layer = 3;  // so that it gets into the KV
  backend_.poison_token = 100;
  backend_.bad_logits = 50 + kLayers;
  for (const int32_t bad : {100, 50}) {
    row_.emplace(&backend_, model_, StageRow::Options{.max_slots = 2});
    StepBuilder first(1), second(2), third(3);
    const int32_t prompt[] = {5, bad};
    first.Open(0, 1).Rows(0, 1, 0, prompt).Sample();
    EXPECT_TRUE(Submit(Begin(first, 1, 7).Build()));
    Ahead(second, 0, 2);
    EXPECT_TRUE(Submit(Ahead(second, 1, 1).Build()));
    for (int step = 1; step <= 2; ++step) {
      const v1::StepResult result = Finish();
      EXPECT_EQ(result.sequences(0).status_code(), static_cast<uint32_t>(Code::kDataLoss));
      EXPECT_FALSE(result.sequences(0).sampled());
      EXPECT_EQ(result.sequences(1).token_id(), 7 + step * kLayers);
    }
    const int32_t good[] = {9};
    third.Close(0).Open(0, 3).Rows(0, 3, 0, good).Sample();
    EXPECT_TRUE(Submit(Ahead(third, 1, 2).Build()));
    const v1::StepResult result = Finish();
    EXPECT_EQ(result.sequences(0).token_id(), 9 + kLayers);
    EXPECT_EQ(result.sequences(1).token_id(), 7 + 3 * kLayers);
    for (const auto& layer : backend_.caches.back()->keys) {
      for (const float key : layer) EXPECT_TRUE(std::isfinite(key));
    }
  }
}

TEST(KvSlots, APickTakesItsPlaceInTheHistory) {
  KvSlots slots(/*slots=*/1, /*max_context=*/8, /*kv_blocks=*/1, /*keep_history=*/true);
  const int32_t tokens[] = {4, PickOf(0)};
  slots.Begin();
  slots.Open(0, {.sequence_id = 1, .length = 2});
  slots.SetTokens(0, 0, tokens);
  slots.SetPicked(0, 6);
  EXPECT_EQ(slots.History(0)[1], 6);
  slots.SetPicked(0, 5);  // the latest token is known: the pick is of a later one
  EXPECT_EQ(slots.History(0)[0], 4);
  EXPECT_EQ(slots.History(0)[1], 6);
}

}  // namespace
}  // namespace stagecoach
