#include "kernels/cpu/thread_pool.h"

#include <algorithm>

namespace stagecoach::cpu {
namespace {

// About 20 microseconds: longer than the gap between two loops of a layer.
constexpr int kSpinRounds = 1000;
// Ranges per thread, so that a thread that is held up leaves little undone.
constexpr int kRangesPerThread = 4;

void Pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

// Waits until `value` is no longer `old`.
template <typename T>
void WaitForChange(const std::atomic<T>& value, T old) {
  for (int i = 0; i < kSpinRounds; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    Pause();
  }
  value.wait(old, std::memory_order_acquire);
}

}  // namespace

ThreadPool::ThreadPool(int threads) {
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { WorkerMain(); });
}

ThreadPool::~ThreadPool() {
  stop_.store(true, std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::Run(int count, int grain, Function function, void* target) {
  if (!mu_.TryLock()) {
    function(target, 0, count);
    return;
  }
  const int ranges = threads() * kRangesPerThread;
  const int grains = (count + grain - 1) / grain;
  function_ = function;
  target_ = target;
  count_ = count;
  step_ = std::max(1, grains / ranges) * grain;
  next_.store(0, std::memory_order_relaxed);
  running_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  RunRanges();
  int running;
  while ((running = running_.load(std::memory_order_acquire)) != 0) {
    WaitForChange(running_, running);
  }
  mu_.Unlock();
}

void ThreadPool::RunRanges() {
  for (;;) {
    const int begin = next_.fetch_add(step_, std::memory_order_relaxed);
    if (begin >= count_) return;
    function_(target_, begin, std::min(count_, begin + step_));
  }
}

void ThreadPool::WorkerMain() {
  uint32_t seen = 0;
  for (;;) {
    WaitForChange(generation_, seen);
    ++seen;  // every generation waits for every worker, so none is skipped
    if (stop_.load(std::memory_order_relaxed)) return;
    RunRanges();
    if (running_.fetch_sub(1, std::memory_order_release) == 1) running_.notify_all();
  }
}

}  // namespace stagecoach::cpu
