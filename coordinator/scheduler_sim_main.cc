// scheduler_sim: runs the scheduler's simulator over many seeds.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#include "coordinator/scheduler_sim.h"

namespace stagecoach {
namespace {

struct Flags {
  uint64_t seeds = 100000;
  uint64_t first = 1;
  int threads = 1;
};

// Every `step`-th seed from `first`, until one fails anywhere.
SimReport RunShare(uint64_t first, uint64_t end, uint64_t step, std::atomic<bool>& failed) {
  SimReport total;
  for (uint64_t seed = first; seed < end && !failed; seed += step) {
    const SimReport report = RunSchedulerSim(
        seed, [](const SchedulerOptions& options) { return std::make_unique<Scheduler>(options); });
    total.Add(report);
    if (report.failure.empty()) continue;
    failed = true;
    total.failure = fmt::format("seed {}: {}", seed, report.failure);
  }
  return total;
}

int Run(const Flags& flags) {
  const auto start = std::chrono::steady_clock::now();
  std::atomic<bool> failed = false;
  std::vector<SimReport> reports(flags.threads);
  std::vector<std::thread> threads;
  for (int i = 0; i < flags.threads; ++i) {
    threads.emplace_back([&, i] {
      reports[i] = RunShare(flags.first + i, flags.first + flags.seeds, flags.threads, failed);
    });
  }
  for (std::thread& thread : threads) thread.join();
  SimReport total;
  for (const SimReport& report : reports) {
    total.Add(report);
    if (!report.failure.empty()) fmt::print("FAILED {}\n", report.failure);
  }
  if (failed) return 1;
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  fmt::print(
      "{} seeds in {:.1f} s, {:.0f} seeds/s: {} requests ended well and {} otherwise, {} steps, "
      "{} tokens, {} rows ahead, {} tokens from the cache, {} preemptions, {} blocks copied, {} "
      "steps shared out\n",
      flags.seeds, seconds, flags.seeds / seconds, total.ended_ok, total.ended_otherwise,
      total.steps, total.tokens, total.rows_ahead, total.cached_tokens, total.preemptions,
      total.forks, total.shared_steps);
  return 0;
}

}  // namespace
}  // namespace stagecoach

int main(int argc, char** argv) {
  CLI::App app("Runs the scheduler against a model of the stages, over many seeds.",
               "scheduler_sim");
  stagecoach::Flags flags;
  app.add_option("--seeds", flags.seeds, "how many")->capture_default_str();
  app.add_option("--first", flags.first, "the first seed")->capture_default_str();
  app.add_option("--threads", flags.threads)->capture_default_str()->check(CLI::Range(1, 256));
  CLI11_PARSE(app, argc, argv);
  return stagecoach::Run(flags);
}
