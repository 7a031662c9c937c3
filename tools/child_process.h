// A child process whose output is read line by line.
#ifndef STAGECOACH_TOOLS_CHILD_PROCESS_H_
#define STAGECOACH_TOOLS_CHILD_PROCESS_H_

#include <sys/types.h>

#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/time.h"

namespace stagecoach {

// Thread-safe. The child dies with this object.
class ChildProcess {
 public:
  // Runs argv[0] (a path). on_line gets each line of its stdout and stderr, without the newline, on
  // a thread of this object. Errors: INTERNAL with errno's text.
  static absl::StatusOr<std::unique_ptr<ChildProcess>> Start(
      const std::vector<std::string>& argv, std::function<void(const std::string&)> on_line);
  ~ChildProcess();  // Terminate(2 s)

  pid_t pid() const { return pid_; }
  bool running();
  // "exit code 2", "signal 9 (Killed)"; empty while running.
  std::string ExitDescription();
  // The exit code, 128 + signal, or -1 while running.
  int ExitCode();

  // Waits (at most 1 s) until on_line has had the last line of a child that has ended.
  void DrainOutput();

  // SIGTERM, and SIGKILL once `grace` has passed; returns when the child has ended. Idempotent.
  void Terminate(absl::Duration grace);

 private:
  ChildProcess(pid_t pid, int output, std::function<void(const std::string&)> on_line);
  void ReadLines(int output);
  // Reaps the child if it has ended; true if so.
  bool Reap() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const pid_t pid_;
  const std::function<void(const std::string&)> on_line_;
  absl::Notification output_ended_;
  absl::Mutex mu_;
  bool ended_ ABSL_GUARDED_BY(mu_) = false;
  int wait_status_ ABSL_GUARDED_BY(mu_) = 0;
  std::thread reader_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_TOOLS_CHILD_PROCESS_H_
