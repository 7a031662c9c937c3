// stagecoach-coordinator: serves one model over the workers that join it.
#include <fmt/format.h>
#include <signal.h>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>
#include <string>

#include "coordinator/coordinator.h"
#include "coordinator/kv_flags.h"
#include "model/model_file.h"
#include "model/tokenizer.h"

namespace stagecoach {
namespace {

constexpr int kExitFailure = 1;
constexpr int kExitBadInput = 2;  // flags or model: starting again will not help
constexpr absl::Duration kDrain = absl::Seconds(3);

struct Flags {
  CoordinatorOptions coordinator;
  std::string model;
  std::string log_level = "info";
  int ready_fd = -1;
  bool die_with_parent = false;
};

void AddFlags(CLI::App& app, Flags& flags) {
  CoordinatorOptions& options = flags.coordinator;
  app.add_option("--model", flags.model, "GGUF file (of a split model: any part)")->required();
  app.add_option("--workers", options.workers, "workers to wait for = stages")
      ->capture_default_str()
      ->check(CLI::Range(1, kMaxLayers));
  app.add_option("--listen", options.listen, "host:port; port 0 takes a free one")
      ->capture_default_str();
  app.add_option("--data-listen", options.data_listen,
                 "host:port for the last stage's results; default: the same as --listen");
  app.add_option("--advertise", options.advertise,
                 "host or host:port under which workers reach the data port");
  app.add_option("--max-slots", options.max_slots, "sequences in the pipeline at once")
      ->capture_default_str();
  app.add_option("--context", options.max_context,
                 "positions of prompt and output; 0: what the model was trained for, at most 4096")
      ->capture_default_str();
  app.add_option("--step-tokens", options.max_step_tokens,
                 "rows in one step; 0: 512 if all workers are GPUs, else 256")
      ->capture_default_str();
  AddKvFlags(app, options.kv);
  app.add_option("--max-waiting", options.max_waiting, "requests queued beyond the slots")
      ->capture_default_str();
  app.add_option("--log-level", flags.log_level, "debug, info, warn, error or off")
      ->capture_default_str()
      ->check(CLI::IsMember({"debug", "info", "warn", "error", "off"}));
  app.add_option("--ready-fd", flags.ready_fd, "write host:port here once listening");
  app.add_flag("--die-with-parent", flags.die_with_parent, "end when the parent process does");
}

int Fail(int code, const absl::Status& status) {
  fmt::print(stderr, "stagecoach-coordinator: {}\n", std::string(status.message()));
  return code;
}

// From now on these signals wait for sigwait, in every thread.
sigset_t BlockSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  signal(SIGPIPE, SIG_IGN);
  return signals;
}

void Announce(const Flags& flags, const Coordinator& coordinator) {
  fmt::print(stderr, "listening on {}\n", coordinator.address());
  std::fflush(stderr);
  if (flags.ready_fd < 0) return;
  const std::string line = coordinator.address() + "\n";
  if (write(flags.ready_fd, line.data(), line.size()) != static_cast<ssize_t>(line.size())) {
    spdlog::warn("cannot write to --ready-fd {}", flags.ready_fd);
  }
  close(flags.ready_fd);
}

int Run(const Flags& flags) {
  const sigset_t signals = BlockSignals();
  if (flags.die_with_parent) {
    const pid_t parent = getppid();
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != parent) return kExitFailure;  // it has ended meanwhile
  }
  auto model = ModelFile::Open(flags.model);
  if (!model.ok()) return Fail(kExitBadInput, model.status());
  auto tokenizer = Tokenizer::Create((*model)->gguf());
  if (!tokenizer.ok()) return Fail(kExitBadInput, tokenizer.status());

  auto coordinator = Coordinator::Start(*model, std::move(*tokenizer), flags.coordinator);
  if (!coordinator.ok()) {
    const bool bad = coordinator.status().code() == absl::StatusCode::kInvalidArgument;
    return Fail(bad ? kExitBadInput : kExitFailure, coordinator.status());
  }
  Announce(flags, **coordinator);

  int received = 0;
  sigwait(&signals, &received);
  spdlog::info("signal {}: shutting down", received);
  (*coordinator)->Shutdown(kDrain);
  return 0;
}

}  // namespace
}  // namespace stagecoach

int main(int argc, char** argv) {
  CLI::App app("Splits a GGUF model over workers and serves it.", "stagecoach-coordinator");
  stagecoach::Flags flags;
  stagecoach::AddFlags(app, flags);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : stagecoach::kExitBadInput;
  }
  spdlog::set_default_logger(spdlog::stderr_color_mt("coordinator"));
  spdlog::set_pattern("%H:%M:%S.%e %^%l%$ %v");
  spdlog::set_level(spdlog::level::from_str(flags.log_level));
  return stagecoach::Run(flags);
}
