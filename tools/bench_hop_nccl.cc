#include "tools/bench_hop_nccl.h"

#include <fmt/format.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <span>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/escaping.h"
#include "absl/strings/strip.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "kernels/device.h"
#include "model/status_macros.h"
#include "tools/child_process.h"
#include "tools/local_stage.h"
#include "tools/nccl_hop.h"
#include "tools/watchdog.h"
#include "worker/link/nccl/nccl_transport.h"

namespace stagecoach {
namespace {

constexpr int kColumns = 4096;
constexpr int kExitFailure = 1;
constexpr int kExitBadInput = 2;  // of the other process, as of this one: tools/main.cc
constexpr char kPeerHost[] = "node1";
constexpr char kPeerName[] = "the other process";

// Calls into CUDA and NCCL that know no deadline: what ends the process if they do not return.
constexpr absl::Duration kStartLimit = absl::Seconds(60);
constexpr absl::Duration kCloseLimit = absl::Seconds(30);
// Of the channels, which see to it themselves. The other process starts its device meanwhile.
constexpr absl::Duration kInitTimeout = absl::Seconds(45);
constexpr absl::Duration kTransferTimeout = absl::Seconds(10);
constexpr absl::Duration kMargin = absl::Seconds(15);

NcclOptions ChannelOptions() {
  return {.init_timeout = kInitTimeout, .transfer_timeout = kTransferTimeout};
}

void Say(const std::string& line) { fmt::print(stderr, "bench hop: {}\n", line); }

// A workspace whose residual stream has room for `bytes`: only that is used of it.
struct DeviceMemory {
  std::unique_ptr<Backend> backend;
  std::unique_ptr<Workspace> workspace;
  ChannelMemory memory;

  absl::Status Write(std::span<const float> words) {
    std::vector<float> row(kColumns);
    std::ranges::copy(words, row.begin());
    return CopyThrough(row);
  }
  absl::Status Read(std::span<float> words) {
    std::vector<float> row(kColumns);
    STAGECOACH_RETURN_IF_ERROR(backend->TakeResidual(*workspace, 1));
    STAGECOACH_RETURN_IF_ERROR(backend->GetResidual(*workspace, row));
    std::copy_n(row.begin(), words.size(), words.begin());
    return absl::OkStatus();
  }
  // Whole rows to the device and back.
  absl::Status CopyThrough(std::span<float> rows) {
    STAGECOACH_RETURN_IF_ERROR(backend->SetResidual(*workspace, rows));
    return backend->GetResidual(*workspace, rows);
  }
};

absl::StatusOr<DeviceMemory> OpenMemory(const std::string& device, uint64_t bytes) {
  DeviceMemory out;
  STAGECOACH_ASSIGN_OR_RETURN(out.backend, OpenDeviceFlag(device, 1));
  if (out.backend->info().device_uuid.empty()) {
    return absl::InvalidArgumentError(fmt::format("NCCL needs GPUs, and {} is none", device));
  }
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
  out.memory = {.data = residual.data,
                .floats = static_cast<size_t>(rows) * kColumns,
                .stream = residual.stream,
                .device = residual.device};
  return out;
}

absl::StatusOr<std::unique_ptr<DeviceTransport>> OpenLibrary() {
  auto nccl = OpenNccl(ChannelOptions());
  if (!nccl.ok()) return absl::InvalidArgumentError(nccl.status().message());
  return nccl;
}

uint64_t Largest(const NcclHopOptions& options) { return std::ranges::max(options.bytes); }

HopEnd EndOn(DeviceMemory& device, DeviceChannel* out, DeviceChannel* in) {
  return {.out = out,
          .in = in,
          .floats = device.memory.floats,
          .write = [&device](std::span<const float> words) { return device.Write(words); },
          .read = [&device](std::span<float> words) { return device.Read(words); }};
}

// This process's part: the channels to the other one, and what is known of that one.
class Leader {
 public:
  explicit Leader(const NcclHopOptions& options)
      : options_(options), same_device_(options.devices[0] == options.devices[1]) {}
  ~Leader();

  absl::StatusOr<NcclHopResult> Run();

 private:
  absl::Status Start();
  absl::Status Meet();
  // Keeps the channel and waits until it is ready.
  absl::StatusOr<DeviceChannel*> Ready(std::unique_ptr<DeviceChannel> channel);
  absl::StatusOr<NcclHopResult> MeasureAll();
  absl::StatusOr<HopLatency> MeasureCopies(uint64_t bytes);
  void AwaitPeersEnd();
  std::vector<std::string> PeerCommand() const;
  absl::Status Explain(const absl::Status& status);
  void Look();
  void EndStuck(const std::string& what);
  ChildProcess* Peer() {
    absl::MutexLock lock(&mu_);
    return peer_.get();
  }
  std::string PeersLastLine() {
    absl::MutexLock lock(&mu_);
    return last_line_;
  }

  const NcclHopOptions& options_;
  const bool same_device_;

  // Of the one thread that measures.
  DeviceMemory device_;
  std::unique_ptr<DeviceTransport> nccl_;
  std::string there_, back_;  // ids
  DeviceChannel* out_ = nullptr;
  DeviceChannel* in_ = nullptr;

  absl::Mutex mu_;
  std::string last_line_ ABSL_GUARDED_BY(mu_) = "no output";
  std::unique_ptr<ChildProcess> peer_ ABSL_GUARDED_BY(mu_);
  std::vector<std::unique_ptr<DeviceChannel>> channels_ ABSL_GUARDED_BY(mu_);

  Watchdog watchdog_{[this] { Look(); }, [this](const std::string& what) { EndStuck(what); }};
};

Leader::~Leader() {
  watchdog_.Begin("ending NCCL and the other process", kCloseLimit);
  std::unique_ptr<ChildProcess> peer;
  std::vector<std::unique_ptr<DeviceChannel>> channels;
  {
    absl::MutexLock lock(&mu_);
    peer = std::move(peer_);
    channels = std::move(channels_);
  }
  // The receiving one first: to free the sender's memory is to wait for all kernels of the GPU.
  while (!channels.empty()) channels.pop_back();
  peer.reset();
  nccl_.reset();
  device_.workspace.reset();
  device_.backend.reset();
}

// Channels to a process that has ended would wait for their whole timeout.
void Leader::Look() {
  absl::MutexLock lock(&mu_);
  if (peer_ == nullptr || peer_->running()) return;
  for (const auto& channel : channels_) channel->Cancel();
}

void Leader::EndStuck(const std::string& what) {
  fmt::print(stderr, "stagecoach: {} ({}: {})\n", what, kPeerName, PeersLastLine());
  absl::MutexLock lock(&mu_);
  if (peer_ != nullptr) kill(peer_->pid(), SIGKILL);
  _exit(kExitFailure);
}

std::vector<std::string> Leader::PeerCommand() const {
  std::vector<std::string> argv;
  if (same_device_) {
    const bool taken = std::string_view(getenv("NCCL_HOSTID")) == kPeerHost;
    argv = {"/usr/bin/env", fmt::format("NCCL_HOSTID={}{}", kPeerHost, taken ? "-peer" : "")};
  }
  std::error_code error;
  argv.insert(argv.end(),
              {std::filesystem::read_symlink("/proc/self/exe", error).string(), "bench", "hop",
               "--transport", "nccl", "--devices", options_.devices[1], "--peer-ids",
               absl::BytesToHexString(there_), absl::BytesToHexString(back_), "--bytes",
               std::to_string(Largest(options_))});
  return argv;
}

absl::Status Leader::Start() {
  if (same_device_) {  // see NcclObstacle: NCCL takes each process for its own host then
    setenv("NCCL_HOSTID", "node0", 0);
    setenv("NCCL_SOCKET_IFNAME", "lo", 0);
    setenv("NCCL_IB_DISABLE", "1", 0);
  }
  Say(fmt::format("starting {}", options_.devices[0]));
  watchdog_.Begin("starting " + options_.devices[0], kStartLimit);
  STAGECOACH_ASSIGN_OR_RETURN(device_, OpenMemory(options_.devices[0], Largest(options_)));
  watchdog_.Begin("loading NCCL and making its ids", kStartLimit);
  STAGECOACH_ASSIGN_OR_RETURN(nccl_, OpenLibrary());
  STAGECOACH_ASSIGN_OR_RETURN(there_, nccl_->NewId());
  STAGECOACH_ASSIGN_OR_RETURN(back_, nccl_->NewId());
  STAGECOACH_ASSIGN_OR_RETURN(auto peer,
                              ChildProcess::Start(PeerCommand(), [this](const std::string& line) {
                                absl::MutexLock lock(&mu_);
                                last_line_ = line;
                              }));
  Say(fmt::format("setting up {} between {} here and {} in process {}", nccl_->description(),
                  options_.devices[0], options_.devices[1], peer->pid()));
  absl::MutexLock lock(&mu_);
  peer_ = std::move(peer);
  return absl::OkStatus();
}

absl::StatusOr<DeviceChannel*> Leader::Ready(std::unique_ptr<DeviceChannel> channel) {
  DeviceChannel* const kept = channel.get();
  {
    absl::MutexLock lock(&mu_);
    channels_.push_back(std::move(channel));
  }
  STAGECOACH_RETURN_IF_ERROR(kept->AwaitReady());
  return kept;
}

// One channel after the other, and the other process likewise: neither's setting up can wait for
// what the other has not begun.
absl::Status Leader::Meet() {
  const absl::Time start = absl::Now();
  watchdog_.Begin("setting up NCCL to the other process", 3 * kInitTimeout + kMargin);
  STAGECOACH_ASSIGN_OR_RETURN(auto out, nccl_->OpenSender(there_, device_.memory, kPeerName));
  STAGECOACH_ASSIGN_OR_RETURN(out_, Ready(std::move(out)));
  watchdog_.Begin("setting up NCCL from the other process", 3 * kInitTimeout + kMargin);
  STAGECOACH_ASSIGN_OR_RETURN(auto in, nccl_->OpenReceiver(back_, device_.memory, kPeerName));
  STAGECOACH_ASSIGN_OR_RETURN(in_, Ready(std::move(in)));
  Say(fmt::format("ready after {:.1f} s", absl::ToDoubleSeconds(absl::Now() - start)));
  return absl::OkStatus();
}

absl::StatusOr<HopLatency> Leader::MeasureCopies(uint64_t bytes) {
  const size_t row_bytes = kColumns * sizeof(float);
  std::vector<float> rows((bytes + row_bytes - 1) / row_bytes * kColumns);
  std::vector<double> micros;
  const absl::Time end = absl::Now() + std::min(options_.limit, absl::Seconds(1));
  for (int i = -kHopWarmUp; i < options_.count && (i < 1 || absl::Now() < end); ++i) {
    const absl::Time start = absl::Now();
    for (int hop = 0; hop < 2; ++hop) STAGECOACH_RETURN_IF_ERROR(device_.CopyThrough(rows));
    if (i >= 0) micros.push_back(absl::ToDoubleMicroseconds(absl::Now() - start));
  }
  return SummariseHop(std::move(micros));
}

absl::StatusOr<NcclHopResult> Leader::MeasureAll() {
  NcclHopResult result;
  result.title =
      fmt::format("{}, {} to {}{}", nccl_->description(), options_.devices[0], options_.devices[1],
                  same_device_ ? " (two processes taking turns on one GPU, by sockets "
                                 "over lo: not a link's speed)"
                               : "");
  HopEnd end = EndOn(device_, out_, in_);
  for (const uint64_t bytes : options_.bytes) {
    watchdog_.Begin(fmt::format("passing payloads of {} bytes", bytes),
                    3 * options_.limit + kHopWarmUp * kTransferTimeout + kMargin);
    STAGECOACH_ASSIGN_OR_RETURN(
        std::vector<double> round_trips,
        LeadHop(end, bytes / sizeof(float), options_.count, options_.limit));
    const HopLatency hop = SummariseHop(std::move(round_trips));
    Say(fmt::format("{} B: p50 {:.1f} us, p99 {:.1f} us, {} round trips", bytes, hop.p50_us,
                    hop.p99_us, hop.count));
    result.rows.push_back({.bytes = bytes, .hop = hop});
  }
  watchdog_.Begin("the end of the other process", kCloseLimit);
  STAGECOACH_RETURN_IF_ERROR(EndHop(end));
  AwaitPeersEnd();
  for (NcclHopRow& row : result.rows) {
    watchdog_.Begin(fmt::format("copying {} bytes from and to {}", row.bytes, options_.devices[0]),
                    options_.limit + kMargin);
    STAGECOACH_ASSIGN_OR_RETURN(row.copies, MeasureCopies(row.bytes));
  }
  return result;
}

// Its end, by itself, in good time: nothing depends on it but a quiet machine for what follows.
void Leader::AwaitPeersEnd() {
  const absl::Time deadline = absl::Now() + kTransferTimeout;
  while (Peer()->running() && absl::Now() < deadline) absl::SleepFor(absl::Milliseconds(10));
  if (Peer()->running()) Say(fmt::format("{} does not end ({})", kPeerName, PeersLastLine()));
}

// If the other process ended, its reason is the better one.
absl::Status Leader::Explain(const absl::Status& status) {
  ChildProcess* const peer = Peer();
  if (peer == nullptr) return status;
  if (peer->running()) {
    return absl::Status(status.code(), fmt::format("{} ({}: {})", std::string(status.message()),
                                                   kPeerName, PeersLastLine()));
  }
  peer->DrainOutput();
  const std::string line(absl::StripPrefix(PeersLastLine(), "stagecoach: "));
  if (peer->ExitCode() == kExitBadInput) {
    return absl::InvalidArgumentError(fmt::format(
        "{}; NCCL takes one rank on a GPU (--devices {}: both on it, as if on two hosts)", line,
        options_.devices[0]));
  }
  return absl::UnavailableError(
      fmt::format("{} ended ({}): {}", kPeerName, peer->ExitDescription(), line));
}

absl::StatusOr<NcclHopResult> Leader::Run() {
  absl::Status status = Start();
  if (status.ok()) status = Meet();
  if (!status.ok()) return Explain(status);
  auto result = MeasureAll();
  if (!result.ok()) return Explain(result.status());
  return result;
}

}  // namespace

absl::Status RunNcclHopPeer(const NcclHopOptions& options) {
  STAGECOACH_ASSIGN_OR_RETURN(DeviceMemory device,
                              OpenMemory(options.devices[0], Largest(options)));
  STAGECOACH_ASSIGN_OR_RETURN(const auto nccl, OpenLibrary());
  const std::string there = absl::HexStringToBytes(options.peer_ids[0]),
                    back = absl::HexStringToBytes(options.peer_ids[1]);
  STAGECOACH_ASSIGN_OR_RETURN(auto in, nccl->OpenReceiver(there, device.memory, kPeerName));
  STAGECOACH_RETURN_IF_ERROR(in->AwaitReady());
  STAGECOACH_ASSIGN_OR_RETURN(auto out, nccl->OpenSender(back, device.memory, kPeerName));
  STAGECOACH_RETURN_IF_ERROR(out->AwaitReady());
  HopEnd end = EndOn(device, out.get(), in.get());
  return FollowHop(end);
}

absl::StatusOr<NcclHopResult> RunNcclHop(const NcclHopOptions& options) {
  return Leader(options).Run();
}

}  // namespace stagecoach
