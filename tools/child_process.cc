#include "tools/child_process.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <spawn.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>

#include "absl/status/status.h"
#include "absl/time/clock.h"

extern char** environ;

namespace stagecoach {

absl::StatusOr<std::unique_ptr<ChildProcess>> ChildProcess::Start(
    const std::vector<std::string>& argv, std::function<void(const std::string&)> on_line) {
  int fds[2];
  if (pipe2(fds, O_CLOEXEC) != 0) {
    return absl::InternalError(fmt::format("pipe: {}", strerror(errno)));
  }
  std::vector<char*> args;
  for (const std::string& arg : argv) args.push_back(const_cast<char*>(arg.c_str()));
  args.push_back(nullptr);

  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&actions, fds[1], STDOUT_FILENO);
  posix_spawn_file_actions_adddup2(&actions, fds[1], STDERR_FILENO);
  // A group of its own: Ctrl-C in a terminal reaches the parent alone, which ends its children.
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP);
  pid_t pid = 0;
  const int error = posix_spawn(&pid, args[0], &actions, &attributes, args.data(), environ);
  posix_spawnattr_destroy(&attributes);
  posix_spawn_file_actions_destroy(&actions);
  close(fds[1]);
  if (error != 0) {
    close(fds[0]);
    return absl::InternalError(fmt::format("cannot start {}: {}", argv[0], strerror(error)));
  }
  return std::unique_ptr<ChildProcess>(new ChildProcess(pid, fds[0], std::move(on_line)));
}

ChildProcess::ChildProcess(pid_t pid, int output, std::function<void(const std::string&)> on_line)
    : pid_(pid), on_line_(std::move(on_line)), reader_([this, output] { ReadLines(output); }) {}

ChildProcess::~ChildProcess() {
  Terminate(absl::Seconds(2));
  reader_.join();
}

void ChildProcess::ReadLines(int output) {
  std::string pending;
  char buffer[4096];
  while (true) {
    const ssize_t n = read(output, buffer, sizeof(buffer));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) break;
    pending.append(buffer, static_cast<size_t>(n));
    size_t start = 0;
    for (size_t end; (end = pending.find('\n', start)) != std::string::npos; start = end + 1) {
      on_line_(pending.substr(start, end - start));
    }
    pending.erase(0, start);
  }
  if (!pending.empty()) on_line_(pending);
  close(output);
  output_ended_.Notify();
}

void ChildProcess::DrainOutput() { output_ended_.WaitForNotificationWithTimeout(absl::Seconds(1)); }

bool ChildProcess::Reap() {
  if (ended_) return true;
  int status = 0;
  const pid_t reaped = waitpid(pid_, &status, WNOHANG);
  if (reaped == pid_) {
    ended_ = true;
    wait_status_ = status;
  }
  return ended_;
}

bool ChildProcess::running() {
  absl::MutexLock lock(&mu_);
  return !Reap();
}

std::string ChildProcess::ExitDescription() {
  absl::MutexLock lock(&mu_);
  if (!Reap()) return "";
  if (WIFSIGNALED(wait_status_)) {
    const int signal = WTERMSIG(wait_status_);
    return fmt::format("signal {} ({})", signal, strsignal(signal));
  }
  return fmt::format("exit code {}", WEXITSTATUS(wait_status_));
}

int ChildProcess::ExitCode() {
  absl::MutexLock lock(&mu_);
  if (!Reap()) return -1;
  return WIFSIGNALED(wait_status_) ? 128 + WTERMSIG(wait_status_) : WEXITSTATUS(wait_status_);
}

void ChildProcess::Terminate(absl::Duration grace) {
  const absl::Time deadline = absl::Now() + grace;
  bool killed = false;
  {
    absl::MutexLock lock(&mu_);
    if (Reap()) return;
    kill(pid_, SIGTERM);
  }
  while (running()) {
    if (!killed && absl::Now() > deadline) {
      absl::MutexLock lock(&mu_);
      if (!ended_) kill(pid_, SIGKILL);
      killed = true;
    }
    absl::SleepFor(absl::Milliseconds(5));
  }
}

}  // namespace stagecoach
