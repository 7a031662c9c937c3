#include "coordinator/scheduler.h"

#include <numeric>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace stagecoach {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

SchedulerRequest MakeRequest(RequestId id, int prompt, int max_tokens) {
  SchedulerRequest request{.id = id, .max_tokens = max_tokens};
  request.prompt.resize(prompt);
  std::iota(request.prompt.begin(), request.prompt.end(), 100);
  return request;
}

SchedulerOptions Options(int stages, int slots) {
  return {.stages = stages, .max_slots = slots, .max_context = 1024, .max_waiting = 4};
}

// Every sequence of the step samples `token`.
absl::Status Answer(Scheduler& scheduler, const Step& step, int32_t token = 7) {
  std::vector<RowsResult> results(step.rows.size());
  for (RowsResult& result : results) result.token_id = token;
  return scheduler.OnResult(step.number, results);
}

std::vector<Step> TakeSteps(Scheduler& scheduler) {
  std::vector<Step> steps;
  while (std::optional<Step> step = scheduler.Next()) steps.push_back(*std::move(step));
  return steps;
}

std::vector<absl::StatusCode> EndCodes(Scheduler& scheduler) {
  std::vector<absl::StatusCode> codes;
  for (const SchedulerEvent& event : scheduler.TakeEvents()) {
    if (event.kind == SchedulerEvent::Kind::kEnd) codes.push_back(event.status.code());
  }
  return codes;
}

// Adds sequences and brings all of them to the point where they decode.
void StartDecoding(Scheduler& scheduler, int sequences) {
  for (int id = 1; id <= sequences; ++id) {
    ASSERT_TRUE(scheduler.Add(MakeRequest(id, 1, 1000)).ok());
  }
  const std::optional<Step> step = scheduler.Next();
  ASSERT_TRUE(step);
  ASSERT_EQ(step->rows.size(), static_cast<size_t>(sequences));
  ASSERT_TRUE(Answer(scheduler, *step).ok());
}

TEST(SchedulerTest, RunsOneRequestToItsLength) {
  Scheduler scheduler(Options(2, 2));
  ASSERT_TRUE(scheduler.Add(MakeRequest(5, 3, 2)).ok());
  std::vector<Step> steps = TakeSteps(scheduler);
  ASSERT_EQ(steps.size(), 1u);
  EXPECT_EQ(steps[0].number, 1u);
  EXPECT_THAT(steps[0].token_ids, ElementsAre(100, 101, 102));
  EXPECT_TRUE(steps[0].rows[0].open);
  EXPECT_TRUE(steps[0].rows[0].sample);
  ASSERT_TRUE(Answer(scheduler, steps[0], 9).ok());
  steps = TakeSteps(scheduler);
  ASSERT_EQ(steps.size(), 1u);
  EXPECT_THAT(steps[0].token_ids, ElementsAre(9));
  EXPECT_EQ(steps[0].rows[0].start_position, 3);
  EXPECT_FALSE(steps[0].rows[0].open);
  ASSERT_TRUE(Answer(scheduler, steps[0], 8).ok());
  const std::vector<SchedulerEvent> events = scheduler.TakeEvents();
  ASSERT_EQ(events.size(), 4u);
  EXPECT_EQ(events[1].index, 1u);
  EXPECT_EQ(events[2].kind, SchedulerEvent::Kind::kChoiceEnd);
  EXPECT_EQ(events[3].kind, SchedulerEvent::Kind::kEnd);
  for (int i : {2, 3}) {
    EXPECT_TRUE(events[i].status.ok());
    EXPECT_EQ(events[i].finish, Finish::kLength);
  }
  EXPECT_FALSE(scheduler.Next());
}

TEST(SchedulerTest, StopsAtAStopToken) {
  Scheduler scheduler(Options(1, 2));
  SchedulerRequest request = MakeRequest(1, 3, 50);
  request.stop_token_ids = {2, 9};
  ASSERT_TRUE(scheduler.Add(request).ok());
  ASSERT_TRUE(Answer(scheduler, *scheduler.Next(), 9).ok());
  const std::vector<SchedulerEvent> events = scheduler.TakeEvents();
  ASSERT_EQ(events.size(), 3u);
  EXPECT_EQ(events[0].kind, SchedulerEvent::Kind::kToken);
  EXPECT_EQ(events[2].finish, Finish::kStop);
}

TEST(SchedulerTest, StopsAtTheEndOfTheContext) {
  SchedulerOptions options = Options(1, 1);
  options.max_context = 4;
  Scheduler scheduler(options);
  ASSERT_TRUE(scheduler.Add(MakeRequest(1, 3, 50)).ok());
  ASSERT_TRUE(Answer(scheduler, *scheduler.Next()).ok());
  EXPECT_EQ(scheduler.TakeEvents().back().finish, Finish::kLength);
}

TEST(SchedulerTest, PutsChunksOfOnePromptInFlightBehindEachOther) {
  SchedulerOptions options = Options(4, 2);
  options.max_step_tokens = 64;
  Scheduler scheduler(options);
  ASSERT_TRUE(scheduler.Add(MakeRequest(1, 1000, 1)).ok());
  const std::vector<Step> steps = TakeSteps(scheduler);
  ASSERT_EQ(steps.size(), 5u);  // stages + 1
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(steps[i].rows[0].start_position, 64 * i);
    EXPECT_EQ(steps[i].rows[0].row_count, 64);
    EXPECT_EQ(steps[i].rows[0].open, i == 0);
    EXPECT_FALSE(steps[i].rows[0].sample);
  }
}

TEST(SchedulerTest, CutsAPromptSmallerForMoreStages) {
  Scheduler one(Options(1, 1));
  ASSERT_TRUE(one.Add(MakeRequest(1, 256, 1)).ok());
  EXPECT_EQ(one.Next()->token_ids.size(), 256u);
  Scheduler four(Options(4, 1));
  ASSERT_TRUE(four.Add(MakeRequest(1, 256, 1)).ok());
  EXPECT_EQ(four.Next()->token_ids.size(), 32u);
  Scheduler two(Options(2, 1));
  ASSERT_TRUE(two.Add(MakeRequest(1, 900, 1)).ok());
  EXPECT_EQ(two.Next()->token_ids.size(), 128u);
  Scheduler many(Options(32, 1));
  ASSERT_TRUE(many.Add(MakeRequest(1, 256, 1)).ok());
  EXPECT_EQ(many.Next()->token_ids.size(), 32u);
}

TEST(SchedulerTest, SpreadsDecodingSequencesOverTheStages) {
  Scheduler scheduler(Options(4, 8));
  StartDecoding(scheduler, 8);
  const std::vector<Step> steps = TakeSteps(scheduler);
  ASSERT_EQ(steps.size(), 4u);
  for (const Step& step : steps) EXPECT_EQ(step.decode_rows, 2);
  // Whatever comes back goes out again at once.
  ASSERT_TRUE(Answer(scheduler, steps[0]).ok());
  const std::vector<Step> next = TakeSteps(scheduler);
  ASSERT_EQ(next.size(), 1u);
  EXPECT_EQ(next[0].decode_rows, 2);
}

TEST(SchedulerTest, SharesOutAnewWhenSequencesEnd) {
  Scheduler scheduler(Options(4, 8));
  StartDecoding(scheduler, 8);
  for (int id = 1; id <= 4; ++id) scheduler.Cancel(id);
  const std::vector<Step> steps = TakeSteps(scheduler);
  ASSERT_EQ(steps.size(), 4u);
  for (const Step& step : steps) EXPECT_EQ(step.decode_rows, 1);
}

TEST(SchedulerTest, KeepsAllRowsTogetherOnOneStage) {
  Scheduler scheduler(Options(1, 8));
  StartDecoding(scheduler, 8);
  const std::vector<Step> steps = TakeSteps(scheduler);
  ASSERT_EQ(steps.size(), 2u);  // the second goes ahead
  for (const Step& step : steps) EXPECT_EQ(step.decode_rows, 8);
}

TEST(SchedulerTest, SendsEachOfFewSequencesAtOnce) {
  Scheduler scheduler(Options(4, 8));
  StartDecoding(scheduler, 2);
  const std::vector<Step> steps = TakeSteps(scheduler);
  ASSERT_EQ(steps.size(), 2u);
  EXPECT_EQ(steps[0].rows.size(), 1u);
  EXPECT_EQ(steps[1].rows.size(), 1u);
}

TEST(SchedulerTest, PutsDecodeRowsBeforePromptRows) {
  Scheduler scheduler(Options(1, 4));
  StartDecoding(scheduler, 2);
  ASSERT_TRUE(scheduler.Add(MakeRequest(9, 300, 5)).ok());
  const std::optional<Step> step = scheduler.Next();
  ASSERT_TRUE(step);
  ASSERT_EQ(step->rows.size(), 3u);
  EXPECT_EQ(step->decode_rows, 2);
  EXPECT_EQ(step->rows[2].row_count, 254);
}

TEST(SchedulerTest, LetsPromptsInWhenDecodeRowsFillEveryStep) {
  for (int rows : {1, 2, 4}) {
    SchedulerOptions options = Options(1, 8);
    options.max_step_tokens = rows;
    Scheduler scheduler(options);
    std::vector<int> sent(9);
    for (int id = 1; id <= 8; ++id) ASSERT_TRUE(scheduler.Add(MakeRequest(id, 2, 1000)).ok());
    for (int i = 0; i < 200; ++i) {
      const std::optional<Step> step = scheduler.Next();
      ASSERT_TRUE(step);
      EXPECT_LE(step->token_ids.size(), static_cast<size_t>(rows));
      for (const StepRows& r : step->rows) sent[r.id] += r.row_count;
      ASSERT_TRUE(Answer(scheduler, *step).ok());
    }
    for (int id = 1; id <= 8; ++id) EXPECT_GE(sent[id], 10) << rows << " rows, request " << id;
  }
}

TEST(SchedulerTest, SendsAllDecodingSequencesInOneStepWhileStreaming) {
  Scheduler scheduler(Options(4, 8));
  scheduler.SetStreaming(true);
  StartDecoding(scheduler, 4);
  std::vector<Step> steps = TakeSteps(scheduler);
  ASSERT_EQ(steps.size(), 1u);
  EXPECT_EQ(steps[0].decode_rows, 4);
  scheduler.SetStreaming(false);
  ASSERT_TRUE(Answer(scheduler, steps[0]).ok());
  EXPECT_EQ(TakeSteps(scheduler).size(), 4u);  // spread again
}

TEST(SchedulerTest, CutsPromptsOnlyAtTheStepsBoundWhileStreaming) {
  Scheduler scheduler(Options(4, 2));
  scheduler.SetStreaming(true);
  ASSERT_TRUE(scheduler.Add(MakeRequest(1, 300, 1)).ok());
  const std::vector<Step> steps = TakeSteps(scheduler);
  ASSERT_EQ(steps.size(), 2u);
  EXPECT_EQ(steps[0].token_ids.size(), 256u);
  EXPECT_EQ(steps[1].token_ids.size(), 44u);
}

TEST(SchedulerTest, LetsSmallPromptsWaitForTheDecodingStepWhileStreaming) {
  Scheduler scheduler(Options(2, 8));
  scheduler.SetStreaming(true);
  StartDecoding(scheduler, 2);
  const std::vector<Step> decoding = TakeSteps(scheduler);
  ASSERT_EQ(decoding.size(), 1u);
  ASSERT_TRUE(scheduler.Add(MakeRequest(9, 100, 5)).ok());
  EXPECT_FALSE(scheduler.Next());
  ASSERT_TRUE(scheduler.Add(MakeRequest(10, 200, 5)).ok());  // enough for a step of their own
  const std::optional<Step> full = scheduler.Next();
  ASSERT_TRUE(full);
  EXPECT_EQ(full->token_ids.size(), 256u);
  EXPECT_FALSE(scheduler.Next());
  ASSERT_TRUE(Answer(scheduler, decoding[0]).ok());
  const std::optional<Step> mixed = scheduler.Next();
  ASSERT_TRUE(mixed);
  EXPECT_EQ(mixed->decode_rows, 2);
  EXPECT_EQ(mixed->token_ids.size(), 2u + 44u);
}

TEST(SchedulerTest, ClosesASlotInTheStepThatReusesIt) {
  Scheduler scheduler(Options(2, 1));
  ASSERT_TRUE(scheduler.Add(MakeRequest(1, 2, 10)).ok());
  ASSERT_TRUE(scheduler.Add(MakeRequest(2, 2, 10)).ok());
  const std::optional<Step> first = scheduler.Next();
  ASSERT_TRUE(first);
  EXPECT_THAT(first->close, IsEmpty());
  EXPECT_FALSE(scheduler.Next());
  scheduler.Cancel(1);  // with a step in flight
  const std::optional<Step> second = scheduler.Next();
  ASSERT_TRUE(second);
  EXPECT_THAT(second->close, ElementsAre(0));
  EXPECT_TRUE(second->rows[0].open);
  EXPECT_EQ(second->rows[0].id, 2u);
  EXPECT_THAT(EndCodes(scheduler), ElementsAre(absl::StatusCode::kCancelled));
  ASSERT_TRUE(Answer(scheduler, *first).ok());  // ignored
  EXPECT_THAT(scheduler.TakeEvents(), IsEmpty());
}

TEST(SchedulerTest, DoesNotCloseASlotThatTheStagesNeverSaw) {
  Scheduler scheduler(Options(1, 1));
  ASSERT_TRUE(scheduler.Add(MakeRequest(1, 2, 10)).ok());
  scheduler.Cancel(1);
  ASSERT_TRUE(scheduler.Add(MakeRequest(2, 2, 10)).ok());
  EXPECT_THAT(scheduler.Next()->close, IsEmpty());
}

TEST(SchedulerTest, EndsOnCancelInEveryState) {
  Scheduler scheduler(Options(1, 1));
  ASSERT_TRUE(scheduler.Add(MakeRequest(1, 300, 10)).ok());
  ASSERT_TRUE(scheduler.Add(MakeRequest(2, 2, 10)).ok());
  const std::optional<Step> chunk = scheduler.Next();
  scheduler.Cancel(2);  // waiting
  scheduler.Cancel(1);  // in the middle of its prompt
  scheduler.Cancel(1);
  scheduler.Cancel(77);
  EXPECT_THAT(EndCodes(scheduler),
              ElementsAre(absl::StatusCode::kCancelled, absl::StatusCode::kCancelled));
  EXPECT_EQ(scheduler.running(), 0);
  EXPECT_EQ(scheduler.waiting(), 0);
  ASSERT_TRUE(Answer(scheduler, *chunk).ok());
  EXPECT_FALSE(scheduler.Next());
}

TEST(SchedulerTest, FinishesEarlyAsIfStopped) {
  Scheduler scheduler(Options(1, 1));
  StartDecoding(scheduler, 1);
  scheduler.TakeEvents();
  scheduler.FinishEarly(1);
  const std::vector<SchedulerEvent> events = scheduler.TakeEvents();
  ASSERT_EQ(events.size(), 2u);
  for (const SchedulerEvent& event : events) {
    EXPECT_TRUE(event.status.ok());
    EXPECT_EQ(event.finish, Finish::kStop);
  }
  EXPECT_FALSE(scheduler.Next());
}

TEST(SchedulerTest, EnforcesDeadlines) {
  Scheduler scheduler(Options(1, 1));
  SchedulerRequest request = MakeRequest(1, 2, 10);
  request.deadline = absl::Seconds(5);
  ASSERT_TRUE(scheduler.Add(request).ok());
  request.id = 2;
  request.deadline = absl::Seconds(3);
  ASSERT_TRUE(scheduler.Add(request).ok());
  ASSERT_TRUE(scheduler.Next());
  EXPECT_EQ(scheduler.NextDeadline(), absl::Seconds(3));
  scheduler.Tick(absl::Seconds(2));
  EXPECT_THAT(EndCodes(scheduler), IsEmpty());
  scheduler.Tick(absl::Seconds(4));
  EXPECT_THAT(EndCodes(scheduler), ElementsAre(absl::StatusCode::kDeadlineExceeded));
  scheduler.Tick(absl::Seconds(5));
  EXPECT_THAT(EndCodes(scheduler), ElementsAre(absl::StatusCode::kDeadlineExceeded));
  EXPECT_EQ(scheduler.NextDeadline(), absl::InfiniteDuration());
}

TEST(SchedulerTest, EndsOnlyTheSequenceThatFailed) {
  Scheduler scheduler(Options(1, 2));
  ASSERT_TRUE(scheduler.Add(MakeRequest(1, 2, 10)).ok());
  ASSERT_TRUE(scheduler.Add(MakeRequest(2, 2, 10)).ok());
  const std::optional<Step> step = scheduler.Next();
  const RowsResult results[] = {{absl::DataLossError("NaN")}, {absl::OkStatus(), 5}};
  ASSERT_TRUE(scheduler.OnResult(step->number, results).ok());
  EXPECT_THAT(EndCodes(scheduler), ElementsAre(absl::StatusCode::kDataLoss));
  const std::optional<Step> next = scheduler.Next();
  ASSERT_TRUE(next);
  EXPECT_THAT(next->close, ElementsAre(step->rows[0].slot));
  EXPECT_THAT(next->token_ids, ElementsAre(5));
}

TEST(SchedulerTest, BoundsTheQueue) {
  Scheduler scheduler(Options(1, 2));  // 2 slots, 4 waiting
  for (int id = 1; id <= 6; ++id) EXPECT_TRUE(scheduler.Add(MakeRequest(id, 2, 10)).ok());
  EXPECT_EQ(scheduler.Add(MakeRequest(7, 2, 10)).code(), absl::StatusCode::kResourceExhausted);
  ASSERT_TRUE(scheduler.Next());
  EXPECT_EQ(scheduler.running(), 2);
  EXPECT_EQ(scheduler.waiting(), 4);
  EXPECT_EQ(scheduler.Add(MakeRequest(7, 2, 10)).code(), absl::StatusCode::kResourceExhausted);
  scheduler.Cancel(3);
  EXPECT_TRUE(scheduler.Add(MakeRequest(7, 2, 10)).ok());
}

TEST(SchedulerTest, RefusesWhatCannotRun) {
  Scheduler scheduler(Options(1, 2));
  EXPECT_EQ(scheduler.Add(MakeRequest(1, 0, 10)).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(scheduler.Add(MakeRequest(1, 1025, 1)).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(scheduler.Add(MakeRequest(1, 5, 0)).code(), absl::StatusCode::kInvalidArgument);
  ASSERT_TRUE(scheduler.Add(MakeRequest(1, 5, 1)).ok());
  EXPECT_EQ(scheduler.Add(MakeRequest(1, 5, 1)).code(), absl::StatusCode::kAlreadyExists);
}

TEST(SchedulerTest, ScoresInBoundedChunks) {
  Scheduler scheduler(Options(1, 2));
  SchedulerRequest request = MakeRequest(1, 70, 0);
  request.score = request.logits = true;
  ASSERT_TRUE(scheduler.Add(request).ok());
  std::vector<uint32_t> firsts;
  std::vector<int32_t> targets;
  while (const std::optional<Step> step = scheduler.Next()) {
    EXPECT_LE(step->rows[0].row_count, kMaxScoredRows);
    EXPECT_FALSE(step->rows[0].sample);
    EXPECT_TRUE(step->rows[0].logits);
    targets.insert(targets.end(), step->rows[0].targets.begin(), step->rows[0].targets.end());
    ASSERT_TRUE(Answer(scheduler, *step).ok());
  }
  EXPECT_EQ(targets, std::vector<int32_t>(request.prompt.begin() + 1, request.prompt.end()));
  const std::vector<SchedulerEvent> events = scheduler.TakeEvents();
  ASSERT_EQ(events.size(), 5u);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(events[i].index, 32u * i);
  EXPECT_EQ(events[4].kind, SchedulerEvent::Kind::kEnd);
  EXPECT_TRUE(events[4].status.ok());
}

TEST(SchedulerTest, ChecksResults) {
  Scheduler scheduler(Options(2, 2));
  ASSERT_TRUE(scheduler.Add(MakeRequest(1, 400, 10)).ok());
  const std::vector<Step> steps = TakeSteps(scheduler);
  ASSERT_GE(steps.size(), 2u);
  EXPECT_EQ(scheduler.OnResult(99, {}).code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(Answer(scheduler, steps[1]).code(), absl::StatusCode::kOutOfRange);
  EXPECT_EQ(scheduler.OnResult(1, {}).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(Answer(scheduler, steps[0]).ok());
  EXPECT_EQ(Answer(scheduler, steps[0]).code(), absl::StatusCode::kNotFound);
}

TEST(SchedulerTest, ResetEndsEverythingAndStartsOver) {
  Scheduler scheduler(Options(2, 2));
  for (int id = 1; id <= 4; ++id) ASSERT_TRUE(scheduler.Add(MakeRequest(id, 2, 10)).ok());
  ASSERT_TRUE(scheduler.Next());
  scheduler.Reset(absl::UnavailableError("a worker was lost"));
  EXPECT_EQ(EndCodes(scheduler), std::vector<absl::StatusCode>(4, absl::StatusCode::kUnavailable));
  EXPECT_EQ(scheduler.in_flight(), 0);
  ASSERT_TRUE(scheduler.Add(MakeRequest(9, 2, 10)).ok());
  const std::optional<Step> step = scheduler.Next();
  ASSERT_TRUE(step);
  EXPECT_EQ(step->number, 1u);
  EXPECT_THAT(step->close, IsEmpty());
}

}  // namespace
}  // namespace stagecoach
