// What the scheduler does with KV blocks, priorities and clients.
#include <algorithm>
#include <deque>
#include <map>
#include <numeric>

#include "coordinator/scheduler.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace stagecoach {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::SizeIs;

SchedulerRequest MakeRequest(RequestId id, int prompt, int max_tokens, int first_token = 100) {
  SchedulerRequest request{.id = id, .max_tokens = max_tokens};
  request.prompt.resize(prompt);
  std::iota(request.prompt.begin(), request.prompt.end(), first_token);
  return request;
}

SchedulerOptions Options(int blocks, int slots = 8) {
  return {.stages = 1, .max_slots = slots, .max_context = 32 * blocks, .kv_blocks = blocks};
}

absl::Status Answer(Scheduler& scheduler, const Step& step, int32_t token = 7) {
  std::vector<RowsResult> results(step.rows.size());
  for (RowsResult& result : results) result.token_id = token;
  return scheduler.OnResult(step.number, results);
}

// Runs everything to its end; the tokens that each request was given.
std::map<RequestId, int> Drain(Scheduler& scheduler) {
  std::map<RequestId, int> tokens;
  while (const std::optional<Step> step = scheduler.Next()) {
    EXPECT_TRUE(Answer(scheduler, *step).ok());
    EXPECT_TRUE(scheduler.CheckBlocks().ok()) << scheduler.CheckBlocks();
    for (const SchedulerEvent& event : scheduler.TakeEvents()) {
      if (event.kind == SchedulerEvent::Kind::kToken) ++tokens[event.id];
    }
  }
  return tokens;
}

TEST(SchedulerPagedTest, OpensBehindACachedPrefix) {
  Scheduler scheduler(Options(16));
  ASSERT_TRUE(scheduler.Add(MakeRequest(1, 100, 1)).ok());
  const Step first = *scheduler.Next();
  EXPECT_THAT(first.rows[0].cached_blocks, IsEmpty());
  EXPECT_THAT(first.rows[0].new_blocks, SizeIs(4));
  // Not before the rows have come back: one that shares little of it does not wait.
  SchedulerRequest other = MakeRequest(2, 40, 1);
  other.prompt.resize(100, 7);
  ASSERT_TRUE(scheduler.Add(other).ok());
  EXPECT_EQ(scheduler.Next()->rows[0].start_position, 0);
  ASSERT_TRUE(Answer(scheduler, first).ok());
  ASSERT_TRUE(scheduler.Add(MakeRequest(3, 110, 1)).ok());
  const Step third = *scheduler.Next();
  const StepRows& rows = third.rows[0];
  EXPECT_TRUE(rows.open);
  EXPECT_EQ(rows.start_position, 96);
  EXPECT_EQ(rows.row_count, 14);
  EXPECT_THAT(rows.cached_blocks,
              ElementsAre(first.rows[0].new_blocks[0], first.rows[0].new_blocks[1],
                          first.rows[0].new_blocks[2]));
  EXPECT_EQ(rows.cached_tokens, std::vector<int32_t>(MakeRequest(3, 96, 1).prompt));
  EXPECT_THAT(rows.new_blocks, SizeIs(1));
  EXPECT_EQ(scheduler.stats().cached_tokens, 96u);
}

TEST(SchedulerPagedTest, WaitsForOneThatComputesTheSamePrompt) {
  Scheduler scheduler(Options(64));
  for (int id = 1; id <= 3; ++id) ASSERT_TRUE(scheduler.Add(MakeRequest(id, 300, 5)).ok());
  SchedulerRequest salted = MakeRequest(4, 300, 5);
  salted.cache_salt = "x";
  ASSERT_TRUE(scheduler.Add(salted).ok());
  EXPECT_EQ(scheduler.running(), 2);  // the first and the salted one
  std::map<RequestId, int> computed;
  while (const std::optional<Step> step = scheduler.Next()) {
    for (const StepRows& rows : step->rows) computed[rows.id] += rows.row_count;
    ASSERT_TRUE(Answer(scheduler, *step).ok());
    EXPECT_TRUE(scheduler.CheckBlocks().ok()) << scheduler.CheckBlocks();
  }
  EXPECT_EQ(computed.at(1), 300 + 4);
  EXPECT_EQ(computed.at(2), 300 - 288 + 4);
  EXPECT_EQ(computed.at(3), 300 - 288 + 4);
  EXPECT_EQ(computed.at(4), 300 + 4);
  EXPECT_EQ(scheduler.stats().cached_tokens, 2u * 288);
}

TEST(SchedulerPagedTest, DoesNotWaitForOneThatIsCancelledOrServedLater) {
  Scheduler scheduler(Options(64));
  for (int id = 1; id <= 3; ++id) ASSERT_TRUE(scheduler.Add(MakeRequest(id, 300, 5)).ok());
  SchedulerRequest urgent = MakeRequest(4, 300, 5);
  urgent.priority = 1;
  ASSERT_TRUE(scheduler.Add(urgent).ok());
  EXPECT_EQ(scheduler.running(), 2);  // the first and the urgent one
  scheduler.Cancel(1);
  scheduler.Cancel(4);
  const std::optional<Step> step = scheduler.Next();  // 2 and 3, who have waited once
  ASSERT_TRUE(step);
  EXPECT_EQ(scheduler.running(), 2);
  EXPECT_EQ(scheduler.waiting(), 0);
  ASSERT_TRUE(Answer(scheduler, *step).ok());
  EXPECT_EQ(Drain(scheduler).size(), 2u);
}

TEST(SchedulerPagedTest, LeavesOneTokenToCompute) {
  Scheduler scheduler(Options(16));
  ASSERT_TRUE(scheduler.Add(MakeRequest(1, 64, 1)).ok());
  ASSERT_TRUE(Answer(scheduler, *scheduler.Next()).ok());
  ASSERT_TRUE(scheduler.Add(MakeRequest(2, 64, 1)).ok());
  EXPECT_EQ(scheduler.Next()->rows[0].start_position, 32);
}

TEST(SchedulerPagedTest, KeepsSaltsApartAndScoresEveryRow) {
  Scheduler scheduler(Options(16));
  ASSERT_TRUE(scheduler.Add(MakeRequest(1, 100, 1)).ok());
  ASSERT_TRUE(Answer(scheduler, *scheduler.Next()).ok());
  SchedulerRequest salted = MakeRequest(2, 100, 1);
  salted.cache_salt = "x";
  ASSERT_TRUE(scheduler.Add(salted).ok());
  EXPECT_EQ(scheduler.Next()->rows[0].start_position, 0);
  SchedulerRequest scored = MakeRequest(3, 100, 1);
  scored.score = true;
  ASSERT_TRUE(scheduler.Add(scored).ok());
  EXPECT_EQ(scheduler.Next()->rows[0].start_position, 0);
}

TEST(SchedulerPagedTest, PreemptsTheNewestWhenBlocksRunOutAndReplaysIt) {
  Scheduler scheduler(Options(4));
  ASSERT_TRUE(scheduler.Add(MakeRequest(1, 30, 60, 100)).ok());  // 3 blocks in the end
  ASSERT_TRUE(scheduler.Add(MakeRequest(2, 30, 60, 500)).ok());
  const std::map<RequestId, int> tokens = Drain(scheduler);
  EXPECT_EQ(tokens.at(1), 60);
  EXPECT_EQ(tokens.at(2), 60);
  EXPECT_GE(scheduler.stats().preemptions, 1u);
  EXPECT_EQ(scheduler.stats().blocks_used, 0);
}

TEST(SchedulerPagedTest, PreemptsLowerPrioritiesFirst) {
  Scheduler scheduler(Options(4));
  SchedulerRequest low = MakeRequest(1, 30, 90, 100);
  low.priority = -1;
  ASSERT_TRUE(scheduler.Add(low).ok());
  ASSERT_TRUE(scheduler.Add(MakeRequest(2, 30, 90, 500)).ok());
  std::vector<RequestId> order;
  while (const std::optional<Step> step = scheduler.Next()) {
    ASSERT_TRUE(Answer(scheduler, *step).ok());
    for (const SchedulerEvent& event : scheduler.TakeEvents()) {
      if (event.kind == SchedulerEvent::Kind::kEnd) order.push_back(event.id);
    }
  }
  EXPECT_THAT(order, ElementsAre(2, 1));  // though 1 was first
}

TEST(SchedulerPagedTest, ReplayIsOpenedWithAllTokens) {
  Scheduler scheduler(Options(4));
  ASSERT_TRUE(scheduler.Add(MakeRequest(1, 60, 10, 100)).ok());
  ASSERT_TRUE(scheduler.Add(MakeRequest(2, 30, 60, 500)).ok());
  int generated = 0, attempts = 0;
  while (const std::optional<Step> step = scheduler.Next()) {
    for (const StepRows& rows : step->rows) {
      if (rows.id != 2 || !rows.open || rows.attempt == 0) continue;
      ++attempts;
      EXPECT_EQ(rows.start_position + rows.row_count, 30 + generated);
      EXPECT_TRUE(rows.sample);
    }
    ASSERT_TRUE(Answer(scheduler, *step).ok());
    for (const SchedulerEvent& event : scheduler.TakeEvents()) {
      if (event.kind != SchedulerEvent::Kind::kToken || event.id != 2) continue;
      EXPECT_EQ(event.index, static_cast<uint32_t>(generated++));
    }
  }
  EXPECT_GE(attempts, 1);
  EXPECT_EQ(generated, 60);
}

TEST(SchedulerPagedTest, WaitsForBlocksInOrder) {
  Scheduler scheduler(Options(4));
  ASSERT_TRUE(scheduler.Add(MakeRequest(1, 60, 5, 100)).ok());
  ASSERT_TRUE(scheduler.Add(MakeRequest(2, 90, 5, 300)).ok());  // does not fit beside 1
  ASSERT_TRUE(scheduler.Add(MakeRequest(3, 5, 5, 700)).ok());   // would, but came later
  EXPECT_EQ(scheduler.running(), 1);
  EXPECT_EQ(scheduler.waiting(), 2);
  EXPECT_THAT(Drain(scheduler), SizeIs(3));
}

TEST(SchedulerPagedTest, ZeroesBlocksThatMayHoldWhatIsNotFinite) {
  Scheduler scheduler(Options(8));
  ASSERT_TRUE(scheduler.Add(MakeRequest(1, 40, 9)).ok());
  const Step step = *scheduler.Next();
  const RowsResult failed[] = {{absl::DataLossError("not finite")}};
  ASSERT_TRUE(scheduler.OnResult(step.number, failed).ok());
  ASSERT_TRUE(scheduler.Add(MakeRequest(2, 40, 9)).ok());
  const Step next = *scheduler.Next();
  EXPECT_THAT(next.clear, testing::UnorderedElementsAreArray(step.rows[0].new_blocks));
  EXPECT_EQ(next.rows[0].start_position, 0);
  // Cancelled with rows in flight, which may fail yet; what was answered before is kept.
  ASSERT_TRUE(Answer(scheduler, next).ok());
  const Step decode = *scheduler.Next();
  scheduler.Cancel(2);
  ASSERT_TRUE(scheduler.Add(MakeRequest(3, 40, 9)).ok());
  const Step last = *scheduler.Next();
  EXPECT_THAT(last.clear, ElementsAre(next.rows[0].new_blocks[1]));
  EXPECT_EQ(last.rows[0].start_position, 32);
}

TEST(SchedulerPagedTest, ChoicesShareThePrompt) {
  Scheduler scheduler(Options(16));
  SchedulerRequest request = MakeRequest(1, 70, 3);
  request.choices = 3;
  ASSERT_TRUE(scheduler.Add(request).ok());
  const Step prompt = *scheduler.Next();
  ASSERT_THAT(prompt.rows, SizeIs(1));
  EXPECT_FALSE(scheduler.Next());  // the others wait for it
  ASSERT_TRUE(Answer(scheduler, prompt).ok());
  const std::vector<int>& blocks = prompt.rows[0].new_blocks;
  const Step step = *scheduler.Next();
  ASSERT_THAT(step.rows, SizeIs(3));
  ASSERT_THAT(step.copies, SizeIs(2));
  for (int choice : {1, 2}) {
    const StepRows& rows = step.rows[choice];
    EXPECT_EQ(rows.choice, choice);
    EXPECT_EQ(rows.start_position, 69);
    EXPECT_EQ(rows.row_count, 1);
    EXPECT_TRUE(rows.sample);
    EXPECT_EQ(step.copies[choice - 1].from, blocks[2]);
    EXPECT_THAT(rows.cached_blocks, ElementsAre(blocks[0], blocks[1], step.copies[choice - 1].to));
  }
  EXPECT_EQ(scheduler.stats().blocks_used, 5);
  ASSERT_TRUE(Answer(scheduler, step).ok());
  EXPECT_EQ(Drain(scheduler).at(1), 9);
}

TEST(SchedulerPagedTest, EndsARequestAfterAllItsChoices) {
  Scheduler scheduler(Options(16));
  SchedulerRequest request = MakeRequest(1, 10, 5);
  request.choices = 3;
  ASSERT_TRUE(scheduler.Add(request).ok());
  ASSERT_TRUE(Answer(scheduler, *scheduler.Next()).ok());
  scheduler.FinishEarly(1, 1);
  Step step = *scheduler.Next();
  std::vector<RowsResult> results(step.rows.size());
  ASSERT_THAT(results, SizeIs(2));
  results[1].status = absl::DataLossError("not finite");
  ASSERT_TRUE(scheduler.OnResult(step.number, results).ok());
  while (std::optional<Step> next = scheduler.Next()) ASSERT_TRUE(Answer(scheduler, *next).ok());
  std::vector<int> ended;
  for (const SchedulerEvent& event : scheduler.TakeEvents()) {
    if (event.kind == SchedulerEvent::Kind::kChoiceEnd) ended.push_back(event.choice);
    if (event.kind != SchedulerEvent::Kind::kEnd) continue;
    EXPECT_EQ(event.status.code(), absl::StatusCode::kDataLoss);
    ended.push_back(-1);
  }
  EXPECT_THAT(ended, ElementsAre(1, 2, 0, -1));
}

// The first choice is gone before its prompt is computed: the others compute it.
TEST(SchedulerPagedTest, OtherChoicesDoWithoutTheFirst) {
  Scheduler scheduler(Options(16));
  SchedulerRequest request = MakeRequest(1, 40, 5);
  request.choices = 3;
  ASSERT_TRUE(scheduler.Add(request).ok());
  scheduler.FinishEarly(1, 0);
  EXPECT_EQ(Drain(scheduler).at(1), 10);
}

TEST(SchedulerPagedTest, AClientThatRunsSeveralMakesRoomForOneThatRunsNone) {
  Scheduler scheduler(Options(8));
  for (int id = 1; id <= 3; ++id) {
    SchedulerRequest request = MakeRequest(id, 60, 50, 1000 * id);
    request.client = "greedy";
    ASSERT_TRUE(scheduler.Add(request).ok());
  }
  EXPECT_EQ(scheduler.running(), 3);
  SchedulerRequest other = MakeRequest(9, 60, 50, 9000);
  other.client = "other";
  ASSERT_TRUE(scheduler.Add(other).ok());
  EXPECT_EQ(scheduler.stats().preemptions, 1u);
  const Step step = *scheduler.Next();
  EXPECT_TRUE(std::any_of(step.rows.begin(), step.rows.end(),
                          [](const StepRows& rows) { return rows.id == 9; }));
  const std::map<RequestId, int> before = {{1, 0}};
  ASSERT_TRUE(Answer(scheduler, step).ok());
  Drain(scheduler);
  EXPECT_EQ(scheduler.running() + scheduler.waiting(), 0);
}

// Virtual time: a step takes `kFixed` and one unit a row. Time from the arrival of a request of one
// client to its first token, beside `greedy` requests of another client that came before.
double TimeToFirstToken(int prompt, int greedy, int kv_blocks) {
  constexpr double kFixed = 32;
  Scheduler scheduler({.stages = 1,
                       .max_slots = 64,
                       .max_context = 4096,
                       .kv_blocks = kv_blocks,
                       .max_step_tokens = 256,
                       .max_waiting = 256});
  for (int id = 1; id <= greedy; ++id) {
    SchedulerRequest request = MakeRequest(id, 1000, 500, 10000 * id);
    request.client = "greedy";
    EXPECT_TRUE(scheduler.Add(request).ok());
  }
  double now = 0, arrival = 0;
  std::deque<Step> queue;
  for (int steps = 0; steps < 10000; ++steps) {
    if (steps == 60 || (greedy == 0 && steps == 0)) {
      SchedulerRequest request = MakeRequest(999, prompt, 5, 5);
      request.client = "other";
      EXPECT_TRUE(scheduler.Add(request).ok());
      arrival = now;
    }
    while (std::optional<Step> step = scheduler.Next()) queue.push_back(*std::move(step));
    if (queue.empty()) break;
    now += kFixed + static_cast<double>(queue.front().token_ids.size());
    EXPECT_TRUE(Answer(scheduler, queue.front()).ok());
    queue.pop_front();
    for (const SchedulerEvent& event : scheduler.TakeEvents()) {
      if (event.id == 999 && event.kind == SchedulerEvent::Kind::kToken) return now - arrival;
    }
  }
  ADD_FAILURE() << "no token";
  return 0;
}

TEST(SchedulerPagedTest, AGreedyClientAtMostDoublesTheTimeToFirstToken) {
  constexpr double kStepsInFlight = 2 * (32 + 256);  // were sent before the request came
  for (int prompt : {200, 1000, 3000}) {
    const double alone = TimeToFirstToken(prompt, 0, 1024);
    for (int kv_blocks : {2048, 300, 160}) {  // room for all, for nine, for four greedy requests
      const double beside = TimeToFirstToken(prompt, 100, kv_blocks);
      std::printf("prompt of %d tokens, %d blocks: %.0f alone, %.0f beside a greedy client\n",
                  prompt, kv_blocks, alone, beside);
      EXPECT_LE(beside, 2 * alone + kStepsInFlight) << prompt << " tokens, " << kv_blocks;
    }
  }
}

TEST(SchedulerPagedTest, HigherPrioritiesAreAdmittedFirst) {
  Scheduler scheduler(Options(16, 1));
  for (int id = 1; id <= 4; ++id) {
    SchedulerRequest request = MakeRequest(id, 5, 2, 1000 * id);
    request.priority = id;
    ASSERT_TRUE(scheduler.Add(request).ok());
  }
  std::vector<RequestId> order;
  while (const std::optional<Step> step = scheduler.Next()) {
    if (step->rows[0].open) order.push_back(step->rows[0].id);
    ASSERT_TRUE(Answer(scheduler, *step).ok());
  }
  EXPECT_THAT(order, ElementsAre(1, 4, 3, 2));  // 1 ran already
}

TEST(SchedulerPagedTest, BoundsSequencesNotRequests) {
  SchedulerOptions options = Options(16, 2);
  options.max_waiting = 3;
  Scheduler scheduler(options);
  SchedulerRequest request = MakeRequest(1, 5, 2);
  request.choices = 6;
  EXPECT_EQ(scheduler.Add(request).code(), absl::StatusCode::kResourceExhausted);
  request.choices = 4;
  EXPECT_TRUE(scheduler.Add(request).ok());
  request.id = 2;
  EXPECT_EQ(scheduler.Add(request).code(), absl::StatusCode::kResourceExhausted);
  request.choices = 1;
  EXPECT_TRUE(scheduler.Add(request).ok());
  request.choices = 0;
  request.id = 3;
  EXPECT_EQ(scheduler.Add(request).code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace stagecoach
