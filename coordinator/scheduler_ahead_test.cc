// Decode rows that go out before their token has come back, on one stage.
#include <algorithm>
#include <deque>
#include <iterator>
#include <map>
#include <numeric>
#include <vector>

#include "coordinator/scheduler.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace stagecoach {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::ElementsAreArray;
using ::testing::IsEmpty;
using ::testing::SizeIs;

SchedulerRequest MakeRequest(RequestId id, int prompt, int max_tokens) {
  SchedulerRequest request{.id = id, .max_tokens = max_tokens};
  request.prompt.resize(prompt);
  std::iota(request.prompt.begin(), request.prompt.end(), 100 * static_cast<int32_t>(id));
  return request;
}

SchedulerOptions Options(int slots, int stages = 1) {
  return {.stages = stages, .max_slots = slots, .max_context = 1024, .max_waiting = 4};
}

// Every sequence of the step samples `token`.
absl::Status Answer(Scheduler& scheduler, const Step& step, int32_t token = 7) {
  const std::vector<RowsResult> results(step.rows.size(), {.token_id = token});
  return scheduler.OnResult(step.number, results);
}

std::vector<Step> TakeSteps(Scheduler& scheduler) {
  std::vector<Step> steps;
  while (std::optional<Step> step = scheduler.Next()) steps.push_back(*std::move(step));
  return steps;
}

std::vector<SchedulerEvent::Kind> Kinds(Scheduler& scheduler) {
  std::vector<SchedulerEvent::Kind> kinds;
  for (const SchedulerEvent& event : scheduler.TakeEvents()) kinds.push_back(event.kind);
  return kinds;
}

std::vector<bool> AreAhead(const Step& step) {
  std::vector<bool> ahead;
  for (const StepRows& rows : step.rows) ahead.push_back(rows.ahead);
  return ahead;
}

TEST(SchedulerAheadTest, SendsTheNextRowBeforeItsTokenIsKnown) {
  Scheduler scheduler(Options(2));
  ASSERT_TRUE(scheduler.Add(MakeRequest(1, 3, 4)).ok());
  std::vector<Step> steps = TakeSteps(scheduler);
  ASSERT_THAT(steps, SizeIs(2));
  EXPECT_FALSE(steps[0].rows[0].ahead);
  for (int position = 3; position <= 5; ++position) {
    const Step& step = steps.back();
    ASSERT_THAT(step.rows, SizeIs(1));
    EXPECT_TRUE(step.rows[0].ahead);
    EXPECT_TRUE(step.rows[0].sample);
    EXPECT_FALSE(step.rows[0].open);
    EXPECT_EQ(step.rows[0].start_position, position);
    EXPECT_EQ(step.rows[0].row_count, 1);
    EXPECT_EQ(step.decode_rows, 1);
    EXPECT_THAT(step.token_ids, ElementsAre(0));
    ASSERT_TRUE(Answer(scheduler, steps[steps.size() - 2], position).ok());
    EXPECT_THAT(Kinds(scheduler), ElementsAre(SchedulerEvent::Kind::kToken));
    const std::vector<Step> more = TakeSteps(scheduler);
    // The fourth token is the last one, which is known when the third is in flight.
    ASSERT_THAT(more, SizeIs(position < 5 ? 1 : 0));
    steps.insert(steps.end(), more.begin(), more.end());
  }
  ASSERT_TRUE(Answer(scheduler, steps.back()).ok());
  EXPECT_THAT(Kinds(scheduler),
              ElementsAre(SchedulerEvent::Kind::kToken, SchedulerEvent::Kind::kChoiceEnd,
                          SchedulerEvent::Kind::kEnd));
  EXPECT_THAT(TakeSteps(scheduler), IsEmpty());
}

TEST(SchedulerAheadTest, SendsNothingBeyondTheContext) {
  SchedulerOptions options = Options(1);
  options.max_context = 5;
  Scheduler scheduler(options);
  ASSERT_TRUE(scheduler.Add(MakeRequest(1, 3, 50)).ok());
  std::deque<Step> flying;
  std::vector<int> positions;
  do {
    for (Step& step : TakeSteps(scheduler)) flying.push_back(std::move(step));
    positions.push_back(flying.front().rows[0].start_position);
    ASSERT_TRUE(Answer(scheduler, flying.front()).ok());
    flying.pop_front();
  } while (!flying.empty());
  EXPECT_THAT(positions, ElementsAre(0, 3));
  EXPECT_EQ(scheduler.TakeEvents().back().finish, Finish::kLength);
}

// Sequences that come at different times, some of them ahead when others begin, never part.
TEST(SchedulerAheadTest, AllDecodingSequencesStayInOneStep) {
  Scheduler scheduler(Options(8));
  std::deque<Step> flying;
  int tokens = 0;
  for (int round = 0; round < 60; ++round) {
    if (round < 16 && round % 2 == 0) {
      ASSERT_TRUE(scheduler.Add(MakeRequest(1 + round / 2, 20, 100)).ok());
    }
    for (Step& step : TakeSteps(scheduler)) flying.push_back(std::move(step));
    ASSERT_THAT(flying, SizeIs(2)) << round;
    if (round >= 20) {
      EXPECT_EQ(flying.back().decode_rows, 8) << round;
      EXPECT_THAT(AreAhead(flying.back()), Each(true)) << round;
    }
    ASSERT_TRUE(Answer(scheduler, flying.front()).ok());
    flying.pop_front();
    const size_t answered = scheduler.TakeEvents().size();
    if (round >= 20) {
      EXPECT_EQ(answered, 8u) << round;
    }
    tokens += static_cast<int>(answered);
  }
  EXPECT_GT(tokens, 8 * 45);
}

TEST(SchedulerAheadTest, ANewcomerJoinsTheStepAhead) {
  Scheduler scheduler(Options(4));
  ASSERT_TRUE(scheduler.Add(MakeRequest(1, 3, 50)).ok());
  const Step first = *scheduler.Next();
  ASSERT_TRUE(scheduler.Add(MakeRequest(2, 5, 50)).ok());
  const Step second = *scheduler.Next();
  EXPECT_THAT(second.token_ids, ElementsAre(0, 200, 201, 202, 203, 204));
  EXPECT_THAT(AreAhead(second), ElementsAre(true, false));
  ASSERT_TRUE(Answer(scheduler, first).ok());
  EXPECT_THAT(AreAhead(*scheduler.Next()), ElementsAre(true, true));
}

TEST(SchedulerAheadTest, NotWithSeveralStages) {
  Scheduler scheduler(Options(2, /*stages=*/2));
  ASSERT_TRUE(scheduler.Add(MakeRequest(1, 3, 50)).ok());
  EXPECT_THAT(TakeSteps(scheduler), SizeIs(1));
}

TEST(SchedulerAheadTest, NotWhileWeightsStream) {
  Scheduler scheduler(Options(2));
  scheduler.SetStreaming(true);
  ASSERT_TRUE(scheduler.Add(MakeRequest(1, 3, 50)).ok());
  const std::vector<Step> steps = TakeSteps(scheduler);
  ASSERT_THAT(steps, SizeIs(1));
  ASSERT_TRUE(Answer(scheduler, steps[0]).ok());
  EXPECT_THAT(TakeSteps(scheduler), SizeIs(1));
}

// Else some would be in every step and the others in every second one.
TEST(SchedulerAheadTest, NotIfOneStepDoesNotHoldAll) {
  SchedulerOptions options = Options(4);
  options.max_step_tokens = 3;
  Scheduler scheduler(options);
  for (int id = 1; id <= 4; ++id) ASSERT_TRUE(scheduler.Add(MakeRequest(id, 1, 50)).ok());
  std::vector<int> rows_of(5);
  for (int i = 0; i < 42; ++i) {
    const std::vector<Step> steps = TakeSteps(scheduler);
    for (const Step& step : steps) {
      if (i > 1) {
        EXPECT_THAT(AreAhead(step), Each(false)) << i;
      }
      for (const StepRows& rows : step.rows) ++rows_of[rows.id];
    }
    const Step* oldest = scheduler.FindInFlight(i + 1);
    ASSERT_NE(oldest, nullptr);
    ASSERT_TRUE(Answer(scheduler, Step(*oldest)).ok());
  }
  const auto [least, most] = std::minmax_element(rows_of.begin() + 1, rows_of.end());
  EXPECT_LE(*most - *least, 2);
}

TEST(SchedulerAheadTest, TakesABlockButPreemptsNobodyForIt) {
  for (const int prompt : {20, 32}) {  // the second needs a block for its first row ahead, or not
    SchedulerOptions options = Options(2);
    options.max_context = 96;
    options.kv_blocks = 3;
    Scheduler scheduler(options);
    ASSERT_TRUE(scheduler.Add(MakeRequest(1, 32, 50)).ok());
    ASSERT_TRUE(scheduler.Add(MakeRequest(2, prompt, 50)).ok());
    const std::vector<Step> steps = TakeSteps(scheduler);
    ASSERT_THAT(steps[0].rows, SizeIs(2));
    EXPECT_EQ(scheduler.stats().preemptions, 0u);
    if (prompt == 32) {
      EXPECT_THAT(steps, SizeIs(1));
      ASSERT_TRUE(Answer(scheduler, steps[0]).ok());
      ASSERT_TRUE(scheduler.Next());
      EXPECT_EQ(scheduler.stats().preemptions, 1u);  // now that its token is known
    } else {
      ASSERT_THAT(steps, SizeIs(2));
      EXPECT_THAT(AreAhead(steps[1]), ElementsAre(true, true));
      EXPECT_THAT(steps[1].rows[0].new_blocks, SizeIs(1));
      EXPECT_THAT(steps[1].rows[1].new_blocks, IsEmpty());
    }
    EXPECT_TRUE(scheduler.CheckBlocks().ok()) << scheduler.CheckBlocks();
  }
}

// A preempted sequence is replayed with the tokens that have come back; rows that were ahead of
// that are computed again.
TEST(SchedulerAheadTest, APreemptedSequenceGoesOnFromItsKnownTokens) {
  SchedulerOptions options = Options(2);
  options.max_context = 96;
  options.kv_blocks = 3;
  Scheduler scheduler(options);
  SchedulerRequest low = MakeRequest(1, 28, 50);
  ASSERT_TRUE(scheduler.Add(low).ok());
  ASSERT_TRUE(scheduler.Add(MakeRequest(2, 30, 50)).ok());
  std::deque<Step> flying;
  std::vector<int32_t> replayed;
  for (int token = 10; replayed.empty() && token < 60; ++token) {
    for (Step& step : TakeSteps(scheduler)) {
      for (const StepRows& rows : step.rows) {
        if (rows.attempt == 0) continue;
        EXPECT_EQ(rows.id, 2u);
        replayed = rows.cached_tokens;
        replayed.insert(replayed.end(), step.token_ids.end() - rows.row_count,
                        step.token_ids.end());
      }
      flying.push_back(std::move(step));
    }
    ASSERT_TRUE(Answer(scheduler, flying.front(), token).ok());
    flying.pop_front();
    if (token == 40) scheduler.Cancel(1);  // makes room
  }
  const SchedulerRequest request = MakeRequest(2, 30, 50);
  ASSERT_GT(replayed.size(), 30u);
  EXPECT_TRUE(std::equal(request.prompt.begin(), request.prompt.end(), replayed.begin()));
  for (size_t i = 30; i < replayed.size(); ++i) {
    EXPECT_EQ(replayed[i], static_cast<int32_t>(10 + i - 30));
  }
}

// A sequence loses its slot while its next row is in flight: another client has none.
TEST(SchedulerAheadTest, WhatComesBackForARowAheadOfAPreemptedSequenceIsIgnored) {
  SchedulerOptions options = Options(2);
  options.max_step_tokens = 16;
  options.max_context = 96;
  Scheduler scheduler(options);
  const auto add = [&](RequestId id, const char* client) {
    SchedulerRequest request = MakeRequest(id, 5, 40);
    request.client = client;
    ASSERT_TRUE(scheduler.Add(request).ok());
  };
  add(1, "a");
  add(2, "a");
  std::deque<Step> flying;
  std::map<RequestId, std::vector<int32_t>> tokens;
  uint64_t preempted = 0;
  for (int round = 0; round < 200; ++round) {
    if (round == 6) add(3, "b");
    std::ranges::move(TakeSteps(scheduler), std::back_inserter(flying));
    if (flying.empty()) break;
    if (preempted != scheduler.stats().preemptions) {
      preempted = scheduler.stats().preemptions;
      // The step that the next client opens its slot in, behind one with both rows ahead.
      ASSERT_THAT(flying, SizeIs(2));
      EXPECT_THAT(AreAhead(flying.front()), ElementsAre(true, true));
      EXPECT_THAT(flying.back().close, SizeIs(1));
    }
    const Step step = std::move(flying.front());
    flying.pop_front();
    std::vector<RowsResult> results;  // each token says where it belongs
    for (const StepRows& rows : step.rows) {
      results.push_back({.token_id = rows.start_position + rows.row_count});
    }
    ASSERT_TRUE(scheduler.OnResult(step.number, results).ok());
    for (const SchedulerEvent& event : scheduler.TakeEvents()) {
      if (event.kind != SchedulerEvent::Kind::kToken) continue;
      tokens[event.id].push_back(results[event.rows].token_id);
    }
    ASSERT_TRUE(scheduler.CheckBlocks().ok());
  }
  EXPECT_EQ(preempted, 1u);
  std::vector<int32_t> expected(40);
  std::iota(expected.begin(), expected.end(), 5);
  for (RequestId id : {1, 2, 3}) EXPECT_THAT(tokens[id], ElementsAreArray(expected)) << id;
}

// How a sequence may end while its next row is in flight.
enum class End { kStopToken, kEarly, kCancel, kDeadline, kFailure };

class SchedulerAheadEndTest : public testing::TestWithParam<End> {};

TEST_P(SchedulerAheadEndTest, WhatComesBackForARowAheadIsIgnored) {
  Scheduler scheduler(Options(1));
  SchedulerRequest request = MakeRequest(1, 40, 50);
  request.stop_token_ids = {9};
  request.deadline = absl::Seconds(5);
  ASSERT_TRUE(scheduler.Add(request).ok());
  ASSERT_TRUE(scheduler.Add(MakeRequest(2, 40, 50)).ok());  // waits for the slot
  std::vector<Step> steps = TakeSteps(scheduler);
  ASSERT_THAT(steps, SizeIs(2));
  ASSERT_TRUE(steps[1].rows[0].ahead);
  const RowsResult failed[] = {{.status = absl::DataLossError("NaN")}};
  switch (GetParam()) {
    case End::kStopToken:
      ASSERT_TRUE(Answer(scheduler, steps[0], 9).ok());
      break;
    case End::kFailure:
      ASSERT_TRUE(scheduler.OnResult(steps[0].number, failed).ok());
      break;
    case End::kEarly:
      ASSERT_TRUE(Answer(scheduler, steps[0]).ok());
      scheduler.FinishEarly(1);
      break;
    case End::kCancel:
      ASSERT_TRUE(Answer(scheduler, steps[0]).ok());
      scheduler.Cancel(1);
      break;
    case End::kDeadline:
      ASSERT_TRUE(Answer(scheduler, steps[0]).ok());
      scheduler.Tick(absl::Seconds(5));
      break;
  }
  EXPECT_EQ(Kinds(scheduler).back(), SchedulerEvent::Kind::kEnd);
  // The next step gives the slot on; the block that the row ahead is written to is cleared.
  const Step next = *scheduler.Next();
  EXPECT_THAT(next.close, ElementsAre(0));
  EXPECT_THAT(next.clear, testing::Contains(steps[0].rows[0].new_blocks[1]));
  EXPECT_EQ(next.rows[0].id, 2u);
  EXPECT_EQ(next.rows[0].slot, 0);
  EXPECT_FALSE(next.rows[0].ahead);
  // The stage ends the row behind a failed one, too.
  ASSERT_TRUE(GetParam() == End::kFailure ? scheduler.OnResult(steps[1].number, failed).ok()
                                          : Answer(scheduler, steps[1], 3).ok());
  EXPECT_THAT(scheduler.TakeEvents(), IsEmpty());
  EXPECT_TRUE(scheduler.CheckBlocks().ok()) << scheduler.CheckBlocks();
  ASSERT_TRUE(Answer(scheduler, next).ok());
  EXPECT_THAT(Kinds(scheduler), ElementsAre(SchedulerEvent::Kind::kToken));
}

INSTANTIATE_TEST_SUITE_P(Ends, SchedulerAheadEndTest,
                         testing::Values(End::kStopToken, End::kEarly, End::kCancel, End::kDeadline,
                                         End::kFailure));

// The row ahead would write, perhaps what is not finite, to a block that is copied afterwards.
TEST(SchedulerAheadTest, NotBeforeTheOtherChoicesHaveBegun) {
  Scheduler scheduler(Options(4));
  SchedulerRequest request = MakeRequest(1, 40, 50);
  request.choices = 3;
  ASSERT_TRUE(scheduler.Add(request).ok());
  std::vector<Step> steps = TakeSteps(scheduler);
  ASSERT_THAT(steps, SizeIs(1));
  ASSERT_TRUE(Answer(scheduler, steps[0]).ok());
  steps = TakeSteps(scheduler);
  ASSERT_THAT(steps, SizeIs(2));
  EXPECT_THAT(steps[0].copies, SizeIs(2));
  EXPECT_THAT(AreAhead(steps[0]), ElementsAre(false, false, false));
  EXPECT_THAT(AreAhead(steps[1]), ElementsAre(true, true, true));
}

// While a client has to stand back, every step is decided upon when the one before has come back.
TEST(SchedulerAheadTest, NotWhileClientsAreOverTheirShare) {
  Scheduler scheduler(Options(8));
  const auto add = [&](RequestId id, const char* client) {
    SchedulerRequest request = MakeRequest(id, 200, 200);
    request.client = client;
    ASSERT_TRUE(scheduler.Add(request).ok());
  };
  for (int id = 1; id <= 6; ++id) add(id, "heavy");
  std::deque<Step> flying;
  bool ahead_alone = false;
  for (int i = 0; i < 40; ++i) {
    for (Step& step : TakeSteps(scheduler)) flying.push_back(std::move(step));
    ahead_alone = ahead_alone || flying.back().rows[0].ahead;
    ASSERT_TRUE(Answer(scheduler, flying.front()).ok());
    flying.pop_front();
  }
  EXPECT_TRUE(ahead_alone);
  add(7, "light");
  for (int i = 0; i < 10; ++i) {
    for (Step& step : TakeSteps(scheduler)) {
      EXPECT_THAT(AreAhead(step), Each(false)) << i;
      flying.push_back(std::move(step));
    }
    ASSERT_TRUE(Answer(scheduler, flying.front()).ok());
    flying.pop_front();
  }
  // Who has had more than its share is gone, though not forgotten.
  for (int id = 1; id <= 6; ++id) scheduler.Cancel(id);
  for (int i = 0; i < 4; ++i) {
    for (Step& step : TakeSteps(scheduler)) flying.push_back(std::move(step));
    ASSERT_TRUE(Answer(scheduler, flying.front()).ok());
    flying.pop_front();
  }
  ASSERT_THAT(flying, SizeIs(1));
  EXPECT_THAT(AreAhead(flying.front()), ElementsAre(true));
}

}  // namespace
}  // namespace stagecoach
