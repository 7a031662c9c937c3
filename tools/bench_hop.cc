// stagecoach bench hop: what passing a frame to the next process costs, on loopback.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tools/bench.h"
#include "tools/bench_hop_nccl.h"
#include "tools/table.h"
#include "worker/link/hop_bench.h"

namespace stagecoach {
namespace {

struct BenchHopFlags {
  std::vector<uint64_t> bytes = {1024, 16 * 1024, 256 * 1024, 4 * 1024 * 1024};
  int count = 2000;
  std::string json;
  std::string transport = "grpc";
  NcclHopOptions nccl;
};

absl::Status RunNccl(BenchHopFlags& flags, bool bytes_given) {
  if (bytes_given) flags.nccl.bytes = flags.bytes;
  flags.nccl.count = flags.count;
  flags.nccl.json = flags.json;
  if (flags.nccl.peer_ids.size() == 2) return RunNcclHopPeer(flags.nccl);
  if (flags.nccl.devices.size() == 1) flags.nccl.devices.push_back(flags.nccl.devices[0]);
  return RunNcclHop(flags.nccl);
}

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
  CLI::Option* bytes = command->add_option("--bytes", flags->bytes, "Payload sizes");
  bytes->delimiter(',')->check(CLI::Range(4, 64 << 20))->capture_default_str();
  command->add_option("--count", flags->count, "Round trips per size")
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str();
  command->add_option("--json", flags->json, "Write the results here too");
  command
      ->add_option("--transport", flags->transport,
                   "grpc: frames over loopback, and within one process; nccl: payloads from GPU to "
                   "GPU, of 16 KiB and 8 MiB if no --bytes are given")
      ->check(CLI::IsMember({"grpc", "nccl"}))
      ->capture_default_str();
  command
      ->add_option("--devices", flags->nccl.devices,
                   "With nccl: GPUs of the two processes, cuda:0,cuda:1; one name: both on it")
      ->delimiter(',')
      ->expected(1, 2)
      ->capture_default_str();
  command->add_option("--peer-ids", flags->nccl.peer_ids)->expected(2)->group("");  // our own child
  command->callback([flags, bytes, &run] {
    run = [flags, given = bytes->count() > 0] {
      return flags->transport == "nccl" ? RunNccl(*flags, given) : RunBenchHop(*flags);
    };
  });
}

}  // namespace stagecoach
