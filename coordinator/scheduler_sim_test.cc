// The scheduler's simulator over some thousand seeds (`scheduler_sim --seeds N` runs more), what it
// is worth, and how busy the stages are.
#include "coordinator/scheduler_sim.h"

#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace stagecoach {
namespace {

template <typename S>
SimReport RunSeeds(uint64_t first, uint64_t seeds) {
  SimReport total;
  for (uint64_t seed = first; seed < first + seeds; ++seed) {
    const SimReport report = RunSchedulerSim(
        seed, [](const SchedulerOptions& options) { return std::make_unique<S>(options); });
    total.Add(report);
    if (report.failure.empty()) continue;
    total.failure = "seed " + std::to_string(seed) + ": " + report.failure;
    break;
  }
  return total;
}

TEST(SchedulerSimTest, KeepsItsPromisesUnderRandomEvents) {
  const SimReport total = RunSeeds<Scheduler>(1, 3000);
  EXPECT_EQ(total.failure, "");
  // Everything that is to be tested did happen.
  EXPECT_GT(total.ended_ok, 30000);
  EXPECT_GT(total.ended_otherwise, 10000);
  EXPECT_GT(total.preemptions, 3000u);
  EXPECT_GT(total.cached_tokens, 300000u);
  EXPECT_GT(total.forks, 1000);
  EXPECT_GT(total.shared_steps, 1000);
  EXPECT_GT(total.rows_ahead, 10000);
}

// --- Mistakes planted in the scheduler. Each must be found in less than 1000 seeds.

class LeaksABlock : public Scheduler {
 public:
  using Scheduler::Scheduler;

 protected:
  void ReleaseBlock(int block, bool dirty) override {
    if (++released_ != 50) Scheduler::ReleaseBlock(block, dirty);
  }

 private:
  int released_ = 0;
};

class ForgetsToClear : public Scheduler {
 public:
  using Scheduler::Scheduler;

 protected:
  void ReleaseBlock(int block, bool) override { Scheduler::ReleaseBlock(block, false); }
};

class EndsTwice : public Scheduler {
 public:
  using Scheduler::Scheduler;

 protected:
  void Tell(SchedulerEvent event) override {
    if (event.kind == SchedulerEvent::Kind::kEnd && event.id == 7) Scheduler::Tell(event);
    Scheduler::Tell(std::move(event));
  }
};

class LosesAnEnd : public Scheduler {
 public:
  using Scheduler::Scheduler;

 protected:
  void Tell(SchedulerEvent event) override {
    if (event.kind == SchedulerEvent::Kind::kEnd && event.id == 7) return;
    Scheduler::Tell(std::move(event));
  }
};

// Lets some sequences wait for good.
class StarvesSome : public Scheduler {
 public:
  using Scheduler::Scheduler;

 protected:
  const FairEntry* NextWaiting() const override {
    const FairEntry* front = Scheduler::NextWaiting();
    return front != nullptr && front->order % 5 == 0 ? nullptr : front;
  }
};

// Serves whoever asks most.
class IgnoresShares : public Scheduler {
 public:
  using Scheduler::Scheduler;

 protected:
  bool OverShare(const std::string&) const override { return false; }
};

// Sends a row ahead though the token in flight is the last one.
class RunsPastTheEnd : public Scheduler {
 public:
  using Scheduler::Scheduler;

 protected:
  bool MayGoAhead(const SchedulerRequest&, int tokens, int, bool forks) const override {
    return !forks && tokens + 1 < options().max_context;
  }
};

// Forks blocks that a row ahead, which may come out non-finite, has been written to.
class ForksBehindARowAhead : public Scheduler {
 public:
  using Scheduler::Scheduler;

 protected:
  bool MayGoAhead(const SchedulerRequest& request, int tokens, int generated, bool) const override {
    return Scheduler::MayGoAhead(request, tokens, generated, false);
  }
};

template <typename S>
class PlantedMistakeTest : public testing::Test {};
using Mistakes = testing::Types<LeaksABlock, ForgetsToClear, EndsTwice, LosesAnEnd, StarvesSome,
                                IgnoresShares, RunsPastTheEnd, ForksBehindARowAhead>;
TYPED_TEST_SUITE(PlantedMistakeTest, Mistakes);

TYPED_TEST(PlantedMistakeTest, IsFound) {
  const SimReport report = RunSeeds<TypeParam>(1, 999);
  EXPECT_NE(report.failure, "");
  this->RecordProperty("found", report.failure);
  std::printf("found: %s\n", report.failure.c_str());
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
