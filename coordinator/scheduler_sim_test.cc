// The scheduler under random arrivals, cancellations, failures, deadlines, resets and late results,
// against a model of the stages that checks every step it is given.
#include <algorithm>
#include <deque>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "coordinator/scheduler.h"
#include "gtest/gtest.h"

namespace stagecoach {
namespace {

constexpr int kVocab = 50;

// What the imagined model says after `tokens`: any mistake in tokens, order or slots shows.
int32_t NextToken(const std::vector<int32_t>& tokens) {
  uint64_t hash = 1469598103934665603u;
  for (int32_t token : tokens) hash = (hash ^ static_cast<uint64_t>(token)) * 1099511628211u;
  return static_cast<int32_t>((hash >> 32) % kVocab);
}

struct Expected {
  SchedulerRequest request;
  std::vector<int32_t> generated;
  size_t scored = 0;
  bool ended = false;
  int sent_tokens = 0;
};

class Simulation {
 public:
  explicit Simulation(uint32_t seed) : random_(seed), scheduler_(RandomOptions()) {
    slots_.resize(scheduler_.options().max_slots);
  }

  // Runs `events` random events, then lets everything come to its end.
  void Run(int events) {
    for (int i = 0; i < events && !testing::Test::HasFailure(); ++i) {
      RandomEvent();
      Drive();
    }
    int rounds = 0;
    while (scheduler_.running() + scheduler_.waiting() > 0 && !testing::Test::HasFailure()) {
      ASSERT_LT(++rounds, 100000) << "no end";
      ASSERT_FALSE(flying_.empty()) << "requests are live but nothing is in flight";
      ReturnOldest(/*may_fail=*/false);
      Drive();
    }
    for (const auto& [id, expected] : expected_) EXPECT_TRUE(expected.ended) << id;
    EXPECT_EQ(scheduler_.NextDeadline(), absl::InfiniteDuration());
  }

  int ended_ok() const { return ended_ok_; }
  int ended_otherwise() const { return ended_otherwise_; }

 private:
  struct Flying {
    Step step;
    std::vector<int32_t> samples;  // one per rows
  };

  int Pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }

  SchedulerOptions RandomOptions() {
    const int stages[] = {1, 2, 3, 4, 8, 32};
    SchedulerOptions options;
    options.stages = stages[Pick(0, 5)];
    options.max_slots = Pick(1, 12);
    options.max_context = Pick(40, 400);
    options.max_step_tokens = Pick(0, 4) == 0 ? Pick(1, 4) : Pick(8, 128);
    options.max_waiting = Pick(0, 10);
    if (Pick(0, 3) == 0) options.max_in_flight = Pick(1, 2 * options.stages);
    return options;
  }

  void RandomEvent() {
    const int kind = Pick(0, 99);
    if (kind < 25) {
      AddRequest();
    } else if (kind < 80) {
      ReturnOldest(/*may_fail=*/true);
    } else if (kind < 88 && !expected_.empty()) {
      scheduler_.Cancel(RandomId());
    } else if (kind < 92 && !expected_.empty()) {
      scheduler_.FinishEarly(RandomId());
    } else if (kind < 99) {
      now_ += absl::Seconds(1);
      scheduler_.Tick(now_);
      EXPECT_GT(scheduler_.NextDeadline(), now_);
    } else if (Pick(0, 3) == 0) {
      scheduler_.Reset(absl::UnavailableError("reset"));
      flying_.clear();
      last_step_ = 0;
      std::fill(slots_.begin(), slots_.end(), std::nullopt);
      EXPECT_EQ(scheduler_.running() + scheduler_.waiting(), 0);
    }
  }

  RequestId RandomId() {  // ended ones too
    return static_cast<RequestId>(Pick(1, static_cast<int>(expected_.size()) + 1));
  }

  void AddRequest() {
    const SchedulerOptions& options = scheduler_.options();
    SchedulerRequest request{.id = expected_.size() + 1};
    request.max_tokens = Pick(1, 30);
    request.prompt.resize(Pick(1, Pick(0, 1) ? 10 : options.max_context - request.max_tokens));
    for (int32_t& token : request.prompt) token = Pick(0, kVocab - 1);
    if (Pick(0, 1)) request.stop_token_ids = {Pick(0, kVocab - 1), Pick(0, kVocab - 1)};
    if (Pick(0, 4) == 0) request.deadline = now_ + absl::Seconds(Pick(1, 20));
    request.score = Pick(0, 5) == 0;
    request.logits = Pick(0, 1);
    const bool room =
        scheduler_.running() + scheduler_.waiting() < options.max_slots + options.max_waiting;
    const absl::Status status = scheduler_.Add(request);
    EXPECT_EQ(status.ok(), room) << status;
    if (status.ok()) expected_[request.id].request = request;
  }

  // Takes all steps that are on offer, checks them and what is left behind; then the events.
  void Drive() {
    HandleEvents();
    while (std::optional<Step> step = scheduler_.Next()) Enter(*std::move(step));
    const SchedulerOptions& options = scheduler_.options();
    EXPECT_EQ(scheduler_.in_flight(), static_cast<int>(flying_.size()));
    EXPECT_LE(scheduler_.in_flight(), options.max_in_flight);
    EXPECT_LE(scheduler_.running(), options.max_slots);
    EXPECT_LE(scheduler_.waiting(), options.max_waiting);
    EXPECT_TRUE(scheduler_.waiting() == 0 || scheduler_.running() == options.max_slots);
    // Nothing may wait for an empty pipeline.
    EXPECT_TRUE(scheduler_.in_flight() > 0 || scheduler_.running() + scheduler_.waiting() == 0);
  }

  // Stage 0 checks the step as a stage would, and knows what will be sampled.
  void Enter(Step step) {
    EXPECT_EQ(step.number, ++last_step_);
    EXPECT_FALSE(step.rows.empty());
    EXPECT_LE(step.token_ids.size(), static_cast<size_t>(scheduler_.options().max_step_tokens));
    for (int slot : step.close) {
      EXPECT_TRUE(slots_.at(slot).has_value()) << "closes a slot that is not open";
      slots_.at(slot).reset();
    }
    Flying flying;
    size_t next_row = 0;
    int scored = 0;
    for (const StepRows& rows : step.rows) {
      EXPECT_GE(rows.row_count, 1);
      std::optional<std::pair<RequestId, std::vector<int32_t>>>& slot = slots_.at(rows.slot);
      EXPECT_EQ(slot.has_value(), !rows.open);
      if (rows.open) slot.emplace(rows.id, std::vector<int32_t>());
      EXPECT_EQ(slot->first, rows.id);
      std::vector<int32_t>& kv = slot->second;
      EXPECT_EQ(rows.start_position, static_cast<int>(kv.size()));
      const auto first = step.token_ids.begin() + next_row;
      kv.insert(kv.end(), first, first + rows.row_count);
      next_row += rows.row_count;
      EXPECT_LE(kv.size(), static_cast<size_t>(scheduler_.options().max_context));
      if (rows.score) scored += rows.row_count;
      CheckRows(rows, kv);
      flying.samples.push_back(NextToken(kv));
    }
    EXPECT_EQ(next_row, step.token_ids.size());
    EXPECT_LE(scored, kMaxScoredRows);
    CheckProgress(step);
    flying.step = std::move(step);
    flying_.push_back(std::move(flying));
  }

  void CheckRows(const StepRows& rows, const std::vector<int32_t>& kv) {
    Expected& expected = expected_.at(rows.id);
    EXPECT_FALSE(expected.ended) << "rows of a request that has ended";
    std::vector<int32_t> tokens = expected.request.prompt;
    tokens.insert(tokens.end(), expected.generated.begin(), expected.generated.end());
    ASSERT_LE(kv.size(), tokens.size());
    EXPECT_TRUE(std::equal(kv.begin(), kv.end(), tokens.begin()));
    EXPECT_EQ(rows.sample, !expected.request.score && kv.size() == tokens.size());
    EXPECT_EQ(rows.score, expected.request.score);
    if (rows.score) {
      const size_t targets = rows.row_count - (kv.size() == tokens.size() ? 1 : 0);
      ASSERT_EQ(rows.targets.size(), targets);
      EXPECT_TRUE(std::equal(rows.targets.begin(), rows.targets.end(),
                             tokens.begin() + rows.start_position + 1));
    }
  }

  // A running request that could send rows is passed over by a bounded number of steps.
  void CheckProgress(const Step& step) {
    const SchedulerOptions& options = scheduler_.options();
    for (const StepRows& rows : step.rows) passed_over_.erase(rows.id);
    for (const auto& slot : slots_) {
      if (!slot || expected_.at(slot->first).ended) continue;
      const Expected& expected = expected_.at(slot->first);
      const bool prompt_sent = slot->second.size() >= expected.request.prompt.size();
      const size_t tokens = expected.request.prompt.size() + expected.generated.size();
      if (!prompt_sent || slot->second.size() == tokens) continue;
      // Ready to decode: at most everybody else goes first, with prompts taking every other step.
      EXPECT_LE(++passed_over_[slot->first],
                2 * options.max_slots + 2 * options.max_in_flight + options.stages);
    }
  }

  void ReturnOldest(bool may_fail) {
    if (flying_.empty()) return;
    const Flying flying = std::move(flying_.front());
    flying_.pop_front();
    std::vector<RowsResult> results(flying.step.rows.size());
    for (size_t i = 0; i < results.size(); ++i) {
      if (may_fail && Pick(0, 60) == 0) {
        results[i].status = absl::DataLossError("not finite");
      } else if (flying.step.rows[i].sample) {
        results[i].token_id = flying.samples[i];
      }
    }
    returned_ = &flying.step;
    EXPECT_TRUE(scheduler_.OnResult(flying.step.number, results).ok());
    HandleEvents();
    returned_ = nullptr;
  }

  void HandleEvents() {
    for (const SchedulerEvent& event : scheduler_.TakeEvents()) {
      Expected& expected = expected_.at(event.id);
      EXPECT_FALSE(expected.ended) << "an event after the end";
      if (event.kind == SchedulerEvent::Kind::kEnd) {
        OnEnd(event, expected);
        continue;
      }
      ASSERT_NE(returned_, nullptr);
      const StepRows& rows = returned_->rows.at(event.rows);
      EXPECT_EQ(rows.id, event.id);
      if (event.kind == SchedulerEvent::Kind::kScores) {
        EXPECT_EQ(event.index, expected.scored);
        expected.scored += rows.row_count;
      } else {
        EXPECT_EQ(event.index, expected.generated.size());
        std::vector<int32_t> tokens = expected.request.prompt;
        tokens.insert(tokens.end(), expected.generated.begin(), expected.generated.end());
        expected.generated.push_back(NextToken(tokens));
      }
    }
  }

  void OnEnd(const SchedulerEvent& event, Expected& expected) {
    expected.ended = true;
    passed_over_.erase(event.id);
    ++(event.status.ok() ? ended_ok_ : ended_otherwise_);
    if (event.status.code() == absl::StatusCode::kDeadlineExceeded) {
      EXPECT_LE(expected.request.deadline, now_);
    }
    EXPECT_LE(expected.generated.size(), static_cast<size_t>(expected.request.max_tokens));
    if (event.status.ok() && event.finish == Finish::kLength) {
      EXPECT_EQ(expected.generated.size(), static_cast<size_t>(expected.request.max_tokens));
    }
  }

  std::mt19937 random_;
  Scheduler scheduler_;
  absl::Duration now_ = absl::ZeroDuration();
  std::map<RequestId, Expected> expected_;
  std::deque<Flying> flying_;
  std::vector<std::optional<std::pair<RequestId, std::vector<int32_t>>>> slots_;  // as at stage 0
  std::map<RequestId, int> passed_over_;
  const Step* returned_ = nullptr;
  uint64_t last_step_ = 0;
  int ended_ok_ = 0;
  int ended_otherwise_ = 0;
};

TEST(SchedulerSimTest, KeepsItsPromisesUnderRandomEvents) {
  int64_t ended_ok = 0, ended_otherwise = 0;
  for (uint32_t seed = 1; seed <= 2500; ++seed) {
    Simulation simulation(seed);
    simulation.Run(150);
    if (HasFailure()) FAIL() << "seed " << seed;
    ended_ok += simulation.ended_ok();
    ended_otherwise += simulation.ended_otherwise();
  }
  RecordProperty("ended_ok", std::to_string(ended_ok));
  RecordProperty("ended_otherwise", std::to_string(ended_otherwise));
  EXPECT_GT(ended_ok, 20000);
  EXPECT_GT(ended_otherwise, 10000);
}

// A pipeline in virtual time: each stage takes one tick for a step; how busy are the stages?
double BusyShare(int stages, int sequences) {
  Scheduler scheduler(
      {.stages = stages, .max_slots = sequences, .max_context = 4096, .max_waiting = sequences});
  for (int id = 1; id <= sequences; ++id) {
    SchedulerRequest request{.id = static_cast<RequestId>(id), .max_tokens = 4000};
    request.prompt = {1};
    EXPECT_TRUE(scheduler.Add(request).ok());
  }
  std::deque<Step> queue;  // before stage 0
  std::vector<std::optional<Step>> at_stage(stages);
  int busy = 0, ticks = 0;
  constexpr int kWarmUp = 200, kTicks = 1000;
  for (; ticks < kWarmUp + kTicks; ++ticks) {
    if (at_stage.back()) {
      std::vector<RowsResult> results(at_stage.back()->rows.size());
      EXPECT_TRUE(scheduler.OnResult(at_stage.back()->number, results).ok());
    }
    for (int s = stages - 1; s > 0; --s) at_stage[s] = std::move(at_stage[s - 1]);
    while (std::optional<Step> step = scheduler.Next()) queue.push_back(*std::move(step));
    at_stage[0].reset();
    if (!queue.empty()) {
      at_stage[0] = std::move(queue.front());
      queue.pop_front();
    }
    if (ticks < kWarmUp) continue;
    for (int s = 0; s < stages; ++s) busy += at_stage[s].has_value();
  }
  return static_cast<double>(busy) / kTicks / stages;
}

TEST(SchedulerSimTest, KeepsEveryStageBusyWithEnoughSequences) {
  for (int stages : {1, 2, 4, 8, 32}) {
    EXPECT_GE(BusyShare(stages, stages), 0.95) << stages;
    EXPECT_GE(BusyShare(stages, 4 * stages), 0.95) << stages;
    EXPECT_NEAR(BusyShare(stages, 1), 1.0 / stages, 0.01) << stages;
  }
}

}  // namespace
}  // namespace stagecoach
