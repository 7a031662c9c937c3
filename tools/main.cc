// `stagecoach`: the command line of the project.
#include <fmt/format.h>
#include <signal.h>

#include <CLI/CLI.hpp>
#include <cstdio>

#include "model/model_error.h"
#include "tools/commands.h"

namespace {

constexpr int kExitFailure = 1;
constexpr int kExitBadInput = 2;  // flags, files and requests that cannot work as given

int ExitCode(const absl::Status& status) {
  if (status.ok()) return 0;
  if (stagecoach::GetModelError(status).has_value()) return kExitBadInput;
  switch (status.code()) {
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kOutOfRange:
    case absl::StatusCode::kUnimplemented:
      return kExitBadInput;
    default:
      return kExitFailure;
  }
}

}  // namespace

int main(int argc, char** argv) {
  signal(SIGPIPE, SIG_IGN);
  CLI::App app("Pipeline-parallel serving of GGUF language models", "stagecoach");
  app.require_subcommand(1);
  stagecoach::Command run;
  stagecoach::AddUpCommand(app, run);
  stagecoach::AddGenerateCommand(app, run);
  stagecoach::AddEvalCommand(app, run);
  stagecoach::AddPlanCommand(app, run);
  stagecoach::AddInspectCommand(app, run);
  stagecoach::AddStatusCommand(app, run);
  stagecoach::AddSynthCommand(app, run);
  stagecoach::AddBenchCommand(app, run);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kExitBadInput;
  }
  const absl::Status status = run();
  if (!status.ok()) {
    fmt::print(stderr, "stagecoach: {}\n", std::string(status.message()));
  }
  return ExitCode(status);
}
