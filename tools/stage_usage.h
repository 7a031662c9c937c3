// How busy the stages of a service were during a measurement, and what memory it took.
#ifndef STAGECOACH_TOOLS_STAGE_USAGE_H_
#define STAGECOACH_TOOLS_STAGE_USAGE_H_

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "tools/service.h"

namespace stagecoach {

// Counters of the stages at one moment at which the service is idle: waits until the heartbeats
// have told of everything.
struct StageCounters {
  std::vector<double> compute_seconds;  // per stage
};
absl::StatusOr<StageCounters> ReadIdleCounters(Client& client);

// Share of `seconds` that each stage computed; the rest is its bubble.
std::vector<double> BusyShares(const StageCounters& before, const StageCounters& after,
                               double seconds);

// Samples the resident memory of the coordinator and the workers of a private cluster once a
// second, on a thread of its own, until destroyed.
class MemoryWatch {
 public:
  explicit MemoryWatch(LocalCluster* cluster, int workers);  // nothing is sampled without a cluster
  ~MemoryWatch();
  MemoryWatch(const MemoryWatch&) = delete;
  MemoryWatch& operator=(const MemoryWatch&) = delete;

  struct Trend {
    double last_bytes = 0;
    double bytes_per_minute = 0;  // least squares over the second half
  };
  Trend Stop();  // once

 private:
  std::vector<pid_t> pids_;
  std::vector<double> bytes_;  // the thread's until joined
  std::atomic<bool> stopping_ = false;
  std::thread thread_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_TOOLS_STAGE_USAGE_H_
