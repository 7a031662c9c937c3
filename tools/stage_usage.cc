#include "tools/stage_usage.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>

#include "absl/time/clock.h"

namespace stagecoach {
namespace {

constexpr absl::Duration kHeartbeats = absl::Milliseconds(1200);  // two, and some
constexpr absl::Duration kMemoryInterval = absl::Seconds(1);

double ResidentBytes(pid_t pid) {
  std::ifstream statm(fmt::format("/proc/{}/statm", pid));
  double total = 0, resident = 0;
  statm >> total >> resident;
  return resident * static_cast<double>(::sysconf(_SC_PAGESIZE));
}

}  // namespace

absl::StatusOr<StageCounters> ReadIdleCounters(Client& client) {
  absl::SleepFor(kHeartbeats);
  const auto status = client.GetStatus();
  if (!status.ok()) return status.status();
  StageCounters counters;
  for (const v1::StageStatus& stage : status->stages()) {
    counters.compute_seconds.push_back(stage.compute_seconds());
  }
  return counters;
}

std::vector<double> BusyShares(const StageCounters& before, const StageCounters& after,
                               double seconds) {
  std::vector<double> shares;
  const size_t stages = std::min(before.compute_seconds.size(), after.compute_seconds.size());
  for (size_t i = 0; i < stages; ++i) {
    shares.push_back((after.compute_seconds[i] - before.compute_seconds[i]) / seconds);
  }
  return shares;
}

MemoryWatch::MemoryWatch(LocalCluster* cluster, int workers) {
  if (cluster == nullptr) return;
  pids_.push_back(cluster->coordinator_pid());
  for (int i = 0; i < workers; ++i) pids_.push_back(cluster->worker_pid(i));
  thread_ = std::thread([this] {
    while (!stopping_) {
      double sum = 0;
      for (const pid_t pid : pids_) sum += ResidentBytes(pid);
      bytes_.push_back(sum);
      absl::SleepFor(kMemoryInterval);
    }
  });
}

MemoryWatch::~MemoryWatch() {
  stopping_ = true;
  if (thread_.joinable()) thread_.join();
}

MemoryWatch::Trend MemoryWatch::Stop() {
  stopping_ = true;
  if (thread_.joinable()) thread_.join();
  const std::vector<double> half(bytes_.begin() + static_cast<std::ptrdiff_t>(bytes_.size() / 2),
                                 bytes_.end());
  if (half.size() < 2) return {};
  const double n = static_cast<double>(half.size());
  double x = 0, y = 0, xx = 0, xy = 0;
  for (size_t i = 0; i < half.size(); ++i) {
    const double t = static_cast<double>(i);
    x += t;
    y += half[i];
    xx += t * t;
    xy += t * half[i];
  }
  const double per_interval = (n * xy - x * y) / (n * xx - x * x);
  return {.last_bytes = half.back(),
          .bytes_per_minute = per_interval * (absl::Minutes(1) / kMemoryInterval)};
}

}  // namespace stagecoach
