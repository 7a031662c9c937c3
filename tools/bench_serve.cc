// stagecoach bench serve: many clients at once, closed or open loop or in rounds.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "model/status_macros.h"
#include "tools/bench.h"
#include "tools/load.h"
#include "tools/service.h"
#include "tools/stage_usage.h"
#include "tools/table.h"

namespace stagecoach {
namespace {

struct BenchServeFlags {
  ServiceFlags service;
  std::vector<int> streams = {1, 8, 16, 32, 64};
  std::vector<double> rates;
  std::vector<std::string> clients;
  int rounds = 0;
  int requests = 0;
  double seconds = 0;
  LoadOptions load;
  std::string json;
};

double Figure(const nlohmann::json& summary, const std::string& key) { return summary[key]; }

std::string Milliseconds(const nlohmann::json& summary, const std::string& key) {
  return fmt::format("{:.1f}", Figure(summary, key));
}

std::string Shares(const std::vector<double>& shares) {
  std::string text;
  for (const double share : shares)
    text += fmt::format("{}{:.0f}%", text.empty() ? "" : " ", 100 * share);
  return text;
}

// "-" if there is none.
std::string Rate(const nlohmann::json& rate) {
  return rate.is_null() ? "-" : fmt::format("{:.1f}", rate.get<double>());
}

// The rates of each round, and their medians: null if no round has one.
void AddRounds(const LoadResult& result, int streams, nlohmann::json& out) {
  std::vector<double> prompt, decode;
  const auto samples = std::span(result.samples);
  const auto size = static_cast<size_t>(streams);
  for (size_t first = 0; first < samples.size(); first += size) {
    const RoundRates rates = RatesOfRound(samples.subspan(first, size));
    if (rates.prompt) prompt.push_back(*rates.prompt);
    if (rates.decode) decode.push_back(*rates.decode);
  }
  const auto median = [](const std::vector<double>& rates) {
    return rates.empty() ? nlohmann::json() : nlohmann::json(Median(rates));
  };
  out["rounds"] = samples.size() / size;
  out["prompt_tokens_per_second"] = median(prompt);
  out["decode_tokens_per_second"] = median(decode);
  out["prompt_samples"] = prompt;
  out["decode_samples"] = decode;
}

// Runs one load and summarises it, with the stages' busy and bubble shares and, with a private
// cluster, its memory.
absl::StatusOr<nlohmann::json> Measure(Service& service, const BenchServeFlags& flags,
                                       const LoadOptions& load) {
  Client& client = service.client();
  STAGECOACH_ASSIGN_OR_RETURN(const StageCounters before, ReadIdleCounters(client));
  MemoryWatch memory(service.cluster(), flags.service.workers);
  const LoadResult result = RunLoad(client, load);
  const MemoryWatch::Trend trend = memory.Stop();
  STAGECOACH_ASSIGN_OR_RETURN(const StageCounters after, ReadIdleCounters(client));
  for (const RequestSample& sample : result.samples) {
    if (!sample.status.ok()) {
      fmt::print(stderr, "request {} failed: {}\n", sample.index, sample.status.ToString());
      break;
    }
  }
  nlohmann::json out = SummariseLoad(result);
  const std::vector<double> busy = BusyShares(before, after, result.seconds);
  std::vector<double> bubble;
  for (const double share : busy) bubble.push_back(1 - share);
  out["stage_busy_share"] = busy;
  out["stage_bubble_share"] = bubble;
  out["output_throughput_per_worker"] =
      Figure(out, "output_throughput") / static_cast<double>(std::max<size_t>(1, busy.size()));
  out["memory_bytes"] = trend.last_bytes;
  out["memory_bytes_per_minute"] = trend.bytes_per_minute;
  const auto first = std::min_element(
      result.samples.begin(), result.samples.end(),
      [](const RequestSample& a, const RequestSample& b) { return a.start < b.start; });
  std::vector<double> later;
  for (auto it = result.samples.begin(); it != result.samples.end(); ++it) {
    if (it != first && it->status.ok()) later.push_back(it->ttft);
  }
  if (first != result.samples.end()) out["first_request_ttft_ms"] = 1e3 * first->ttft;
  out["later_median_ttft_ms"] = 1e3 * Percentile(later, 50);
  if (load.rounds > 0) AddRounds(result, load.streams, out);
  return out;
}

std::vector<std::string> TableHeader(const BenchServeFlags& flags) {
  std::vector<std::string> header = {flags.rates.empty() ? "streams" : "requests/s"};
  if (flags.rounds > 0) {
    header.insert(header.end(), {"prompt tok/s", "decode tok/s", "vs first", "rounds"});
  } else {
    header.insert(header.end(), {"tok/s", "vs first", "done"});
  }
  header.insert(header.end(), {"failed", "TTFT p50 ms", "p99", "ITL p50 ms", "p99", "E2E p50 ms",
                               "p99", "stages busy"});
  return header;
}

std::vector<std::string> TableRow(const BenchServeFlags& flags, const nlohmann::json& first,
                                  const nlohmann::json& summary) {
  const char* speed = flags.rounds > 0 ? "decode_tokens_per_second" : "output_throughput";
  std::vector<std::string> row = {flags.rates.empty()
                                      ? fmt::format("{}", summary["streams"].get<int>())
                                      : fmt::format("{:g}", Figure(summary, "request_rate"))};
  if (flags.rounds > 0) row.push_back(Rate(summary["prompt_tokens_per_second"]));
  row.push_back(Rate(summary[speed]));
  row.push_back(first[speed].is_null() || summary[speed].is_null()
                    ? "-"
                    : fmt::format("{:.2f}x", Figure(summary, speed) / Figure(first, speed)));
  for (const char* count : {flags.rounds > 0 ? "rounds" : "completed", "failed"})
    row.push_back(fmt::format("{}", summary[count].get<uint64_t>()));
  for (const char* name : {"ttft", "itl", "e2el"}) {
    row.push_back(Milliseconds(summary, fmt::format("median_{}_ms", name)));
    row.push_back(Milliseconds(summary, fmt::format("p99_{}_ms", name)));
  }
  row.push_back(Shares(summary["stage_busy_share"]));
  return row;
}

// One turn. A round that does not count goes before the others.
absl::StatusOr<nlohmann::json> RunPoint(Service& service, const BenchServeFlags& flags,
                                        size_t index) {
  LoadOptions load = flags.load;
  load.seed += index;  // other prompts: nothing is found in the prefix cache of the point before
  if (!flags.rates.empty()) {
    load.rate = flags.rates[index];
    load.requests = flags.requests > 0 ? flags.requests : 64;
  } else {
    load.streams = flags.streams[index];
    load.requests = flags.requests > 0 ? flags.requests : std::max(8, 4 * load.streams);
  }
  if (flags.rounds > 0) {
    load.requests = 0;
    LoadOptions warm_up = load;
    warm_up.seed = ~load.seed;
    warm_up.rounds = 1;
    (void)RunLoad(service.client(), warm_up);
    load.rounds = flags.rounds;
  }
  if (flags.seconds > 0) {
    load.requests = INT_MAX;
    load.duration = absl::Seconds(flags.seconds);
  }
  STAGECOACH_ASSIGN_OR_RETURN(nlohmann::json summary, Measure(service, flags, load));
  summary["streams"] = flags.rates.empty() ? load.streams : 0;
  summary["request_rate"] = load.rate;
  return summary;
}

absl::Status RunPoints(Service& service, const BenchServeFlags& flags, nlohmann::json& report) {
  std::vector<std::vector<std::string>> table = {TableHeader(flags)};
  const size_t points = flags.rates.empty() ? flags.streams.size() : flags.rates.size();
  bool without_decode = false;
  nlohmann::json& summaries = report["points"];
  for (size_t i = 0; i < points; ++i) {
    STAGECOACH_ASSIGN_OR_RETURN(nlohmann::json summary, RunPoint(service, flags, i));
    summaries.push_back(std::move(summary));
    table.push_back(TableRow(flags, summaries.front(), summaries.back()));
    without_decode |= flags.rounds > 0 && summaries.back()["decode_tokens_per_second"].is_null();
  }
  fmt::print("{}", FormatTable(table));
  if (without_decode) {
    fmt::print(
        "-: in no round came 8 tokens a stream while all decoded; more --tokens or fewer streams "
        "may help\n");
  }
  const nlohmann::json& last = summaries.back();
  if (flags.load.shared_prefix > 0) {
    fmt::print(
        "first request's TTFT {:.1f} ms, the later ones' median {:.1f} ms ({:.1f}x shorter)\n",
        Figure(last, "first_request_ttft_ms"), Figure(last, "later_median_ttft_ms"),
        Figure(last, "first_request_ttft_ms") / Figure(last, "later_median_ttft_ms"));
  }
  if (service.cluster() != nullptr && flags.seconds >= 10) {
    fmt::print("memory of all processes {}, {:+.3f} MB per minute over the second half\n",
               FormatBytes(static_cast<uint64_t>(Figure(last, "memory_bytes"))),
               Figure(last, "memory_bytes_per_minute") / 1e6);
  }
  return absl::OkStatus();
}

// "name:streams"
absl::StatusOr<LoadOptions> ParseClient(const std::string& text, const LoadOptions& base) {
  const size_t colon = text.rfind(':');
  LoadOptions load = base;
  load.user = text.substr(0, colon);
  load.streams = colon == std::string::npos ? 0 : std::atoi(text.c_str() + colon + 1);
  if (!load.user.empty() && load.streams >= 1 && load.streams <= 4096) return load;
  return absl::InvalidArgumentError(fmt::format("--clients {}: not NAME:STREAMS", text));
}

// All of the loads from `first` on at once; the first goes on until the others have done, unless it
// is alone.
std::vector<LoadResult> RunTogether(Service& service, std::vector<LoadOptions> loads, size_t first,
                                    uint64_t seed) {
  std::atomic<bool> stop = false;
  if (first + 1 < loads.size()) {
    loads[first].requests = INT_MAX;
    loads[first].stop = &stop;
  }
  std::vector<LoadResult> results(loads.size());
  std::vector<std::thread> threads;
  for (size_t i = first; i < loads.size(); ++i) {
    loads[i].seed += seed;
    threads.emplace_back([&, i] { results[i] = RunLoad(service.client(), loads[i]); });
  }
  for (size_t i = 1; i < threads.size(); ++i) threads[i].join();
  stop = true;
  threads[0].join();
  return results;
}

// The 99th percentile of all clients but the first.
double OthersTtft(const std::vector<LoadResult>& results) {
  std::vector<double> ttft;
  for (size_t i = 1; i < results.size(); ++i) {
    for (const RequestSample& sample : results[i].samples) {
      if (sample.status.ok()) ttft.push_back(sample.ttft);
    }
  }
  return 1e3 * Percentile(ttft, 99);
}

// Each client alone, then all but the first together, then all.
absl::Status RunClients(Service& service, const BenchServeFlags& flags, nlohmann::json& report) {
  std::vector<LoadOptions> loads;
  for (const std::string& text : flags.clients) {
    STAGECOACH_ASSIGN_OR_RETURN(LoadOptions load, ParseClient(text, flags.load));
    load.requests = flags.requests > 0 ? flags.requests : 16 * load.streams;
    loads.push_back(load);
  }
  std::vector<LoadResult> alone_runs;
  for (const LoadOptions& load : loads) alone_runs.push_back(RunLoad(service.client(), load));
  const std::vector<LoadResult> without_runs =
      RunTogether(service, loads, std::min<size_t>(1, loads.size() - 1), 1);
  const std::vector<LoadResult> together_runs = RunTogether(service, loads, 0, 2);
  std::vector<std::vector<std::string>> table = {
      {"client", "streams", "alone tok/s", "TTFT p50 ms", "p99", "without the first p50", "p99",
       "all tok/s", "TTFT p50 ms", "p99", "p99 vs alone"}};
  for (size_t i = 0; i < loads.size(); ++i) {
    const nlohmann::json alone = SummariseLoad(alone_runs[i]);
    const nlohmann::json without = SummariseLoad(without_runs[i]);
    const nlohmann::json together = SummariseLoad(together_runs[i]);
    const double ratio = Figure(together, "p99_ttft_ms") / Figure(alone, "p99_ttft_ms");
    const bool others = i > 0;
    table.push_back({loads[i].user, fmt::format("{}", loads[i].streams),
                     fmt::format("{:.1f}", Figure(alone, "output_throughput")),
                     Milliseconds(alone, "median_ttft_ms"), Milliseconds(alone, "p99_ttft_ms"),
                     others ? Milliseconds(without, "median_ttft_ms") : "-",
                     others ? Milliseconds(without, "p99_ttft_ms") : "-",
                     fmt::format("{:.1f}", Figure(together, "output_throughput")),
                     Milliseconds(together, "median_ttft_ms"),
                     Milliseconds(together, "p99_ttft_ms"), fmt::format("{:.2f}x", ratio)});
    report["clients"].push_back({{"user", loads[i].user},
                                 {"streams", loads[i].streams},
                                 {"alone", alone},
                                 {"without_first", without},
                                 {"together", together},
                                 {"p99_ttft_ratio", ratio}});
  }
  fmt::print("{}", FormatTable(table));
  const double alone = OthersTtft(alone_runs), together = OthersTtft(together_runs);
  fmt::print(
      "all but the first: TTFT p99 {:.1f} ms alone, {:.1f} together, {:.1f} ({:.2f}x) beside it\n",
      alone, OthersTtft(without_runs), together, together / alone);
  report["others_p99_ttft_ms"] = {
      {"alone", alone}, {"without_first", OthersTtft(without_runs)}, {"together", together}};
  return absl::OkStatus();
}

absl::Status RunBenchServe(BenchServeFlags& flags) {
  STAGECOACH_ASSIGN_OR_RETURN(const auto service, Service::Open(flags.service));
  STAGECOACH_ASSIGN_OR_RETURN(const v1::GetModelResponse model, service->client().GetModel());
  flags.load.vocab_size = static_cast<int>(model.vocab_size());
  LoadOptions warm_up = flags.load;
  warm_up.seed = 0;
  (void)RunLoad(service->client(), warm_up);
  fmt::print(
      "{}: prompts of {} tokens{}, {} generated{}\n\n", model.name(), flags.load.prompt_tokens,
      flags.load.shared_prefix > 0 ? fmt::format(" ({} shared)", flags.load.shared_prefix) : "",
      flags.load.tokens,
      flags.service.server.empty()
          ? fmt::format("; {} workers of {} threads on {}, transport {}", flags.service.workers,
                        flags.service.threads, flags.service.device, flags.service.transport)
          : "");
  nlohmann::json report = {{"benchmark", "serve"},
                           {"model", model.name()},
                           {"workers", flags.service.workers},
                           {"device", flags.service.device},
                           {"transport", flags.service.transport},
                           {"threads", flags.service.threads},
                           {"prompt_tokens", flags.load.prompt_tokens},
                           {"shared_prefix", flags.load.shared_prefix},
                           {"mixed", flags.load.mixed},
                           {"tokens", flags.load.tokens}};
  STAGECOACH_RETURN_IF_ERROR(flags.clients.empty() ? RunPoints(*service, flags, report)
                                                   : RunClients(*service, flags, report));
  return WriteBenchJson(flags.json, report);
}

}  // namespace

void AddBenchServe(CLI::App& bench, Command& run) {
  auto flags = std::make_shared<BenchServeFlags>();
  flags->service.threads = 1;
  CLI::App* command = bench.add_subcommand("serve", "Many clients at once");
  AddServiceFlags(*command, flags->service);
  command->add_option("--streams", flags->streams, "Closed loop: streams at once, several in turn")
      ->delimiter(',')
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  command->add_option("--rate", flags->rates, "Open loop: requests per second, several in turn")
      ->delimiter(',')
      ->check(CLI::PositiveNumber)
      ->excludes("--streams");
  command
      ->add_option("--clients", flags->clients,
                   "NAME:STREAMS of several users, alone and all together (heavy:64,a:1,b:1)")
      ->delimiter(',');
  command
      ->add_option(
          "--rounds", flags->rounds,
          "So many (with --seconds at least): all streams send at once, and again when all "
          "have ended. Prompts and decoding apart, like llama-batched-bench")
      ->check(CLI::Range(1, 10000))
      ->excludes("--rate")
      ->excludes("--clients");
  command->add_option("--requests", flags->requests, "Requests in each turn; 0 = a few per stream")
      ->check(CLI::NonNegativeNumber)
      ->excludes("--rounds");
  command->add_option("--seconds", flags->seconds, "Duration of each turn, instead of --requests")
      ->check(CLI::NonNegativeNumber);
  command->add_option("--prompt-tokens", flags->load.prompt_tokens, "Length of the prompts")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command
      ->add_option("--shared-prefix", flags->load.shared_prefix,
                   "Of which so many are the same in all prompts")
      ->check(CLI::NonNegativeNumber);
  command->add_option("--tokens", flags->load.tokens, "Tokens to generate")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command
      ->add_flag("--mixed", flags->load.mixed,
                 "Prompts from an eighth to twice as long, some n = 2, some sampled, some given up")
      ->excludes("--rounds");
  command->add_option("--seed", flags->load.seed, "Of the prompts")->capture_default_str();
  command->add_option("--json", flags->json, "Write the results here too");
  command->callback([flags, &run] { run = [flags] { return RunBenchServe(*flags); }; });
}

}  // namespace stagecoach
