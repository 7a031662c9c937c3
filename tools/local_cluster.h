// A coordinator and its workers as child processes on this machine.
#ifndef STAGECOACH_TOOLS_LOCAL_CLUSTER_H_
#define STAGECOACH_TOOLS_LOCAL_CLUSTER_H_

#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "tools/child_process.h"

namespace stagecoach {

struct LocalClusterOptions {
  std::string model;
  int workers = 2;
  int expected_workers = 0;            // told to the coordinator; 0 = workers
  int threads = 0;                     // per worker; 0 = the machine's cores shared out evenly
  std::string listen = "127.0.0.1:0";  // of the coordinator
  int max_slots = 64;
  int context = 0;  // 0 = the coordinator's default
  // Handed through, with the worker's index for each "{}": --device cuda:{}
  std::vector<std::string> worker_flags;
  std::vector<std::string> worker_environment;  // NAME=VALUE, likewise
  std::vector<std::string> coordinator_flags;   // handed through
  std::string bin_dir;                          // where the binaries lie; empty = beside this one
  bool restart_workers = true;                  // a worker that ends is started again after 200 ms
  std::function<void(const std::string&)> on_log;  // each line, prefixed; any thread; may be empty
};

// Thread-safe. The processes end with this object.
class LocalCluster {
 public:
  // Starts all processes and returns once the coordinator listens. Errors: INVALID_ARGUMENT with
  // the first process's own message when it refused its input (exit code 2: bad flags or model),
  // INTERNAL otherwise.
  static absl::StatusOr<std::unique_ptr<LocalCluster>> Start(LocalClusterOptions options);
  ~LocalCluster();

  const std::string& address() const { return address_; }  // host:port of the coordinator
  pid_t worker_pid(int index);
  pid_t coordinator_pid() const { return coordinator_->pid(); }

  // Ok while the cluster can still come to serve; else why not (a process refused its input, the
  // coordinator ended).
  absl::Status Health();
  int restarts();

 private:
  explicit LocalCluster(LocalClusterOptions options);
  void Log(const std::string& process, const std::string& line);
  absl::Status StartCoordinator();
  absl::Status StartWorker(int index) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Supervise();
  std::string LastLine(const std::string& process);

  const LocalClusterOptions options_;
  std::string bin_dir_;
  std::string address_;  // constant after Start

  std::unique_ptr<ChildProcess> coordinator_;
  absl::Mutex mu_;
  std::vector<std::unique_ptr<ChildProcess>> workers_ ABSL_GUARDED_BY(mu_);
  absl::Status failure_ ABSL_GUARDED_BY(mu_);
  int restarts_ ABSL_GUARDED_BY(mu_) = 0;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;

  absl::Mutex log_mu_;
  std::string listening_ ABSL_GUARDED_BY(log_mu_);  // parsed from the coordinator's log
  std::deque<std::pair<std::string, std::string>> recent_ ABSL_GUARDED_BY(log_mu_);
  std::thread supervisor_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_TOOLS_LOCAL_CLUSTER_H_
