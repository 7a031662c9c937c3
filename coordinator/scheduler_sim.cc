#include "coordinator/scheduler_sim.h"

#include <algorithm>
#include <deque>
#include <map>
#include <optional>
#include <random>
#include <utility>
#include <vector>

#include "coordinator/scheduler_sim_stages.h"
#include "fmt/format.h"

namespace stagecoach {
namespace {

constexpr int kVocab = 50;
constexpr int kMaxDrainSteps = 200000;
// Rows of the latest steps that count as far more than those of another client: with them fading
// over ClientShares::kMemory steps, still more than it allows.
constexpr size_t kRecentSteps = 32;
constexpr int kFarMore = 8;

// What the imagined model says after `tokens`: any mistake in tokens or order shows.
int32_t NextToken(const std::vector<int32_t>& tokens, int choice) {
  uint64_t hash = 1469598103934665603u + choice;
  for (int32_t token : tokens) hash = (hash ^ static_cast<uint64_t>(token)) * 1099511628211u;
  return static_cast<int32_t>((hash >> 32) % kVocab);
}

struct Choice {
  std::vector<int32_t> tokens;  // prompt, then what was generated
  bool ended = false;
  bool opened = false;
  bool decoding = false;  // since it was opened, a token was sampled
  int overtaken = 0;      // by younger sequences that were opened while it waited
  int passed_over = 0;    // by steps, while it could decode
};

struct Expected {
  SchedulerRequest request;
  std::vector<Choice> choices;
  size_t scored = 0;
  bool ended = false;
};

class Simulation {
 public:
  Simulation(uint64_t seed, const SchedulerFactory& make)
      : random_(seed),
        scheduler_(make(RandomOptions())),
        stages_(scheduler_->options().max_slots, scheduler_->options().kv_blocks) {}

  SimReport Run() {
    greedy_ = Pick(0, 3) == 0;
    const int events = Pick(0, 31) == 0 ? 1000 : 120;
    for (int i = 0; i < events && ok(); ++i) {
      RandomEvent();
      Drive();
    }
    for (int steps = 0; ok() && scheduler_->running() + scheduler_->waiting() > 0; ++steps) {
      Check(steps < kMaxDrainSteps, "no end");
      Check(!flying_.empty(), "requests are live but nothing is in flight");
      if (!ok()) break;
      ReturnOldest();
      draining_ = true;
      Drive();
    }
    if (ok()) CheckEnd();
    report_.cached_tokens = scheduler_->stats().cached_tokens;
    report_.preemptions = scheduler_->stats().preemptions;
    report_.forks += stages_.copies();
    return report_;
  }

 private:
  struct Flying {
    Step step;
    std::vector<RowsResult> results;
  };

  bool ok() const { return report_.failure.empty(); }
  void Check(bool holds, const char* what) {
    if (!holds && ok()) report_.failure = what;
  }
  int Pick(int low, int high) {
    return low + static_cast<int>(random_() % static_cast<uint64_t>(high - low + 1));
  }

  SchedulerOptions RandomOptions() {
    const int stages[] = {1, 2, 3, 4, 8, 32};
    SchedulerOptions options;
    options.stages = stages[Pick(0, 5)];
    options.max_slots = Pick(1, 12);
    options.max_context = Pick(40, 300);
    const int least = KvBlocksFor(options.max_context);
    options.kv_blocks = least + (Pick(0, 2) == 0 ? 0 : Pick(0, 3 * least));
    options.max_step_tokens = Pick(0, 4) == 0 ? Pick(1, 4) : Pick(8, 128);
    options.max_waiting = Pick(0, 10);
    if (Pick(0, 3) == 0) options.max_in_flight = Pick(1, 2 * options.stages + 1);
    options.hash_seed = random_();
    return options;
  }

  void RandomEvent() {
    const int kind = Pick(0, 999);
    if (kind < 250) {
      AddRequest();
    } else if (kind < 800) {
      ReturnOldest();
    } else if (kind < 850) {
      scheduler_->Cancel(RandomId());
    } else if (kind < 890) {
      scheduler_->FinishEarly(RandomId(), Pick(0, 2));
    } else if (kind < 895) {
      streaming_ = Pick(0, 1);
      scheduler_->SetStreaming(streaming_);
    } else if (kind < 997) {
      now_ += absl::Seconds(1);
      scheduler_->Tick(now_);
      Check(scheduler_->NextDeadline() > now_, "a deadline has passed");
    } else {
      LoseWorker();
    }
  }

  void LoseWorker() {
    scheduler_->Reset(absl::UnavailableError("reset"));
    flying_.clear();
    last_step_ = 0;
    recent_rows_.clear();
    report_.forks += stages_.copies();
    stages_ = SimStages(scheduler_->options().max_slots, scheduler_->options().kv_blocks);
    Check(scheduler_->running() + scheduler_->waiting() == 0, "live after a reset");
  }

  RequestId RandomId() {  // ended ones too
    return static_cast<RequestId>(Pick(1, static_cast<int>(expected_.size()) + 1));
  }

  void AddRequest() {
    const SchedulerOptions& options = scheduler_->options();
    SchedulerRequest request{.id = expected_.size() + 1};
    request.max_tokens = Pick(0, 3) == 0 ? Pick(1, 150) : Pick(1, 30);
    const int longest = std::max(1, options.max_context - Pick(1, 30));
    request.prompt.resize(Pick(1, Pick(0, 2) == 0 ? 10 : longest));
    // Few different prompts, so that they share their beginnings.
    const int kind = Pick(0, 3);
    for (size_t i = 0; i < request.prompt.size(); ++i) {
      request.prompt[i] = static_cast<int32_t>((i * 7 + kind * i / 40) % kVocab);
    }
    if (Pick(0, 3) == 0) request.prompt.back() = Pick(0, kVocab - 1);
    if (Pick(0, 1)) request.stop_token_ids = {Pick(0, kVocab - 1), Pick(0, kVocab - 1)};
    if (Pick(0, 4) == 0) request.deadline = now_ + absl::Seconds(Pick(1, 40));
    request.score = Pick(0, 5) == 0;
    request.logits = Pick(0, 1);
    if (!request.score && Pick(0, 4) == 0) request.choices = Pick(2, 4);
    if (!greedy_ && Pick(0, 3) == 0) request.priority = Pick(-2, 2);
    request.client = std::string(1, static_cast<char>('a' + Pick(0, 3)));
    if (greedy_ && Pick(0, 7) > 0) request.client = "a";
    if (Pick(0, 7) == 0) request.cache_salt = "salt";
    const bool room = scheduler_->running() + scheduler_->waiting() + request.choices <=
                      options.max_slots + options.max_waiting;
    const absl::Status status = scheduler_->Add(request);
    Check(status.ok() == room, "accepts too much or too little");
    Expected& expected = expected_.emplace_back();
    expected.ended = !status.ok();
    expected.choices.resize(request.choices);
    for (Choice& choice : expected.choices) choice.tokens = request.prompt;
    expected.request = std::move(request);
  }

  // Takes all steps that are on offer, checks them and what is left behind; then the events.
  void Drive() {
    HandleEvents(nullptr);
    while (std::optional<Step> step = ok() ? scheduler_->Next() : std::nullopt) {
      Enter(*std::move(step));
    }
    const SchedulerOptions& options = scheduler_->options();
    const int live = scheduler_->running() + scheduler_->waiting();
    Check(scheduler_->in_flight() == static_cast<int>(flying_.size()), "steps in flight");
    Check(scheduler_->in_flight() <= options.max_in_flight, "too many steps in flight");
    Check(scheduler_->running() <= options.max_slots, "too many sequences run");
    Check(live <= options.max_slots + options.max_waiting, "too many sequences");
    Check(scheduler_->in_flight() > 0 || live == 0, "live requests and an empty pipeline");
    if (const absl::Status blocks = scheduler_->CheckBlocks(); ok() && !blocks.ok()) {
      report_.failure = std::string(blocks.message());
    }
  }

  void Enter(Step step) {
    ++report_.steps;
    Check(step.number == ++last_step_, "step numbers");
    Check(!step.rows.empty(), "a step without rows");
    Check(step.token_ids.size() <= static_cast<size_t>(scheduler_->options().max_step_tokens),
          "more rows than fit a step");
    const auto salt = [&](RequestId id) { return expected_.at(id - 1).request.cache_salt; };
    const auto fails = [&] { return !draining_ && Pick(0, 300) == 0; };
    if (std::string wrong = stages_.Run(step, salt, fails); ok() && !wrong.empty()) {
      report_.failure = fmt::format("step {}: {}", step.number, wrong);
    }
    if (!ok()) return;
    Flying flying;
    int scored = 0;
    for (const StepRows& rows : step.rows) {
      if (rows.score) scored += rows.row_count;
      if (rows.open) OnOpened(rows);
      if (rows.sample) expected_.at(rows.id - 1).choices.at(rows.choice).decoding = true;
      flying.results.push_back(AnswerTo(rows));
      if (rows.sample) stages_.SetSampled(rows.slot, flying.results.back().token_id);
    }
    Check(scored <= kMaxScoredRows, "too many scored rows");
    CheckShares(step);
    CheckProgress(step);
    flying.step = std::move(step);
    flying_.push_back(std::move(flying));
  }

  RowsResult AnswerTo(const StepRows& rows) {
    const SimStages::Slot& slot = *stages_.slots().at(rows.slot);
    const Expected& expected = expected_.at(rows.id - 1);
    const std::vector<int32_t>& tokens = expected.choices.at(rows.choice).tokens;
    const std::vector<int32_t>& kv = slot.tokens;
    Check(!expected.ended && !expected.choices[rows.choice].ended, "rows of what has ended");
    // The token of a row ahead is compared once it has come back, with the rows after.
    const size_t known = kv.size() - (rows.ahead ? 1 : 0);
    Check(known <= tokens.size() && std::equal(kv.begin(), kv.begin() + known, tokens.begin()),
          "tokens that are not the sequence's");
    Check(rows.sample == (!expected.request.score && known == tokens.size()), "sampling");
    if (rows.ahead) CheckAhead(rows, expected);
    Check(rows.score == expected.request.score, "scoring");
    if (rows.score) {
      const size_t targets = rows.row_count - (kv.size() == tokens.size() ? 1 : 0);
      Check(rows.targets.size() == targets && std::equal(rows.targets.begin(), rows.targets.end(),
                                                         tokens.begin() + rows.start_position + 1),
            "targets");
    }
    if (slot.failing) return {.status = absl::DataLossError("not finite")};
    return {.token_id = rows.sample ? NextToken(kv, rows.choice) : 0};
  }

  void CheckAhead(const StepRows& rows, const Expected& expected) {
    ++report_.rows_ahead;
    const SchedulerRequest& request = expected.request;
    const SchedulerOptions& options = scheduler_->options();
    Check(options.stages == 1 && !streaming_, "a row ahead where there is no gain");
    const int tokens = rows.start_position;  // and one in flight
    const int generated = tokens - static_cast<int>(request.prompt.size());
    Check(generated + 1 < request.max_tokens && tokens + 1 < options.max_context,
          "a row ahead of the end");
    if (rows.choice > 0 || generated > 0) return;
    const auto ended = [](const Choice& choice) { return choice.ended; };
    Check(std::all_of(expected.choices.begin() + 1, expected.choices.end(), ended),
          "a row ahead of a fork");
  }

  // Whoever waits may be overtaken by a bounded number of younger sequences.
  void OnOpened(const StepRows& rows) {
    Choice& opened = expected_.at(rows.id - 1).choices.at(rows.choice);
    opened.opened = true;
    opened.decoding = false;
    opened.passed_over = 0;
    const SchedulerOptions& options = scheduler_->options();
    const int places = options.max_slots + options.max_waiting;
    for (size_t i = 0; i + 1 < rows.id; ++i) {
      if (expected_[i].ended) continue;
      Choice& waiting = expected_[i].choices.front();  // the others wait for this one
      if (waiting.ended || waiting.opened) continue;
      Check(++waiting.overtaken <= (FairQueue::kAgeTurn + 1) * places, "a request starves");
    }
  }

  // A sequence that could decode is passed over by a bounded number of steps.
  void CheckProgress(const Step& step) {
    const SchedulerOptions& options = scheduler_->options();
    for (const StepRows& rows : step.rows) {
      expected_.at(rows.id - 1).choices[rows.choice].passed_over = 0;
    }
    for (const auto& slot : stages_.slots()) {
      if (!slot) continue;
      Expected& expected = expected_.at(slot->id - 1);
      Choice& choice = expected.choices[slot->choice];
      if (expected.ended || choice.ended || !choice.decoding) continue;
      if (slot->tokens.size() + 1 != choice.tokens.size()) continue;  // not answered yet
      // At most everybody else goes first, with prompts taking every other step, once it may go.
      Check(++choice.passed_over <=
                kMaxHeldSteps + 2 * options.max_slots + 2 * options.max_in_flight + options.stages,
            "a sequence is not decoded");
    }
  }

  // A client that in the last kRecentSteps had far more than any other ever had stands back.
  void CheckShares(const Step& step) {
    std::map<std::string, int> rows;
    bool prompt_of_another = false;
    for (const StepRows& r : step.rows) {
      const SchedulerRequest& request = expected_.at(r.id - 1).request;
      rows[request.client] += r.row_count;
      if (request.client != "a" && r.row_count > 1) prompt_of_another = true;
    }
    int most_of_others = 0, recent = 0;
    for (const auto& [client, total] : total_rows_) {
      if (client != "a") most_of_others = std::max(most_of_others, total);
    }
    for (const int rows_of_a : recent_rows_) recent += rows_of_a;
    if (greedy_ && !streaming_ && scheduler_->options().max_step_tokens >= 2 * kCrowdedRows &&
        OthersLive() && recent > kFarMore * most_of_others) {
      Check(rows["a"] <= (prompt_of_another ? kRationedRows : kCrowdedRows),
            "a greedy client takes more than its share");
      ++report_.shared_steps;
    }
    for (const auto& [client, count] : rows) total_rows_[client] += count;
    recent_rows_.push_back(rows["a"]);
    if (recent_rows_.size() > kRecentSteps) recent_rows_.pop_front();
  }

  bool OthersLive() const {
    return std::any_of(expected_.begin(), expected_.end(), [](const Expected& expected) {
      return !expected.ended && expected.request.client != "a";
    });
  }

  void ReturnOldest() {
    if (flying_.empty()) return;
    const Flying flying = std::move(flying_.front());
    flying_.pop_front();
    Check(scheduler_->OnResult(flying.step.number, flying.results).ok(), "refuses a result");
    HandleEvents(&flying.step);
  }

  void HandleEvents(const Step* returned) {
    for (const SchedulerEvent& event : scheduler_->TakeEvents()) {
      Expected& expected = expected_.at(event.id - 1);
      Check(!expected.ended, "an event after the end");
      if (event.kind == SchedulerEvent::Kind::kEnd) {
        OnEnd(event, expected);
        continue;
      }
      Choice& choice = expected.choices.at(event.choice);
      Check(!choice.ended, "an event after the end of a choice");
      if (event.kind == SchedulerEvent::Kind::kChoiceEnd) {
        choice.ended = true;
        CheckFinish(event, expected, choice);
        continue;
      }
      Check(returned != nullptr, "a result from nowhere");
      if (!ok()) return;
      const StepRows& rows = returned->rows.at(event.rows);
      Check(rows.id == event.id && rows.choice == event.choice, "a result of another sequence");
      if (event.kind == SchedulerEvent::Kind::kScores) {
        Check(event.index == expected.scored, "scores leave a gap");
        expected.scored += rows.row_count;
        continue;
      }
      ++report_.tokens;
      Check(event.index == choice.tokens.size() - expected.request.prompt.size(),
            "token indices leave a gap");
      choice.tokens.push_back(NextToken(choice.tokens, event.choice));
    }
  }

  void CheckFinish(const SchedulerEvent& event, const Expected& expected, const Choice& choice) {
    const size_t generated = choice.tokens.size() - expected.request.prompt.size();
    const size_t most = expected.request.max_tokens;
    Check(generated <= most, "too many tokens");
    if (!event.status.ok() || event.finish != Finish::kLength) return;
    const size_t context = scheduler_->options().max_context;
    Check(generated == most || choice.tokens.size() == context, "ended too early");
  }

  void OnEnd(const SchedulerEvent& event, Expected& expected) {
    expected.ended = true;
    ++(event.status.ok() ? report_.ended_ok : report_.ended_otherwise);
    if (event.status.code() == absl::StatusCode::kDeadlineExceeded) {
      Check(expected.request.deadline <= now_, "ended before its deadline");
    }
    if (!event.status.ok()) return;
    for (const Choice& choice : expected.choices) Check(choice.ended, "ended before its choices");
  }

  void CheckEnd() {
    for (const Expected& expected : expected_) Check(expected.ended, "a request has not ended");
    Check(scheduler_->NextDeadline() == absl::InfiniteDuration(), "a deadline is left");
    const SchedulerStats stats = scheduler_->stats();
    Check(stats.blocks_used == 0, "blocks are in use by nobody");
    Check(stats.blocks_cached + stats.blocks_free == scheduler_->options().kv_blocks,
          "blocks are lost");
  }

  std::mt19937_64 random_;
  SimReport report_;
  std::unique_ptr<Scheduler> scheduler_;
  SimStages stages_;
  absl::Duration now_ = absl::ZeroDuration();
  std::vector<Expected> expected_;  // by id - 1
  std::deque<Flying> flying_;
  uint64_t last_step_ = 0;
  bool draining_ = false;
  bool streaming_ = false;
  // Whether client "a" sends most of the requests, all of one priority.
  bool greedy_ = false;
  std::map<std::string, int> total_rows_;  // by client
  std::deque<int> recent_rows_;            // of "a" in the latest steps
};

}  // namespace

void SimReport::Add(const SimReport& other) {
  ended_ok += other.ended_ok;
  ended_otherwise += other.ended_otherwise;
  steps += other.steps;
  tokens += other.tokens;
  forks += other.forks;
  cached_tokens += other.cached_tokens;
  preemptions += other.preemptions;
  shared_steps += other.shared_steps;
  rows_ahead += other.rows_ahead;
}

SimReport RunSchedulerSim(uint64_t seed, const SchedulerFactory& make) {
  return Simulation(seed, make).Run();
}

}  // namespace stagecoach
