// stagecoach bench hop: what passing a frame to the next process costs, on loopback.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "model/status_macros.h"
#include "tools/bench.h"
#include "tools/bench_hop_nccl.h"
#include "tools/table.h"
#include "worker/link/hop_bench.h"

namespace stagecoach {
namespace {

// Rows of activations of a model of 4096 columns: 1, 8, 64 and 512.
const std::vector<uint64_t> kNcclBytes = {16 << 10, 128 << 10, 1 << 20, 8 << 20};

struct BenchHopFlags {
  std::vector<uint64_t> bytes = {1024, 16 * 1024, 256 * 1024, 4 * 1024 * 1024};
  int count = 2000;
  double seconds = 4;
  std::string json;
  std::string transport = "grpc";
  NcclHopOptions nccl;
};

constexpr char kInProcess[] = "in-process";

class HopTable {
 public:
  void Add(const std::string& transport, uint64_t bytes, const HopLatency& hop) {
    const bool bytes_move = transport != kInProcess;  // frames change hands there
    const double rate = static_cast<double>(bytes) / hop.p50_us / 1e3;
    cells_.push_back({transport, fmt::format("{} B", bytes), fmt::format("{:.1f}", hop.p50_us),
                      fmt::format("{:.1f}", hop.p90_us), fmt::format("{:.1f}", hop.p99_us),
                      fmt::format("{:.1f}", hop.max_us),
                      bytes_move ? fmt::format("{:.2f}", rate) : "-",
                      fmt::format("{}", hop.count)});
    rows_.push_back({{"transport", transport},
                     {"payload_bytes", bytes},
                     {"p50_us", hop.p50_us},
                     {"p90_us", hop.p90_us},
                     {"p99_us", hop.p99_us},
                     {"max_us", hop.max_us},
                     {"gigabytes_per_second", rate},
                     {"round_trips", hop.count}});
  }
  absl::Status Finish(const std::string& title, const std::string& json) const {
    fmt::print("{}: one-way latency, half of a round trip over two links\n\n{}", title,
               FormatTable(cells_));
    return WriteBenchJson(json, {{"benchmark", "hop"}, {"what", title}, {"rows", rows_}});
  }

 private:
  std::vector<std::vector<std::string>> cells_ = {
      {"transport", "payload", "p50 us", "p90 us", "p99 us", "max us", "GB/s", "round trips"}};
  nlohmann::json rows_ = nlohmann::json::array();
};

absl::Status AddFrames(const BenchHopFlags& flags, HopTransport transport, const std::string& name,
                       HopTable& table) {
  for (const uint64_t bytes : flags.bytes) {
    STAGECOACH_ASSIGN_OR_RETURN(const HopLatency hop, MeasureHop(transport, bytes, flags.count,
                                                                 absl::Seconds(flags.seconds)));
    table.Add(name, bytes, hop);
  }
  return absl::OkStatus();
}

absl::Status RunNccl(const BenchHopFlags& flags) {
  STAGECOACH_ASSIGN_OR_RETURN(const NcclHopResult result, RunNcclHop(flags.nccl));
  HopTable table;
  for (const NcclHopRow& row : result.rows) table.Add("nccl", row.bytes, row.hop);
  STAGECOACH_RETURN_IF_ERROR(AddFrames(flags, HopTransport::kGrpc, "grpc", table));
  for (const NcclHopRow& row : result.rows) table.Add("GPU-host-GPU", row.bytes, row.copies);
  return table.Finish(
      result.title +
          ", gRPC over loopback between hosts' memory, and the copies that it needs "
          "between GPUs",
      flags.json);
}

absl::Status RunFrames(const BenchHopFlags& flags) {
  HopTable table;
  STAGECOACH_RETURN_IF_ERROR(AddFrames(flags, HopTransport::kInProcess, kInProcess, table));
  STAGECOACH_RETURN_IF_ERROR(AddFrames(flags, HopTransport::kGrpc, "grpc", table));
  return table.Finish("frames", flags.json);
}

absl::Status RunBenchHop(BenchHopFlags& flags, bool bytes_given) {
  if (flags.transport != "nccl") return RunFrames(flags);
  if (!bytes_given) flags.bytes = kNcclBytes;
  for (uint64_t& bytes : flags.bytes) bytes -= bytes % sizeof(float);
  flags.nccl.bytes = flags.bytes;
  flags.nccl.count = flags.count;
  flags.nccl.limit = absl::Seconds(flags.seconds);
  if (flags.nccl.peer_ids.size() == 2) return RunNcclHopPeer(flags.nccl);
  if (flags.nccl.devices.size() == 1) flags.nccl.devices.push_back(flags.nccl.devices[0]);
  return RunNccl(flags);
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
  command->add_option("--seconds", flags->seconds, "But no longer than so for each size")
      ->check(CLI::Range(0.0, 600.0))
      ->capture_default_str();
  command->add_option("--json", flags->json, "Write the results here too");
  command
      ->add_option("--transport", flags->transport,
                   "grpc: frames over loopback, and within one process; nccl: payloads from GPU to "
                   "GPU, of 16 KiB to 8 MiB if no --bytes are given, beside gRPC")
      ->check(CLI::IsMember({"grpc", "nccl"}))
      ->capture_default_str();
  command
      ->add_option(
          "--devices", flags->nccl.devices,
          "With nccl: GPUs of the two processes; one name: both on it, which NCCL takes for "
          "two hosts then: a check, not a link's speed")
      ->delimiter(',')
      ->expected(1, 2)
      ->capture_default_str();
  command->add_option("--peer-ids", flags->nccl.peer_ids)->expected(2)->group("");  // our own child
  command->callback([flags, bytes, &run] {
    run = [flags, given = bytes->count() > 0] { return RunBenchHop(*flags, given); };
  });
}

}  // namespace stagecoach
