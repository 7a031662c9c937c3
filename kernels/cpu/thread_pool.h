// A fixed team of threads for loops of many short tasks, with a wake-up of a few microseconds.
#ifndef STAGECOACH_KERNELS_CPU_THREAD_POOL_H_
#define STAGECOACH_KERNELS_CPU_THREAD_POOL_H_

#include <atomic>
#include <cstdint>
#include <thread>
#include <type_traits>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace stagecoach::cpu {

// Thread-safe: a second caller at the same time runs its loop alone. Workers wait by spinning for
// at most kSpinRounds pauses, then asleep.
class ThreadPool {
 public:
  // The caller of ParallelFor is one of the `threads` >= 1 threads.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(begin, end) for ranges that cover [0, count) once, each a multiple of `grain` (the
  // last one may be shorter), from all threads, and returns when all are done. Does not allocate.
  template <typename Body>
  void ParallelFor(int count, int grain, Body&& body) {
    if (count <= 0) return;
    if (workers_.empty() || count <= grain) {
      body(0, count);
      return;
    }
    using Target = std::remove_reference_t<Body>;
    Run(
        count, grain,
        [](void* target, int begin, int end) { (*static_cast<Target*>(target))(begin, end); },
        const_cast<void*>(static_cast<const void*>(&body)));
  }

 private:
  using Function = void (*)(void* target, int begin, int end);

  void Run(int count, int grain, Function function, void* target);
  void RunRanges();
  void WorkerMain();

  // Constant after construction.
  std::vector<std::thread> workers_;

  // Synchronise themselves. The loop's description is written before `generation_` is advanced and
  // not changed until `running_` is back at 0.
  alignas(64) std::atomic<uint32_t> generation_{0};
  std::atomic<bool> stop_{false};
  alignas(64) std::atomic<int> next_{0};     // first index that nobody has taken
  alignas(64) std::atomic<int> running_{0};  // workers that have not finished this generation
  Function function_ = nullptr;
  void* target_ = nullptr;
  int count_ = 0;
  int step_ = 0;  // indices taken at once

  absl::Mutex mu_;  // held by the thread inside Run
};

}  // namespace stagecoach::cpu

#endif  // STAGECOACH_KERNELS_CPU_THREAD_POOL_H_
