// Stages whose activations go from device to device: a frame goes ahead of the step that it is
// about, and the next stage's step waits for its input by itself.
#include <memory>
#include <optional>
#include <vector>

#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include "worker/picking_backend.h"
#include "worker/stage.h"
#include "worker/stage_fixture.h"

namespace stagecoach {
namespace {

using Code = absl::StatusCode;

constexpr int kLayers = 32;  // each adds one to a token

class StageAheadTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto model = OpenHookedModel("demo-Q4_K_M.gguf", std::make_shared<ReadHook>());
    ASSERT_TRUE(model.ok()) << model.status();
    row_.emplace(&backend_, *std::move(model),
                 StageRow::Options{.splits = {10, 20}, .max_slots = 4, .channels = true});
  }
  Stage& stage(size_t i) { return (*row_)[i]; }
  // Submits the frame to stage i.
  Stage::Submitted Submit(size_t i, const Frame& frame) {
    absl::StatusOr<Stage::Submitted> submitted = stage(i).Submit(frame);
    EXPECT_TRUE(submitted.ok()) << submitted.status();
    return submitted.ok() ? *std::move(submitted) : Stage::Submitted();
  }
  // To all stages in turn, none of which has come to the step's end.
  void SubmitToAll(Frame frame) {
    for (size_t i = 0; i < 3; ++i) {
      Stage::Submitted submitted = Submit(i, frame);
      ASSERT_TRUE(submitted.taken) << "stage " << i;
      ASSERT_EQ(submitted.frame.has_value(), i < 2);
      if (submitted.frame) frame = *std::move(submitted.frame);
    }
  }
  // At all stages: the last one's result.
  v1::StepResult FinishAtAll() {
    for (size_t i = 0; i < 2; ++i) {
      EXPECT_TRUE(stage(i).Ready().value());
      EXPECT_FALSE(stage(i).Finish().value().has_value()) << "its frame has gone";
    }
    EXPECT_TRUE(stage(2).Ready().value());
    return stage(2).Finish().value()->header.result();
  }
  int awaited() { return row_->channel(0).awaited + row_->channel(1).awaited; }
  static Frame Begin(uint64_t number, uint32_t slot, int32_t token) {
    return StepBuilder(number)
        .Open(slot, slot + 1)
        .Rows(slot, slot + 1, 0, {&token, 1})
        .Sample()
        .Build();
  }

  PickingBackend backend_;
  std::optional<StageRow> row_;
};

TEST_F(StageAheadTest, FramesGoAheadOfTheirSteps) {
  backend_.ready = false;
  SubmitToAll(Begin(1, 0, 7));
  const int awaited_for_weights = awaited();
  SubmitToAll(Begin(2, 1, 100));
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(stage(i).pending(), kStepsInFlight);
    EXPECT_FALSE(stage(i).Ready().value());
    EXPECT_EQ(stage(i).steps(), 0u);
  }
  EXPECT_FALSE(Submit(0, Begin(3, 2, 50)).taken) << "more than kStepsInFlight";
  backend_.ready = true;
  v1::StepResult result = FinishAtAll();
  EXPECT_EQ(result.sequences(0).token_id(), 7 + kLayers);
  EXPECT_EQ(result.timings_size(), 3);
  SubmitToAll(Begin(3, 2, 50));
  EXPECT_EQ(FinishAtAll().sequences(0).token_id(), 100 + kLayers);
  EXPECT_EQ(FinishAtAll().sequences(0).token_id(), 50 + kLayers);
  for (size_t i = 0; i < 3; ++i) EXPECT_EQ(stage(i).steps(), 3u);
  EXPECT_EQ(awaited(), awaited_for_weights);
}

// A frame that is gone before its step ends tells how long those before took.
TEST_F(StageAheadTest, TheNextFrameTellsTheTimeOfTheLastStep) {
  SubmitToAll(Begin(1, 0, 7));
  const v1::StepResult first = FinishAtAll();
  EXPECT_EQ(first.timings(0).compute_us(), 0u);
  EXPECT_GT(first.timings(2).compute_us(), 0u);
  const double told_later = stage(0).compute_seconds();
  EXPECT_GT(told_later, 0);
  SubmitToAll(Begin(2, 1, 8));
  EXPECT_NEAR(FinishAtAll().timings(0).compute_us(), told_later * 1e6, 1);
}

// The time until its input comes is no time that the step took, but one that the stage waited.
TEST_F(StageAheadTest, AStepBeginsWhenItsInputHasCome) {
  SubmitToAll(Begin(1, 0, 7));
  FinishAtAll();
  const double computed = stage(2).compute_seconds(), waited = stage(2).input_wait_seconds();
  backend_.ready = false;
  row_->channel(1).late = 1;
  SubmitToAll(Begin(2, 1, 8));
  EXPECT_FALSE(stage(2).Ready().value());
  absl::SleepFor(absl::Milliseconds(20));
  EXPECT_FALSE(stage(2).Ready().value());
  EXPECT_EQ(stage(2).input_wait_seconds(), waited);
  const absl::Time came = absl::Now();
  row_->channel(1).late = 0;
  EXPECT_FALSE(stage(2).Ready().value());
  const double wait = stage(2).input_wait_seconds() - waited;
  EXPECT_GE(wait, 0.02);
  backend_.ready = true;
  FinishAtAll();
  EXPECT_EQ(stage(2).input_wait_seconds() - waited, wait) << "counted once";
  EXPECT_LE(stage(2).compute_seconds() - computed, absl::ToDoubleSeconds(absl::Now() - came))
      << "not what came before";
}

// The host waits for the device in such a step, so it waits for the channel first.
TEST_F(StageAheadTest, AStepThatTheHostEndsWaitsForItsInput) {
  SubmitToAll(Begin(1, 0, 50));  // all weights are there then
  FinishAtAll();
  const int before = awaited();
  v1::SamplingParams penalised;
  penalised.set_presence_penalty(1);
  const int32_t token[] = {7};
  SubmitToAll(StepBuilder(2).Open(1, 2, penalised).Rows(1, 2, 0, token).Sample().Build());
  EXPECT_EQ(awaited(), before + 1) << "at the last stage";
  EXPECT_EQ(FinishAtAll().sequences(0).token_id(), 7 + kLayers);
}

TEST_F(StageAheadTest, ABrokenChannelIsNoticedWhileAStepWaits) {
  backend_.ready = false;
  SubmitToAll(Begin(1, 0, 7));
  EXPECT_FALSE(stage(1).Ready().value());
  row_->channel(0).broken = absl::UnavailableError("gone");
  EXPECT_EQ(stage(1).Ready().status().code(), Code::kUnavailable);
  EXPECT_FALSE(stage(0).Ready().value());
}

// The close of a sequence must know whether to clear its blocks: it waits for that one's last step
// at every stage.
TEST_F(StageAheadTest, WhatIsNotFiniteIsClearedAtEveryStageOnClose) {
  backend_.poison_layer = 3;
  backend_.poison_token = 100;
  const int32_t bad[] = {100, 100}, good[] = {9};
  SubmitToAll(StepBuilder(1).Open(0, 1).Rows(0, 1, 0, bad).Sample().Build());
  const Frame next = StepBuilder(2).Close(0).Open(0, 2).Rows(0, 2, 0, good).Sample().Build();
  EXPECT_FALSE(Submit(0, next).taken);
  EXPECT_EQ(FinishAtAll().sequences(0).status_code(), static_cast<uint32_t>(Code::kDataLoss));
  EXPECT_FALSE(backend_.KvIsFinite());
  SubmitToAll(next);
  EXPECT_EQ(FinishAtAll().sequences(0).token_id(), 9 + kLayers);
  EXPECT_TRUE(backend_.KvIsFinite());
}

}  // namespace
}  // namespace stagecoach
