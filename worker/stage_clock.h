// The time that a stage's steps take, each counted once though they may lie one behind the other.
#ifndef STAGECOACH_WORKER_STAGE_CLOCK_H_
#define STAGECOACH_WORKER_STAGE_CLOCK_H_

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <optional>

#include "proto/stage.pb.h"

namespace stagecoach {

// One thread; the seconds any.
class StageClock {
 public:
  using Clock = std::chrono::steady_clock;

  // A step's beginning.
  struct Step {
    Clock::time_point start;
    Clock::duration stalled{};  // ever, at that time
  };
  Step Begin() const { return {.start = Clock::now(), .stalled = stalled_}; }
  // Its input has come only now. waited: by the stage, which had nothing else to do.
  void BeginAnew(Step& step, bool waited) {
    const Step now = Begin();
    if (waited) {
      const Clock::time_point idle_since = std::max(step.start, last_end_.value_or(step.start));
      input_wait_ns_ += ToNanoseconds(now.start - idle_since);
    }
    step = now;
  }
  // It waited for weights or a channel since `start`.
  void Stalled(Clock::time_point start) { stalled_ += Clock::now() - start; }

  // The step has ended: what it took, without stalls, from the end of the one before if it began
  // earlier (then it has not stalled), and how long the stage had waited for it.
  v1::StageTiming End(const Step& step) {
    const Clock::time_point end = Clock::now();
    const bool behind = last_end_ && step.start < *last_end_;
    const Clock::time_point begin = behind ? *last_end_ : step.start;
    const Clock::duration stalled = behind ? Clock::duration{} : stalled_ - step.stalled;
    const Clock::duration compute = end - begin - stalled;
    compute_ns_ += ToNanoseconds(compute);
    v1::StageTiming timing;
    timing.set_compute_us(Microseconds(compute));
    if (last_end_) timing.set_wait_us(Microseconds(begin - *last_end_));
    last_end_ = end;
    return timing;
  }
  double compute_seconds() const { return static_cast<double>(compute_ns_) * 1e-9; }
  double input_wait_seconds() const { return static_cast<double>(input_wait_ns_) * 1e-9; }

 private:
  static int64_t ToNanoseconds(Clock::duration duration) {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(duration).count();
  }
  static uint32_t Microseconds(Clock::duration duration) {
    const int64_t us = std::chrono::duration_cast<std::chrono::microseconds>(duration).count();
    return static_cast<uint32_t>(std::clamp<int64_t>(us, 0, UINT32_MAX));
  }

  std::atomic<int64_t> compute_ns_ = 0;
  std::atomic<int64_t> input_wait_ns_ = 0;
  Clock::duration stalled_{};
  std::optional<Clock::time_point> last_end_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_STAGE_CLOCK_H_
