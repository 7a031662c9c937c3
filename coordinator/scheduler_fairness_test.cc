// Virtual time: one client with many streams beside others with one each, in a closed loop.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <queue>
#include <random>
#include <string>
#include <vector>

#include "coordinator/scheduler.h"
#include "gtest/gtest.h"

namespace stagecoach {
namespace {

constexpr int kHeavyStreams = 64;
constexpr double kFixedCost = 1;    // of a step in each stage, in the time that a row takes in all
constexpr double kHopTime = 0.5;    // between two processes
constexpr double kRequestTime = 1;  // from the end of a request to the arrival of the next

struct Load {
  int stages = 1;
  int heavy = kHeavyStreams;
  int light = 4;
  int prompt = 32;
  int tokens = 32;   // of each request
  int spread = 0;    // lengths vary by so much
  double pause = 0;  // at most so long, at random, besides kRequestTime
  double until = 100000;
};

struct Outcome {
  std::vector<double> light_ttft;
  double heavy_tokens = 0;  // per unit of time
  double p99() const {
    std::vector<double> sorted = light_ttft;
    std::sort(sorted.begin(), sorted.end());
    return sorted.at(sorted.size() * 99 / 100);
  }
};

// A chain of stages that take time in proportion to rows, and streams that send their next request
// when the last one has ended.
class ClosedLoop {
 public:
  ClosedLoop(const Load& load, std::unique_ptr<Scheduler> scheduler)
      : load_(load), scheduler_(std::move(scheduler)), stage_free_(load.stages) {
    for (int i = 0; i < load.heavy; ++i) Arrive("heavy", 0);
    for (int i = 0; i < load.light; ++i) Arrive("light" + std::to_string(i), 100.0 + 37 * i);
  }

  Outcome Run() {
    while (!events_.empty() && events_.top().time < load_.until) {
      const Event event = events_.top();
      events_.pop();
      now_ = event.time;
      if (event.step > 0) {
        Return(event.step);
      } else {
        Add(event.client);
      }
      while (std::optional<Step> step = scheduler_->Next()) Send(*step);
    }
    outcome_.heavy_tokens /= load_.until;
    return std::move(outcome_);
  }

 private:
  struct Event {
    double time = 0;
    uint64_t step = 0;  // that comes back; 0: a request of `client`
    std::string client;
    bool operator<(const Event& other) const { return time > other.time; }
  };
  struct Live {
    std::string client;
    double arrival = 0;
  };

  void Arrive(const std::string& client, double time) { events_.push({time, 0, client}); }

  int Vary(int length) {
    if (load_.spread == 0) return length;
    return length - load_.spread + static_cast<int>(random_() % (2 * load_.spread + 1));
  }

  void Add(const std::string& client) {
    SchedulerRequest request{.id = ++last_id_, .client = client};
    request.max_tokens = Vary(load_.tokens);
    request.prompt.resize(Vary(load_.prompt));
    for (int32_t& token : request.prompt) token = static_cast<int32_t>(random_() % 1000);
    live_[request.id] = {client, now_};
    EXPECT_TRUE(scheduler_->Add(std::move(request)).ok());
  }

  void Send(const Step& step) {
    const double cost = (kFixedCost + static_cast<double>(step.token_ids.size())) / load_.stages;
    double time = now_ + kHopTime;
    for (double& free : stage_free_) {
      free = std::max(free, time) + cost;
      time = free + kHopTime;
    }
    events_.push({time, step.number, ""});
  }

  void Return(uint64_t number) {
    std::vector<RowsResult> results(scheduler_->FindInFlight(number)->rows.size());
    EXPECT_TRUE(scheduler_->OnResult(number, results).ok());
    for (const SchedulerEvent& event : scheduler_->TakeEvents()) {
      const Live& live = live_.at(event.id);
      const bool light = live.client != "heavy";
      if (event.kind == SchedulerEvent::Kind::kToken) {
        if (!light) ++outcome_.heavy_tokens;
        if (light && event.index == 0) outcome_.light_ttft.push_back(now_ - live.arrival);
      }
      if (event.kind != SchedulerEvent::Kind::kEnd) continue;
      const double pause = load_.pause * static_cast<double>(random_() % 1000) / 1000;
      Arrive(live.client, now_ + kRequestTime + pause);
      live_.erase(event.id);
    }
  }

  const Load load_;
  std::unique_ptr<Scheduler> scheduler_;
  std::mt19937 random_{1};
  std::vector<double> stage_free_;
  std::priority_queue<Event> events_;
  std::map<RequestId, Live> live_;
  RequestId last_id_ = 0;
  double now_ = 0;
  Outcome outcome_;
};

template <typename S = Scheduler>
Outcome RunLoop(const Load& load) {
  return ClosedLoop(load, std::make_unique<S>(SchedulerOptions{.stages = load.stages,
                                                               .max_slots = 64,
                                                               .max_context = 1024,
                                                               .max_step_tokens = 256,
                                                               .max_waiting = 256}))
      .Run();
}

// What four clients with one stream each wait for beside one with 64: `beside`, in times of what
// one alone waits.
template <typename S = Scheduler>
double Ratio(Load load) {
  const Outcome beside = RunLoop<S>(load);
  load.heavy = 0;
  const Outcome together = RunLoop<S>(load);
  load.light = 1;
  const Outcome alone = RunLoop<S>(load);
  const double ratio = beside.p99() / alone.p99();
  std::printf(
      "%d stages, prompts of %d +- %d, pauses up to %.0f: p99 %.1f alone, %.1f with three like it, "
      "%.1f = %.2fx "
      "beside "
      "a heavy client too, which generates %.3f a row's time\n",
      load.stages, load.prompt, load.spread, load.pause, alone.p99(), together.p99(), beside.p99(),
      ratio, beside.heavy_tokens);
  return ratio;
}

TEST(SchedulerFairnessTest, AGreedyClientAtMostDoublesTheTimeToFirstToken) {
  for (const int stages : {1, 2, 4}) {
    EXPECT_LE(Ratio({.stages = stages, .prompt = 32}), 2);
    EXPECT_LE(Ratio({.stages = stages, .prompt = 16}), 2);
  }
}

TEST(SchedulerFairnessTest, HoldsWhenRequestsAreUnlike) {
  for (const int stages : {1, 2, 4}) {
    EXPECT_LE(Ratio({.stages = stages, .spread = 8, .until = 1000000}), 2.1);  // 2 and chance
  }
}

TEST(SchedulerFairnessTest, HoldsWhenClientsPause) {
  for (const int stages : {1, 2, 4}) {
    EXPECT_LE(Ratio({.stages = stages, .pause = 20, .until = 300000}), 2);
  }
}

// Requests that arrive whenever they like run into each other, with or without a greedy client.
TEST(SchedulerFairnessTest, AGreedyClientAddsLittleToWhatOthersDoToEachOther) {
  for (const int stages : {1, 2, 4}) {
    EXPECT_LE(Ratio({.stages = stages, .pause = 200, .until = 300000}), 2.5);
  }
}

TEST(SchedulerFairnessTest, TheGreedyClientGoesOn) {
  Load load;
  const Outcome beside = RunLoop(load);
  load.light = 0;
  const Outcome alone = RunLoop(load);
  EXPECT_GE(beside.heavy_tokens, 0.5 * alone.heavy_tokens);
}

class IgnoresShares : public Scheduler {
 public:
  using Scheduler::Scheduler;

 protected:
  bool OverShare(const std::string&) const override { return false; }
};

TEST(SchedulerFairnessTest, TheMeasureShowsAnUnfairScheduler) {
  EXPECT_GT(Ratio<IgnoresShares>({}), 2.5);
}

}  // namespace
}  // namespace stagecoach
