#include "tools/local_cluster.h"

#include <fmt/format.h>
#include <signal.h>

#include <algorithm>
#include <filesystem>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/time/clock.h"

namespace stagecoach {
namespace {

constexpr size_t kRecentLines = 200;
constexpr int kExitBadInput = 2;  // what the binaries end with for bad flags or a bad model
constexpr absl::Duration kStartTimeout = absl::Seconds(30);
constexpr absl::Duration kRestartDelay = absl::Milliseconds(200);

std::string OwnDirectory() {
  std::error_code error;
  return std::filesystem::read_symlink("/proc/self/exe", error).parent_path().string();
}

int ThreadsPerWorker(const LocalClusterOptions& options) {
  if (options.threads > 0) return options.threads;
  const int cores = static_cast<int>(std::thread::hardware_concurrency());
  return std::max(1, cores / std::max(1, options.workers));
}

std::string WithIndex(std::string text, int index) {
  constexpr std::string_view kPlace = "{}";
  for (size_t at; (at = text.find(kPlace)) != std::string::npos;) {
    text.replace(at, kPlace.size(), std::to_string(index));
  }
  return text;
}

}  // namespace

absl::StatusOr<std::unique_ptr<LocalCluster>> LocalCluster::Start(LocalClusterOptions options) {
  if (options.workers < 1) return absl::InvalidArgumentError("--workers must be at least 1");
  std::unique_ptr<LocalCluster> cluster(new LocalCluster(std::move(options)));
  if (absl::Status status = cluster->StartCoordinator(); !status.ok()) return status;
  {
    absl::MutexLock lock(&cluster->mu_);
    cluster->workers_.resize(static_cast<size_t>(cluster->options_.workers));
    for (int i = 0; i < cluster->options_.workers; ++i) {
      if (absl::Status status = cluster->StartWorker(i); !status.ok()) return status;
    }
  }
  cluster->supervisor_ = std::thread([raw = cluster.get()] { raw->Supervise(); });
  return cluster;
}

LocalCluster::LocalCluster(LocalClusterOptions options)
    : options_(std::move(options)),
      bin_dir_(options_.bin_dir.empty() ? OwnDirectory() : options_.bin_dir) {}

LocalCluster::~LocalCluster() {
  {
    absl::MutexLock lock(&mu_);
    stopping_ = true;
  }
  if (supervisor_.joinable()) supervisor_.join();
  coordinator_.reset();  // first, or it would report each worker that ends as lost
  absl::MutexLock lock(&mu_);
  for (auto& worker : workers_) {
    if (worker != nullptr && worker->running()) kill(worker->pid(), SIGTERM);  // all at once
  }
  workers_.clear();
}

void LocalCluster::Log(const std::string& process, const std::string& line) {
  static constexpr std::string_view kListening = "listening on ";
  {
    absl::MutexLock lock(&log_mu_);
    recent_.emplace_back(process, line);
    if (recent_.size() > kRecentLines) recent_.pop_front();
    const size_t at = line.find(kListening);
    if (process == "coordinator" && listening_.empty() && at != std::string::npos) {
      const size_t start = at + kListening.size();
      listening_ = line.substr(start, line.find_first_of(" ,", start) - start);
    }
  }
  if (!options_.on_log) return;
  const bool prefixed = !line.empty() && line[0] == '[';
  options_.on_log(prefixed ? line : fmt::format("[{}] {}", process, line));
}

std::string LocalCluster::LastLine(const std::string& process) {
  absl::MutexLock lock(&log_mu_);
  for (auto it = recent_.rbegin(); it != recent_.rend(); ++it) {
    const bool hint = it->second.rfind("Run with --help", 0) == 0;  // follows the reason
    if (it->first == process && !it->second.empty() && !hint) return it->second;
  }
  return "(no output)";
}

absl::Status LocalCluster::StartCoordinator() {
  const int expected = options_.expected_workers > 0 ? options_.expected_workers : options_.workers;
  std::vector<std::string> argv = {bin_dir_ + "/stagecoach-coordinator",
                                   "--model",
                                   options_.model,
                                   "--workers",
                                   std::to_string(expected),
                                   "--listen",
                                   options_.listen,
                                   "--max-slots",
                                   std::to_string(options_.max_slots),
                                   "--die-with-parent"};
  if (options_.context > 0) {
    argv.insert(argv.end(), {"--context", std::to_string(options_.context)});
  }
  argv.insert(argv.end(), options_.coordinator_flags.begin(), options_.coordinator_flags.end());
  auto started = ChildProcess::Start(argv, [this](const std::string& l) { Log("coordinator", l); });
  if (!started.ok()) return started.status();
  coordinator_ = std::move(*started);

  const absl::Time deadline = absl::Now() + kStartTimeout;
  while (absl::Now() < deadline) {
    {
      absl::MutexLock lock(&log_mu_);
      address_ = listening_;
    }
    if (!address_.empty()) return absl::OkStatus();
    if (absl::Status status = Health(); !status.ok()) return status;
    absl::SleepFor(absl::Milliseconds(5));
  }
  return absl::InternalError("the coordinator did not listen within 30 s");
}

absl::Status LocalCluster::StartWorker(int index) {
  const std::string name = fmt::format("w{}", index);
  std::vector<std::string> argv;
  if (!options_.worker_environment.empty()) argv.push_back("/usr/bin/env");
  for (const std::string& variable : options_.worker_environment) {
    argv.push_back(WithIndex(variable, index));
  }
  argv.insert(argv.end(), {bin_dir_ + "/stagecoach-worker", "--coordinator", address_, "--model",
                           options_.model, "--name", name, "--threads",
                           std::to_string(ThreadsPerWorker(options_)), "--die-with-parent"});
  for (const std::string& flag : options_.worker_flags) argv.push_back(WithIndex(flag, index));
  auto started = ChildProcess::Start(argv, [this, name](const std::string& l) { Log(name, l); });
  if (!started.ok()) return started.status();
  workers_[static_cast<size_t>(index)] = std::move(*started);
  return absl::OkStatus();
}

void LocalCluster::Supervise() {
  while (true) {
    absl::SleepFor(absl::Milliseconds(20));
    for (int i = 0; i < options_.workers; ++i) {
      absl::MutexLock lock(&mu_);
      if (stopping_) return;
      ChildProcess& worker = *workers_[static_cast<size_t>(i)];
      if (!failure_.ok() || worker.running()) continue;
      const std::string name = fmt::format("w{}", i);
      worker.DrainOutput();
      if (worker.ExitCode() == kExitBadInput) {
        failure_ = absl::InvalidArgumentError(LastLine(name));
      } else if (!options_.restart_workers) {
        failure_ =
            absl::InternalError(fmt::format("worker {} ended: {}", name, worker.ExitDescription()));
      } else {
        Log("up",
            fmt::format("worker {} ended ({}); starting it again", name, worker.ExitDescription()));
        mu_.AwaitWithTimeout(absl::Condition(&stopping_), kRestartDelay);
        if (stopping_) return;
        ++restarts_;
        if (absl::Status status = StartWorker(i); !status.ok()) failure_ = status;
      }
    }
  }
}

pid_t LocalCluster::worker_pid(int index) {
  absl::MutexLock lock(&mu_);
  return workers_[static_cast<size_t>(index)]->pid();
}

absl::Status LocalCluster::Health() {
  if (!coordinator_->running()) {
    coordinator_->DrainOutput();
    const std::string line = LastLine("coordinator");
    if (coordinator_->ExitCode() == kExitBadInput) return absl::InvalidArgumentError(line);
    return absl::InternalError(
        fmt::format("the coordinator ended ({}): {}", coordinator_->ExitDescription(), line));
  }
  absl::MutexLock lock(&mu_);
  return failure_;
}

int LocalCluster::restarts() {
  absl::MutexLock lock(&mu_);
  return restarts_;
}

}  // namespace stagecoach
