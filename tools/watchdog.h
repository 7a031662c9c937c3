// Ends a process in which a call that knows no deadline does not return.
#ifndef STAGECOACH_TOOLS_WATCHDOG_H_
#define STAGECOACH_TOOLS_WATCHDOG_H_

#include <functional>
#include <string>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace stagecoach {

// Thread-safe.
class Watchdog {
 public:
  // look: called every few milliseconds on a thread of this object. expired: called once, on that
  // thread, with what was begun last and took too long; expected not to return.
  Watchdog(std::function<void()> look, std::function<void(const std::string& what)> expired);
  ~Watchdog();  // waits for a call of look under way

  // From now on `what` is under way, for `limit` at most.
  void Begin(const std::string& what, absl::Duration limit);

 private:
  void Run();

  const std::function<void()> look_;
  const std::function<void(const std::string&)> expired_;
  absl::Mutex mu_;
  std::string what_ ABSL_GUARDED_BY(mu_);
  absl::Time deadline_ ABSL_GUARDED_BY(mu_) = absl::InfiniteFuture();
  bool ended_ ABSL_GUARDED_BY(mu_) = false;
  std::thread thread_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_TOOLS_WATCHDOG_H_
