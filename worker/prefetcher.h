// Threads that load units ahead of their use: a bounded queue, worked off in order.
#ifndef STAGECOACH_WORKER_PREFETCHER_H_
#define STAGECOACH_WORKER_PREFETCHER_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace stagecoach {

// Thread-safe. Never calls `load` with its own mutex held, so callers may hold theirs.
class Prefetcher {
 public:
  using Ticket = uint64_t;  // stands for one load; unique among the queued ones
  using LoadFunction = std::function<void(Ticket ticket)>;

  // Both counts >= 1. Goes on with fewer threads, even none, if the system refuses to start them:
  // without a thread every Push is refused.
  Prefetcher(int threads, int max_queued, LoadFunction load);
  ~Prefetcher();  // Shutdown()

  // False, changing nothing, if the queue is full or after Shutdown.
  bool Push(Ticket ticket);
  // Moves a queued ticket to the front; nothing if it is not queued (any more).
  void Promote(Ticket ticket);
  // Takes a ticket out of the queue. False if it was not there: unknown, under way or done.
  bool Cancel(Ticket ticket);

  // Empties the queue, waits for the loads under way and joins the threads. Idempotent.
  void Shutdown();

 private:
  void Work();

  const size_t max_queued_;
  const LoadFunction load_;

  absl::Mutex join_mu_;
  std::vector<std::thread> threads_ ABSL_GUARDED_BY(join_mu_);

  absl::Mutex mu_;
  std::deque<Ticket> queue_ ABSL_GUARDED_BY(mu_);
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_PREFETCHER_H_
