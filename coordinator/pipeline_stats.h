// Figures that the pipeline keeps of itself.
#ifndef STAGECOACH_COORDINATOR_PIPELINE_STATS_H_
#define STAGECOACH_COORDINATOR_PIPELINE_STATS_H_

#include <algorithm>
#include <array>
#include <cstdint>

#include "absl/time/time.h"

namespace stagecoach {

// Tokens per second over the last kWindowSeconds. Times are on any monotonic clock. Not
// thread-safe.
class TokenRate {
 public:
  static constexpr int kWindowSeconds = 10;

  void Add(absl::Duration now, uint64_t tokens) {
    Bucket& bucket = buckets_[Second(now) % buckets_.size()];
    if (bucket.second != Second(now)) bucket = {.second = Second(now), .tokens = 0};
    bucket.tokens += tokens;
  }

  double PerSecond(absl::Duration now) const {
    uint64_t tokens = 0;
    for (const Bucket& bucket : buckets_) {
      if (bucket.second + kWindowSeconds > Second(now)) tokens += bucket.tokens;
    }
    return static_cast<double>(tokens) / kWindowSeconds;
  }

 private:
  struct Bucket {
    int64_t second = 0;
    uint64_t tokens = 0;
  };
  static int64_t Second(absl::Duration now) { return absl::ToInt64Seconds(now); }

  std::array<Bucket, kWindowSeconds> buckets_ = {};
};

// How long a refused client should wait: the time in which a slot becomes free, as the requests of
// late ran. Not thread-safe.
class RetryEstimate {
 public:
  void AddRun(absl::Duration run) {
    constexpr double kWeight = 0.2;  // of the newest run
    mean_ = known_ ? mean_ * (1 - kWeight) + run * kWeight : run;
    known_ = true;
  }

  absl::Duration Wait(int slots) const {
    if (!known_) return absl::Seconds(1);
    return std::clamp(mean_ / slots, absl::Milliseconds(50), absl::Minutes(1));
  }

 private:
  absl::Duration mean_ = absl::ZeroDuration();
  bool known_ = false;
};

}  // namespace stagecoach

#endif  // STAGECOACH_COORDINATOR_PIPELINE_STATS_H_
