#include "coordinator/step_frame.h"

#include "coordinator/pipeline_stats.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace stagecoach {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

constexpr int kVocab = 4;

// Slot 2 samples after three rows; slot 5 is scored for two rows with logits.
Step MakeStep() {
  Step step{.number = 9,
            .close = {1},
            .clear = {4},
            .copies = {{.from = 7, .to = 9}},
            .token_ids = {10, 11, 12, 20, 21}};
  step.rows = {{.id = 77,
                .choice = 1,
                .sequence = 770,
                .slot = 2,
                .start_position = 34,
                .row_count = 3,
                .open = true,
                .sample = true,
                .cached_blocks = {8, 9},
                .cached_tokens = {1, 2, 3},
                .new_blocks = {}},
               {.id = 88,
                .sequence = 880,
                .slot = 5,
                .start_position = 4,
                .row_count = 2,
                .score = true,
                .logits = true,
                .targets = {21},
                .new_blocks = {5, 6}}};
  return step;
}

Frame MakeResult() {
  Frame frame;
  v1::StepResult& result = *frame.header.mutable_result();
  result.set_step(9);
  v1::SequenceResult& first = *result.add_sequences();
  first.set_sequence_id(770);
  first.set_sampled(true);
  first.set_token_id(3);
  first.set_logprob(-0.5f);
  first.add_top_ids(3);
  first.add_top_logprobs(-0.5f);
  v1::SequenceResult& second = *result.add_sequences();
  second.set_sequence_id(880);
  second.add_target_logprobs(-1.5f);
  second.set_logits_rows(2);
  frame.payload = Payload(std::vector<float>{0, 1, 2, 3, 4, 5, 6, 7});
  return frame;
}

TEST(StepFrameTest, CarriesTheWholeStep) {
  const SamplingParams sampling = {.temperature = 0.5f, .top_k = 4, .seed = 99, .logprobs = 2};
  const Frame frame = MakeStepFrame(6, MakeStep(), [&](RequestId id) {
    EXPECT_EQ(id, 77u);
    return SequenceInfo{&sampling, 3};
  });
  EXPECT_EQ(frame.header.epoch(), 6u);
  const v1::StepHeader& step = frame.header.step();
  EXPECT_EQ(step.step(), 9u);
  EXPECT_THAT(step.close(), ElementsAre(1));
  ASSERT_EQ(step.open_size(), 1);
  EXPECT_EQ(step.open(0).slot(), 2u);
  EXPECT_EQ(step.open(0).sequence_id(), 770u);
  EXPECT_THAT(step.clear_blocks(), ElementsAre(4));
  ASSERT_EQ(step.copies_size(), 1);
  EXPECT_EQ(step.copies(0).from(), 7u);
  EXPECT_EQ(step.copies(0).to(), 9u);
  EXPECT_THAT(step.open(0).cached_blocks(), ElementsAre(8, 9));
  EXPECT_THAT(step.open(0).cached_token_ids(), ElementsAre(1, 2, 3));
  EXPECT_THAT(step.rows(1).new_blocks(), ElementsAre(5, 6));
  EXPECT_EQ(step.open(0).prompt_tokens(), 3u);
  EXPECT_EQ(step.open(0).sampling().temperature(), 0.5f);
  EXPECT_EQ(step.open(0).sampling().seed(), ChoiceSeed(99, 1));
  ASSERT_EQ(step.rows_size(), 2);
  EXPECT_TRUE(step.rows(0).sample());
  EXPECT_EQ(step.rows(1).start_position(), 4u);
  EXPECT_TRUE(step.rows(1).logprobs());
  EXPECT_TRUE(step.rows(1).logits());
  EXPECT_THAT(step.rows(1).targets(), ElementsAre(21));
  EXPECT_THAT(step.token_ids(), ElementsAre(10, 11, 12, 20, 21));
  EXPECT_EQ(step.d_model(), 0u);
  EXPECT_THAT(frame.payload.values(), IsEmpty());
}

TEST(StepFrameTest, MarksRowsAhead) {
  Step step{.number = 3, .token_ids = {0, 11}};
  step.rows = {{.sequence = 5, .start_position = 8, .row_count = 1, .sample = true, .ahead = true},
               {.sequence = 6, .slot = 1, .start_position = 9, .row_count = 1, .sample = true}};
  const Frame frame = MakeStepFrame(6, step, [](RequestId) { return SequenceInfo{}; });
  EXPECT_TRUE(frame.header.step().rows(0).ahead());
  EXPECT_FALSE(frame.header.step().rows(1).ahead());
  EXPECT_THAT(frame.header.step().token_ids(), ElementsAre(0, 11));
}

TEST(StepFrameTest, GivesEachChoiceItsSeed) {
  EXPECT_EQ(ChoiceSeed(5, 0), 5u);
  EXPECT_NE(ChoiceSeed(5, 1), 5u);
  EXPECT_NE(ChoiceSeed(5, 1), ChoiceSeed(5, 2));
  EXPECT_NE(ChoiceSeed(5, 1), ChoiceSeed(6, 1));
  EXPECT_EQ(ChoiceSeed(5, 1), ChoiceSeed(5, 1));
}

TEST(StepFrameTest, TakesAResultApart) {
  const Frame frame = MakeResult();
  const absl::StatusOr<StepOutcome> outcome = ParseStepResult(frame, MakeStep(), kVocab);
  ASSERT_TRUE(outcome.ok()) << outcome.status();
  EXPECT_TRUE(outcome->results[0].status.ok());
  EXPECT_EQ(outcome->results[0].token_id, 3);
  EXPECT_EQ(outcome->tokens[0].logprob, -0.5f);
  EXPECT_THAT(outcome->tokens[0].top_ids, ElementsAre(3));
  EXPECT_THAT(outcome->logits[0], IsEmpty());
  EXPECT_THAT(outcome->scores[1], ElementsAre(-1.5f));
  EXPECT_THAT(outcome->logits[1], ElementsAre(0, 1, 2, 3, 4, 5, 6, 7));
}

// What is wrong with one sequence fails that sequence alone.
TEST(StepFrameTest, FailsOneSequence) {
  const auto statuses = [](const Frame& frame) {
    const absl::StatusOr<StepOutcome> outcome = ParseStepResult(frame, MakeStep(), kVocab);
    EXPECT_TRUE(outcome.ok()) << outcome.status();
    std::vector<absl::StatusCode> codes;
    for (const RowsResult& result : outcome->results) codes.push_back(result.status.code());
    return codes;
  };
  constexpr auto kOk = absl::StatusCode::kOk;
  constexpr auto kDataLoss = absl::StatusCode::kDataLoss;
  Frame frame = MakeResult();
  frame.header.mutable_result()->mutable_sequences(0)->set_sampled(false);
  EXPECT_THAT(statuses(frame), ElementsAre(kDataLoss, kOk));
  for (int32_t token : {-1, kVocab}) {
    frame = MakeResult();
    frame.header.mutable_result()->mutable_sequences(0)->set_token_id(token);
    EXPECT_THAT(statuses(frame), ElementsAre(kDataLoss, kOk));
  }
  frame = MakeResult();
  frame.header.mutable_result()->mutable_sequences(0)->add_top_ids(1);
  EXPECT_THAT(statuses(frame), ElementsAre(kDataLoss, kOk));
  frame = MakeResult();
  frame.header.mutable_result()->mutable_sequences(1)->add_target_logprobs(1);
  EXPECT_THAT(statuses(frame), ElementsAre(kOk, kDataLoss));
  frame = MakeResult();
  frame.header.mutable_result()->mutable_sequences(0)->set_status_code(
      static_cast<uint32_t>(absl::StatusCode::kInternal));
  EXPECT_THAT(statuses(frame), ElementsAre(absl::StatusCode::kInternal, kOk));
  frame.header.mutable_result()->mutable_sequences(0)->set_status_code(4711);
  EXPECT_THAT(statuses(frame), ElementsAre(kDataLoss, kOk));
}

TEST(StepFrameTest, RefusesResultsOfAnotherShape) {
  const auto code = [](const Frame& frame) {
    return ParseStepResult(frame, MakeStep(), kVocab).status().code();
  };
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  Frame frame = MakeResult();
  frame.header.mutable_result()->mutable_sequences()->RemoveLast();
  EXPECT_EQ(code(frame), kInvalid);
  frame = MakeResult();
  frame.header.mutable_result()->mutable_sequences()->SwapElements(0, 1);
  EXPECT_EQ(code(frame), kInvalid);
  frame = MakeResult();
  frame.payload = Payload(std::vector<float>(7));
  EXPECT_EQ(code(frame), kInvalid);
  frame.payload = Payload(std::vector<float>(12));
  EXPECT_EQ(code(frame), kInvalid);
  frame = MakeResult();
  frame.header.mutable_result()->mutable_sequences(1)->set_logits_rows(0xffffffff);
  EXPECT_EQ(code(frame), kInvalid);
}

TEST(TokenRateTest, CountsTheLastTenSeconds) {
  TokenRate rate;
  const absl::Duration start = absl::Hours(3);
  EXPECT_EQ(rate.PerSecond(start), 0);
  for (int second = 0; second < 30; ++second) rate.Add(start + absl::Seconds(second), 5);
  EXPECT_EQ(rate.PerSecond(start + absl::Seconds(29)), 5);
  EXPECT_EQ(rate.PerSecond(start + absl::Seconds(34)), 2.5);
  EXPECT_EQ(rate.PerSecond(start + absl::Seconds(60)), 0);
}

TEST(RetryEstimateTest, FollowsTheRunsOfLate) {
  RetryEstimate retry;
  EXPECT_EQ(retry.Wait(4), absl::Seconds(1));
  retry.AddRun(absl::Seconds(8));
  EXPECT_EQ(retry.Wait(4), absl::Seconds(2));
  for (int i = 0; i < 100; ++i) retry.AddRun(absl::Milliseconds(1));
  EXPECT_EQ(retry.Wait(4), absl::Milliseconds(50));
}

}  // namespace
}  // namespace stagecoach
