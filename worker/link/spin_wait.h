// A short wait that keeps the processor awake: on many machines, virtual ones above all, waking a
// sleeping one costs more than the hop that is being waited for.
#ifndef STAGECOACH_WORKER_LINK_SPIN_WAIT_H_
#define STAGECOACH_WORKER_LINK_SPIN_WAIT_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

namespace stagecoach {

// Longer than a stage of a small model takes, so that a stream that flows never waits for a
// wake-up; short enough to cost nothing once it has stopped.
inline constexpr std::chrono::microseconds kSpinTime{1000};
// The same for a stage of several, whose frame comes when a token has gone through all the others.
inline constexpr std::chrono::microseconds kStageSpinTime{5000};

// A yield that takes longer let another thread run: this processor is wanted.
inline constexpr std::chrono::microseconds kLongYield{20};

// What is done then.
enum class WhenWanted {
  kSleep,  // the processor is better left to the others
  kStay,   // one of several stages: all the others wait for its frames in turn, and a wake-up
           // would be in the way of each of them
};

// Returns when `arrivals` differs from `seen`, after kStageSpinTime (kStay), or after kSpinTime or
// when others want the processor (kSleep).
inline void SpinUntilArrival(const std::atomic<uint64_t>& arrivals, uint64_t seen,
                             WhenWanted when_wanted) {
  auto now = std::chrono::steady_clock::now();
  const auto end = now + (when_wanted == WhenWanted::kStay ? kStageSpinTime : kSpinTime);
  while (arrivals.load(std::memory_order_acquire) == seen && now < end) {
    const auto before = now;
    std::this_thread::yield();
    now = std::chrono::steady_clock::now();
    if (when_wanted == WhenWanted::kSleep && now - before > kLongYield) return;
  }
}

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_LINK_SPIN_WAIT_H_
