// stagecoach bench hop --transport nccl: what passing activations from GPU to GPU costs, between
// two processes as stages are.
#include <fmt/format.h>
#include <stdlib.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "kernels/device.h"
#include "model/status_macros.h"
#include "tools/bench.h"
#include "tools/bench_hop_nccl.h"
#include "tools/child_process.h"
#include "tools/table.h"
#include "worker/link/nccl/nccl_transport.h"

namespace stagecoach {
namespace {

constexpr int kWarmUp = 20;
constexpr int kColumns = 4096;

// A workspace whose residual stream has room for `bytes`: only that is used of it.
struct DeviceMemory {
  std::unique_ptr<Backend> backend;
  std::unique_ptr<Workspace> workspace;
  ChannelMemory memory;
};

absl::StatusOr<DeviceMemory> OpenMemory(const std::string& device, uint64_t bytes) {
  DeviceMemory out;
  STAGECOACH_ASSIGN_OR_RETURN(out.backend, OpenDevice(device, {}));
  ModelParams params;
  params.layers = 1;
  params.d_model = kColumns;
  params.heads = params.kv_heads = kColumns / 128;
  params.key_length = params.value_length = params.rope_dims = 128;
  params.ffn_length = kColumns;
  params.vocab_size = 256;
  const int rows = static_cast<int>(bytes / (kColumns * sizeof(float))) + 1;
  STAGECOACH_ASSIGN_OR_RETURN(out.workspace, out.backend->NewWorkspace(params, rows));
  const ResidualMemory residual = out.backend->residual_memory(*out.workspace);
  if (out.backend->info().device_uuid.empty() || residual.data == nullptr) {
    return absl::InvalidArgumentError(fmt::format("NCCL needs GPUs, and {} is none", device));
  }
  out.memory = {.data = residual.data,
                .floats = static_cast<size_t>(rows) * kColumns,
                .stream = residual.stream,
                .device = residual.device};
  return out;
}

struct Pair {
  std::unique_ptr<DeviceChannel> out, in;
};

absl::StatusOr<Pair> Meet(DeviceTransport& nccl, const ChannelMemory& memory,
                          const std::string& out_id, const std::string& in_id, bool out_first) {
  Pair pair;
  STAGECOACH_ASSIGN_OR_RETURN(pair.out, nccl.OpenSender(out_id, memory, "the other process"));
  STAGECOACH_ASSIGN_OR_RETURN(pair.in, nccl.OpenReceiver(in_id, memory, "the other process"));
  DeviceChannel* const order[] = {out_first ? pair.out.get() : pair.in.get(),
                                  out_first ? pair.in.get() : pair.out.get()};
  for (DeviceChannel* channel : order) STAGECOACH_RETURN_IF_ERROR(channel->AwaitReady());
  return pair;
}

std::vector<std::string> PeerCommand(const NcclHopOptions& options, bool same_device,
                                     const std::string& there, const std::string& back) {
  std::error_code error;
  std::vector<std::string> argv;
  if (same_device) argv = {"/usr/bin/env", "NCCL_HOSTID=node1"};
  argv.insert(argv.end(), {std::filesystem::read_symlink("/proc/self/exe", error).string(), "bench",
                           "hop", "--transport", "nccl", "--devices", options.devices[1], "--count",
                           std::to_string(options.count), "--peer-ids",
                           absl::BytesToHexString(there), absl::BytesToHexString(back), "--bytes"});
  for (const uint64_t bytes : options.bytes) argv.push_back(std::to_string(bytes));
  return argv;
}

uint64_t Largest(const NcclHopOptions& options) { return std::ranges::max(options.bytes); }

absl::StatusOr<std::vector<double>> OneWayMicros(Pair& pair, size_t floats, int count) {
  std::vector<double> micros;
  for (int i = -kWarmUp; i < count; ++i) {
    const absl::Time start = absl::Now();
    STAGECOACH_RETURN_IF_ERROR(pair.out->Send(floats));
    STAGECOACH_RETURN_IF_ERROR(pair.in->Receive(floats));
    if (i >= 0) micros.push_back(absl::ToDoubleMicroseconds(absl::Now() - start) / 2);
  }
  std::ranges::sort(micros);
  return micros;
}

absl::Status Measure(const NcclHopOptions& options, Pair& pair, const std::string& title) {
  std::vector<std::vector<std::string>> table = {
      {"payload", "p50 us", "p90 us", "p99 us", "max us", "GB/s"}};
  nlohmann::json out = {{"benchmark", "hop"}, {"transport", "nccl"}, {"what", title}};
  for (const uint64_t bytes : options.bytes) {
    STAGECOACH_ASSIGN_OR_RETURN(const std::vector<double> micros,
                                OneWayMicros(pair, bytes / sizeof(float), options.count));
    const auto at = [&](double q) {
      return micros[std::min(micros.size() - 1, static_cast<size_t>(q * micros.size()))];
    };
    const double rate = static_cast<double>(bytes) / at(0.5) / 1e3;
    table.push_back({fmt::format("{} B", bytes), fmt::format("{:.1f}", at(0.5)),
                     fmt::format("{:.1f}", at(0.9)), fmt::format("{:.1f}", at(0.99)),
                     fmt::format("{:.1f}", at(1)), fmt::format("{:.2f}", rate)});
    out["rows"].push_back({{"payload_bytes", bytes},
                           {"p50_us", at(0.5)},
                           {"p90_us", at(0.9)},
                           {"p99_us", at(0.99)},
                           {"max_us", at(1)},
                           {"gigabytes_per_second", rate}});
  }
  fmt::print("{}: one-way latency of a payload, half of a round trip, {} round trips\n\n{}", title,
             options.count, FormatTable(table));
  return WriteBenchJson(options.json, std::move(out));
}

}  // namespace

absl::Status RunNcclHopPeer(const NcclHopOptions& options) {
  STAGECOACH_ASSIGN_OR_RETURN(DeviceMemory device,
                              OpenMemory(options.devices[0], Largest(options)));
  STAGECOACH_ASSIGN_OR_RETURN(const auto nccl, OpenNccl({}));
  const std::string there = absl::HexStringToBytes(options.peer_ids[0]),
                    back = absl::HexStringToBytes(options.peer_ids[1]);
  STAGECOACH_ASSIGN_OR_RETURN(Pair pair, Meet(*nccl, device.memory, back, there, false));
  for (const uint64_t bytes : options.bytes) {
    for (int i = -kWarmUp; i < options.count; ++i) {
      STAGECOACH_RETURN_IF_ERROR(pair.in->Receive(bytes / sizeof(float)));
      STAGECOACH_RETURN_IF_ERROR(pair.out->Send(bytes / sizeof(float)));
    }
  }
  // The last payload must have left before the communicator goes: one comes once it has arrived.
  return pair.in->Receive(1);
}

absl::Status RunNcclHop(const NcclHopOptions& options) {
  const bool same_device = options.devices[0] == options.devices[1];
  if (same_device) {  // see NcclObstacle: NCCL takes each process for its own host then
    setenv("NCCL_HOSTID", "node0", 0);
    setenv("NCCL_SOCKET_IFNAME", "lo", 0);
    setenv("NCCL_IB_DISABLE", "1", 0);
  }
  STAGECOACH_ASSIGN_OR_RETURN(DeviceMemory device,
                              OpenMemory(options.devices[0], Largest(options)));
  STAGECOACH_ASSIGN_OR_RETURN(const auto nccl, OpenNccl({}));
  STAGECOACH_ASSIGN_OR_RETURN(const std::string there, nccl->NewId());
  STAGECOACH_ASSIGN_OR_RETURN(const std::string back, nccl->NewId());
  absl::Mutex mu;
  std::string last_line = "no output";
  STAGECOACH_ASSIGN_OR_RETURN(const auto peer,
                              ChildProcess::Start(PeerCommand(options, same_device, there, back),
                                                  [&](const std::string& line) {
                                                    absl::MutexLock lock(&mu);
                                                    last_line = line;
                                                  }));
  absl::StatusOr<Pair> pair = Meet(*nccl, device.memory, there, back, true);
  absl::Status status = pair.status();
  if (status.ok()) {
    status = Measure(
        options, *pair,
        fmt::format("{}, {} to {}{}", nccl->description(), options.devices[0], options.devices[1],
                    same_device ? " (sockets over lo: not a real link's speed)" : ""));
  }
  if (status.ok()) status = pair->out->Send(1);
  for (int i = 0; status.ok() && peer->running() && i < 500; ++i) {
    absl::SleepFor(absl::Milliseconds(10));
  }
  if (status.ok()) return status;
  absl::MutexLock lock(&mu);
  return absl::Status(status.code(), fmt::format("{} (the other process: {})",
                                                 std::string(status.message()), last_line));
}

}  // namespace stagecoach
