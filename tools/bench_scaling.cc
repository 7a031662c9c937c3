// stagecoach bench scaling: what more workers buy. Weak scaling: a fixed micro-batch per stage, so
// that N workers serve N times the streams. Strong scaling: a fixed number of streams in all.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "model/status_macros.h"
#include "tools/bench.h"
#include "tools/load.h"
#include "tools/service.h"
#include "tools/stage_usage.h"
#include "tools/table.h"

namespace stagecoach {
namespace {

struct BenchScalingFlags {
  ServiceFlags service;
  std::vector<int> workers = {1, 2};
  int streams = 16;
  int requests_per_stream = 4;
  int repeat = 3;
  LoadOptions load;
  std::string json;
};

// One number of workers; a rate per round.
struct Point {
  int workers = 0;
  int streams = 0;
  std::unique_ptr<Service> service;
  std::vector<double> rates;
  std::vector<double> busy;  // of the stages, latest round
};

absl::Status MeasureRound(const BenchScalingFlags& flags, int round, Point& point) {
  LoadOptions load = flags.load;
  load.streams = point.streams;
  load.requests = point.streams * flags.requests_per_stream;
  load.seed += static_cast<uint64_t>(round) + 1;
  STAGECOACH_ASSIGN_OR_RETURN(const StageCounters before,
                              ReadIdleCounters(point.service->client()));
  const LoadResult result = RunLoad(point.service->client(), load);
  STAGECOACH_ASSIGN_OR_RETURN(const StageCounters after, ReadIdleCounters(point.service->client()));
  for (const RequestSample& sample : result.samples) {
    if (!sample.status.ok()) return sample.status;
  }
  if (round < 0) return absl::OkStatus();  // warm-up
  point.rates.push_back(SummariseLoad(result)["output_throughput"]);
  point.busy = BusyShares(before, after, result.seconds);
  return absl::OkStatus();
}

// Rounds go over all points in turn, so that a slow moment of the machine hits all alike.
absl::Status MeasurePoints(const BenchScalingFlags& flags, std::vector<Point>& points) {
  for (int round = -1; round < flags.repeat; ++round) {
    for (Point& point : points) STAGECOACH_RETURN_IF_ERROR(MeasureRound(flags, round, point));
  }
  return absl::OkStatus();
}

nlohmann::json Report(const char* name, bool weak, const std::vector<Point>& points) {
  std::vector<std::vector<std::string>> table = {
      {name, "streams", "tok/s", "speed-up", "efficiency", "tok/s per worker", "stages busy"}};
  nlohmann::json out = nlohmann::json::array();
  const double base = Median(points.front().rates) / points.front().workers;
  for (const Point& point : points) {
    const double rate = Median(point.rates);
    const double speed_up = rate / (base * points.front().workers);
    const double efficiency = rate / (base * point.workers);
    std::string busy;
    for (const double share : point.busy) busy += fmt::format("{:.0f}% ", 100 * share);
    table.push_back({fmt::format("{} workers", point.workers), fmt::format("{}", point.streams),
                     fmt::format("{:.1f}", rate), fmt::format("{:.2f}x", speed_up),
                     fmt::format("{:.2f}", efficiency), fmt::format("{:.1f}", rate / point.workers),
                     busy});
    out.push_back({{"workers", point.workers},
                   {"streams", point.streams},
                   {"output_throughput", rate},
                   {"samples", point.rates},
                   {"speed_up", speed_up},
                   {"efficiency", efficiency},
                   {"stage_busy_share", point.busy}});
  }
  fmt::print(
      "{}{}\n", FormatTable(table),
      weak ? "(streams grow with the workers; efficiency = tok/s per worker over the first's)\n"
           : "(the same streams on more workers)\n");
  return out;
}

absl::Status RunBenchScaling(BenchScalingFlags& flags) {
  std::sort(flags.workers.begin(), flags.workers.end());
  std::vector<Point> weak, strong;
  for (const int workers : flags.workers) {
    for (const bool is_weak : {true, false}) {
      ServiceFlags service = flags.service;
      service.workers = workers;
      Point point{.workers = workers, .streams = is_weak ? flags.streams * workers : flags.streams};
      service.max_slots = std::max(service.max_slots, point.streams);
      STAGECOACH_ASSIGN_OR_RETURN(point.service, Service::Open(service));
      (is_weak ? weak : strong).push_back(std::move(point));
    }
  }
  STAGECOACH_ASSIGN_OR_RETURN(const v1::GetModelResponse model,
                              weak.front().service->client().GetModel());
  flags.load.vocab_size = static_cast<int>(model.vocab_size());
  fmt::print(
      "{}: prompts of {} tokens, {} generated, {} threads per worker, median of {} rounds\n\n",
      model.name(), flags.load.prompt_tokens, flags.load.tokens, flags.service.threads,
      flags.repeat);
  STAGECOACH_RETURN_IF_ERROR(MeasurePoints(flags, weak));
  nlohmann::json report = {{"benchmark", "scaling"},
                           {"model", model.name()},
                           {"threads", flags.service.threads},
                           {"prompt_tokens", flags.load.prompt_tokens},
                           {"tokens", flags.load.tokens}};
  report["weak"] = Report("weak scaling", true, weak);
  STAGECOACH_RETURN_IF_ERROR(MeasurePoints(flags, strong));
  report["strong"] = Report("strong scaling", false, strong);
  return WriteBenchJson(flags.json, report);
}

}  // namespace

void AddBenchScaling(CLI::App& bench, Command& run) {
  auto flags = std::make_shared<BenchScalingFlags>();
  flags->service.threads = 1;
  CLI::App* command = bench.add_subcommand("scaling", "What more workers buy");
  command->add_option("--model", flags->service.model, "GGUF file")->required();
  command->add_option("--workers", flags->workers, "Numbers of worker processes")
      ->delimiter(',')
      ->check(CLI::Range(1, 512))
      ->capture_default_str();
  command->add_option("--threads", flags->service.threads, "Threads per worker")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  command->add_option("--streams", flags->streams, "Weak: per worker; strong: in all")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  command->add_option("--requests", flags->requests_per_stream, "Requests of each stream")
      ->check(CLI::Range(1, 100000))
      ->capture_default_str();
  command->add_option("--prompt-tokens", flags->load.prompt_tokens, "Length of the prompts")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command->add_option("--tokens", flags->load.tokens, "Tokens to generate")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command->add_option("--repeat", flags->repeat, "Rounds after a warm-up")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  command->add_flag("--verbose", flags->service.verbose, "Show the logs of the processes");
  command->add_option("--json", flags->json, "Write the results here too");
  command->callback([flags, &run] { run = [flags] { return RunBenchScaling(*flags); }; });
}

}  // namespace stagecoach
