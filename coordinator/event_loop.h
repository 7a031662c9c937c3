// One thread that runs posted events in order, and a tick now and then.
#ifndef STAGECOACH_COORDINATOR_EVENT_LOOP_H_
#define STAGECOACH_COORDINATOR_EVENT_LOOP_H_

#include <deque>
#include <functional>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace stagecoach {

// Thread-safe. The queue has no bound of its own: whoever posts on behalf of a peer must keep the
// number of its outstanding events bounded.
class EventLoop {
 public:
  // on_tick (may be empty) runs on the loop's thread, every `interval` or soon after.
  explicit EventLoop(absl::Duration interval = absl::InfiniteDuration(),
                     std::function<void()> on_tick = nullptr);
  ~EventLoop();  // Stop()

  // Starts the thread; what is posted earlier waits for it. Call at most once, not after Stop.
  void Start();
  // False, and the event is dropped, after Stop.
  bool Post(std::function<void()> event);
  // Runs what has been posted (if started), then joins. Idempotent. Not from the loop's own thread.
  void Stop();

 private:
  void Run();
  bool Wakes() const ABSL_SHARED_LOCKS_REQUIRED(mu_) { return stopping_ || !events_.empty(); }

  const absl::Duration interval_;
  const std::function<void()> on_tick_;

  absl::Mutex mu_;
  std::deque<std::function<void()>> events_ ABSL_GUARDED_BY(mu_);
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;

  absl::Mutex join_mu_;
  std::thread thread_ ABSL_GUARDED_BY(join_mu_);
};

}  // namespace stagecoach

#endif  // STAGECOACH_COORDINATOR_EVENT_LOOP_H_
