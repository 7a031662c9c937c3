// stagecoach bench cancel: a storm of requests that are given up at random moments, beside streams
// that must not notice: their tokens are compared with those of a quiet run.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <atomic>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "model/status_macros.h"
#include "tools/bench.h"
#include "tools/load.h"
#include "tools/service.h"

namespace stagecoach {
namespace {

constexpr int kStormThreads = 32;
constexpr int kMaxCancelMs = 20;  // a request of the storm lives no longer
constexpr absl::Duration kSettle = absl::Seconds(5);

struct BenchCancelFlags {
  ServiceFlags service;
  double rate = 1000;
  double seconds = 60;
  int streams = 8;
  LoadOptions load;
  std::string json;
};

struct Storm {
  std::atomic<uint64_t> started = 0;
  std::atomic<uint64_t> ended_early = 0;  // cancelled or past their deadline
  std::atomic<uint64_t> refused = 0;      // RESOURCE_EXHAUSTED
  std::atomic<uint64_t> completed = 0;
  std::atomic<uint64_t> failed = 0;
};

// Starts requests at its share of the rate; each ends by a deadline or is cancelled at its first
// token, whichever comes first.
void StormThread(Client& client, const BenchCancelFlags& flags, int thread, absl::Time end,
                 Storm& storm) {
  std::mt19937_64 random(static_cast<uint64_t>(thread));
  LoadOptions load = flags.load;
  load.user = "storm";
  load.seed = 1000 + static_cast<uint64_t>(thread);
  const absl::Duration interval = absl::Seconds(kStormThreads / flags.rate);
  absl::Time next = absl::Now() + interval * (thread / static_cast<double>(kStormThreads));
  for (int index = 0; next < end; ++index, next += interval) {
    absl::SleepFor(next - absl::Now());
    v1::GenerateRequest request;
    const std::vector<int32_t> prompt = LoadPrompt(load, index);
    request.mutable_token_ids()->mutable_ids()->Assign(prompt.begin(), prompt.end());
    request.set_max_tokens(64);
    request.set_ignore_eos(true);
    request.set_user(load.user);
    ++storm.started;
    const absl::Time deadline =
        absl::Now() + absl::Milliseconds(1 + static_cast<int>(random() % kMaxCancelMs));
    const absl::Status status =
        client.Generate(request, deadline, [](const auto&) { return false; });
    if (status.ok()) {
      ++storm.completed;
    } else if (absl::IsCancelled(status) || absl::IsDeadlineExceeded(status)) {
      ++storm.ended_early;
    } else if (absl::IsResourceExhausted(status)) {
      ++storm.refused;
    } else {
      ++storm.failed;
    }
  }
}

// How many requests of the two runs, told apart by index, differ in their tokens or failed.
int CountChanged(const LoadResult& quiet, const LoadResult& stormy) {
  int changed = 0;
  for (const RequestSample& sample : stormy.samples) {
    const auto same = std::find_if(quiet.samples.begin(), quiet.samples.end(),
                                   [&](const auto& other) { return other.index == sample.index; });
    if (same == quiet.samples.end()) continue;
    if (!sample.status.ok() || !same->status.ok() || sample.output != same->output) ++changed;
  }
  return changed;
}

// Milliseconds until no sequence and no block is in use any more; negative if that does not come.
absl::StatusOr<double> AwaitFree(Client& client, v1::GetStatusResponse* status) {
  const absl::Time start = absl::Now();
  while (absl::Now() - start < kSettle) {
    STAGECOACH_ASSIGN_OR_RETURN(*status, client.GetStatus());
    if (status->running() == 0 && status->waiting() == 0 && status->kv_blocks_used() == 0) {
      return absl::ToDoubleMilliseconds(absl::Now() - start);
    }
    absl::SleepFor(absl::Milliseconds(1));
  }
  return -1;
}

absl::Status RunBenchCancel(BenchCancelFlags& flags) {
  STAGECOACH_ASSIGN_OR_RETURN(const auto service, Service::Open(flags.service));
  Client& client = service->client();
  STAGECOACH_ASSIGN_OR_RETURN(const v1::GetModelResponse model, client.GetModel());
  flags.load.vocab_size = static_cast<int>(model.vocab_size());
  flags.load.user = "bystander";
  flags.load.streams = flags.streams;

  std::atomic<bool> stop = false;
  LoadOptions bystanders = flags.load;
  bystanders.requests = INT_MAX;
  bystanders.stop = &stop;
  Storm storm;
  const absl::Time end = absl::Now() + absl::Seconds(flags.seconds);
  std::vector<std::thread> threads;
  for (int i = 0; i < kStormThreads; ++i) {
    threads.emplace_back([&, i] { StormThread(client, flags, i, end, storm); });
  }
  LoadResult stormy;
  std::thread load([&] { stormy = RunLoad(client, bystanders); });
  for (std::thread& thread : threads) thread.join();
  stop = true;
  load.join();
  v1::GetStatusResponse status;
  STAGECOACH_ASSIGN_OR_RETURN(const double free_ms, AwaitFree(client, &status));

  LoadOptions quiet_load = flags.load;
  quiet_load.requests = static_cast<int>(stormy.samples.size());
  const LoadResult quiet = RunLoad(client, quiet_load);
  const int changed = CountChanged(quiet, stormy);
  fmt::print(
      "{:.0f} s: {} requests started ({:.0f}/s): {} given up, {} refused, {} completed, {} failed\n"
      "{} bystander requests on {} streams, {} changed\n"
      "afterwards {} sequences, {} waiting, {} KV blocks in use{}\n",
      flags.seconds, storm.started.load(), static_cast<double>(storm.started) / flags.seconds,
      storm.ended_early.load(), storm.refused.load(), storm.completed.load(), storm.failed.load(),
      stormy.samples.size(), flags.streams, changed, status.running(), status.waiting(),
      status.kv_blocks_used(),
      free_ms < 0 ? "" : fmt::format(" ({:.1f} ms after the last one ended)", free_ms));
  STAGECOACH_RETURN_IF_ERROR(
      WriteBenchJson(flags.json, {{"benchmark", "cancel"},
                                  {"seconds", flags.seconds},
                                  {"started", storm.started.load()},
                                  {"given_up", storm.ended_early.load()},
                                  {"refused", storm.refused.load()},
                                  {"completed", storm.completed.load()},
                                  {"failed", storm.failed.load()},
                                  {"bystanders", stormy.samples.size()},
                                  {"bystanders_changed", changed},
                                  {"kv_blocks_leaked", status.kv_blocks_used()},
                                  {"free_after_ms", free_ms}}));
  if (changed == 0 && free_ms >= 0 && storm.failed == 0) return absl::OkStatus();
  return absl::InternalError("the storm left its mark; see above");
}

}  // namespace

void AddBenchCancel(CLI::App& bench, Command& run) {
  auto flags = std::make_shared<BenchCancelFlags>();
  flags->service.threads = 1;
  CLI::App* command = bench.add_subcommand("cancel", "A storm of cancelled requests");
  AddServiceFlags(*command, flags->service);
  command->add_option("--rate", flags->rate, "Requests started per second")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--seconds", flags->seconds, "Duration")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--streams", flags->streams, "Streams beside the storm")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  command->add_option("--prompt-tokens", flags->load.prompt_tokens, "Length of the prompts")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command->add_option("--tokens", flags->load.tokens, "Tokens of each bystander's request")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command->add_option("--json", flags->json, "Write the results here too");
  command->callback([flags, &run] { run = [flags] { return RunBenchCancel(*flags); }; });
}

}  // namespace stagecoach
