// stagecoach up: a coordinator and its workers on this machine, until Ctrl-C.
#include <fmt/format.h>
#include <signal.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <atomic>
#include <string>
#include <utility>

#include "absl/time/clock.h"
#include "tools/commands.h"
#include "tools/generate_flags.h"
#include "tools/service.h"
#include "tools/table.h"

namespace stagecoach {
namespace {

constexpr absl::Duration kServingTimeout = absl::Minutes(10);
constexpr absl::Duration kHealthInterval = absl::Milliseconds(100);

std::atomic<bool> interrupted = false;

struct UpFlags {
  ServiceFlags service;
  std::string listen = "127.0.0.1:50151";
  bool once = false;
  v1::GenerateRequest request;
};

void CatchSignals() {
  struct sigaction action = {};
  action.sa_handler = [](int) { interrupted = true; };
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

// Prints one line whenever a stage has loaded more.
class LoadProgress {
 public:
  void Show(const v1::GetStatusResponse& status) {
    if (status.state() != shown_state_) {
      shown_state_ = status.state();
      if (!status.detail().empty()) fmt::print(stderr, "[up] {}\n", status.detail());
    }
    resident_.resize(static_cast<size_t>(status.stages_size()), 0);
    for (const v1::StageStatus& s : status.stages()) {
      uint32_t& shown = resident_[s.stage() < resident_.size() ? s.stage() : 0];
      const bool done = s.resident_units() == s.units();
      if (s.resident_units() == shown || (!done && s.resident_units() < shown + s.units() / 4)) {
        continue;
      }
      shown = s.resident_units();
      fmt::print(stderr, "[stage {}] {} of {} units resident, {} of {} in {:.2f} s\n", s.stage(),
                 s.resident_units(), s.units(), FormatBytes(s.loaded_bytes()),
                 FormatBytes(s.slice_bytes()), s.load_seconds());
    }
  }

  bool complete(const v1::GetStatusResponse& status) const {
    for (const v1::StageStatus& s : status.stages()) {
      if (s.resident_units() < s.units()) return false;
    }
    return status.stages_size() > 0;
  }

 private:
  v1::ServiceState shown_state_ = v1::SERVICE_STATE_UNSPECIFIED;
  std::vector<uint32_t> resident_;
};

std::string FormatPlanTable(const v1::GetStatusResponse& status) {
  std::vector<std::vector<std::string>> rows = {
      {"stage", "worker", "layers", "slice", "backend", "address"}};
  for (const v1::StageStatus& s : status.stages()) {
    rows.push_back(
        {fmt::format("{}", s.stage()), s.worker(),
         fmt::format("{}-{}{}{}", s.first_layer(), s.last_layer() - 1,
                     s.has_embedding() ? " +embedding" : "", s.has_head() ? " +head" : ""),
         FormatBytes(s.slice_bytes()), s.backend(), s.address()});
  }
  return FormatTable(rows);
}

absl::Status WaitUntilServing(Client& client, LocalCluster& cluster) {
  LoadProgress progress;
  absl::Status status = client.WaitUntilServing(kServingTimeout, [&](const auto& answer) {
    if (answer.ok()) progress.Show(*answer);
    if (interrupted) return absl::CancelledError("interrupted");
    return cluster.Health();
  });
  if (!status.ok()) return status;
  // Serving starts before the last layer has landed; wait here only to show the whole load.
  const absl::Time deadline = absl::Now() + absl::Seconds(2);
  auto answer = client.GetStatus();
  while (answer.ok() && !progress.complete(*answer) && absl::Now() < deadline) {
    absl::SleepFor(absl::Milliseconds(50));
    answer = client.GetStatus();
    if (answer.ok()) progress.Show(*answer);
  }
  if (!answer.ok()) return answer.status();
  fmt::print(stderr, "\n{}\nserving at {}\n", FormatPlanTable(*answer), cluster.address());
  return absl::OkStatus();
}

absl::Status TellStory(Client& client, const v1::GenerateRequest& request) {
  fmt::print(stderr, "\nprompt: {}\n\n", request.text());
  auto last = StreamToStdout(client, request);
  if (!last.ok()) return last.status();
  fmt::print(stderr, "\n{}\n\n", FormatUsage(*last));
  absl::SleepFor(absl::Milliseconds(600));  // one heartbeat, which carries the stages' counters
  auto status = client.GetStatus();
  if (!status.ok()) return status.status();
  fmt::print(stderr, "{}", FormatStages(*status));
  return absl::OkStatus();
}

absl::Status RunUp(UpFlags& flags) {
  CatchSignals();
  LocalClusterOptions options = ToClusterOptions(flags.service);
  options.listen = flags.once ? "127.0.0.1:0" : flags.listen;
  options.on_log = [](const std::string& line) { fmt::print(stderr, "{}\n", line); };
  auto cluster = LocalCluster::Start(std::move(options));
  if (!cluster.ok()) return cluster.status();
  Client client((*cluster)->address());
  if (absl::Status status = WaitUntilServing(client, **cluster); !status.ok()) return status;
  if (!flags.request.text().empty()) {
    if (absl::Status status = TellStory(client, flags.request); !status.ok()) return status;
  }
  if (flags.once) return absl::OkStatus();
  fmt::print(stderr,
             "\nserving at {}; Ctrl-C ends it. Try:\n"
             "  stagecoach generate --server {} --prompt \"Once upon a time\"\n"
             "  stagecoach status --server {}\n",
             (*cluster)->address(), (*cluster)->address(), (*cluster)->address());
  while (!interrupted) {
    if (absl::Status status = (*cluster)->Health(); !status.ok()) return status;
    absl::SleepFor(kHealthInterval);
  }
  fmt::print(stderr, "[up] stopping\n");
  return absl::OkStatus();
}

}  // namespace

void AddUpCommand(CLI::App& app, Command& run) {
  auto flags = std::make_shared<UpFlags>();
  flags->service.workers = 2;
  CLI::App* command =
      app.add_subcommand("up", "Start a coordinator and its workers on this machine, and serve");
  command->add_option("--model", flags->service.model, "GGUF file")->required();
  AddPipelineFlags(*command, flags->service);
  command->add_option("--listen", flags->listen, "host:port of the coordinator; port 0 = any")
      ->capture_default_str();
  command->add_option_function<std::string>(
      "--prompt", [flags](const std::string& text) { flags->request.set_text(text); },
      "Generate this first, to show that it works");
  command->add_flag("--once", flags->once, "Exit after the prompt (or once serving)");
  AddGenerateFlags(*command, flags->request);
  command->callback([flags, &run] { run = [flags] { return RunUp(*flags); }; });
}

}  // namespace stagecoach
