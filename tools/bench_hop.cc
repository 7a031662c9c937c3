// stagecoach bench hop: what passing a frame to the next process costs, on loopback.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tools/bench.h"
#include "tools/table.h"
#include "worker/link/hop_bench.h"

namespace stagecoach {
namespace {

struct BenchHopFlags {
  std::vector<uint64_t> bytes = {1024, 16 * 1024, 256 * 1024, 4 * 1024 * 1024};
  int count = 2000;
  std::string json;
};

absl::Status RunBenchHop(const BenchHopFlags& flags) {
  std::vector<std::vector<std::string>> table = {
      {"transport", "payload", "p50 us", "p90 us", "p99 us", "max us"}};
  nlohmann::json out = {{"benchmark", "hop"}, {"round_trips", flags.count}};
  for (const auto& [transport, name] : {std::pair(HopTransport::kInProcess, "in-process"),
                                        std::pair(HopTransport::kGrpc, "grpc")}) {
    for (const uint64_t bytes : flags.bytes) {
      auto hop = MeasureHop(transport, bytes, flags.count);
      if (!hop.ok()) return hop.status();
      table.push_back({name, fmt::format("{} B", bytes), fmt::format("{:.1f}", hop->p50_us),
                       fmt::format("{:.1f}", hop->p90_us), fmt::format("{:.1f}", hop->p99_us),
                       fmt::format("{:.1f}", hop->max_us)});
      out["rows"].push_back({{"transport", name},
                             {"payload_bytes", bytes},
                             {"p50_us", hop->p50_us},
                             {"p90_us", hop->p90_us},
                             {"p99_us", hop->p99_us},
                             {"max_us", hop->max_us}});
    }
  }
  fmt::print(
      "one-way latency of a frame, half of a round trip over two links, {} round trips\n\n{}",
      flags.count, FormatTable(table));
  return WriteBenchJson(flags.json, std::move(out));
}

}  // namespace

void AddBenchHop(CLI::App& bench, Command& run) {
  auto flags = std::make_shared<BenchHopFlags>();
  CLI::App* command = bench.add_subcommand("hop", "Latency of one hop between processes");
  command->add_option("--bytes", flags->bytes, "Payload sizes")
      ->delimiter(',')
      ->check(CLI::Range(4, 64 << 20))
      ->capture_default_str();
  command->add_option("--count", flags->count, "Round trips per size")
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str();
  command->add_option("--json", flags->json, "Write the results here too");
  command->callback([flags, &run] { run = [flags] { return RunBenchHop(*flags); }; });
}

}  // namespace stagecoach
