// The subcommands of `stagecoach`. Each Add...Command declares its flags on `app` and, when it was
// chosen on the command line, puts what is to be done into `run`. Data goes to stdout, all else to
// stderr.
#ifndef STAGECOACH_TOOLS_COMMANDS_H_
#define STAGECOACH_TOOLS_COMMANDS_H_

#include <functional>

#include "absl/status/status.h"

namespace CLI {
class App;
}

namespace stagecoach {

using Command = std::function<absl::Status()>;

void AddUpCommand(CLI::App& app, Command& run);
void AddGenerateCommand(CLI::App& app, Command& run);
void AddEvalCommand(CLI::App& app, Command& run);
void AddPlanCommand(CLI::App& app, Command& run);
void AddInspectCommand(CLI::App& app, Command& run);
void AddStatusCommand(CLI::App& app, Command& run);
void AddSynthCommand(CLI::App& app, Command& run);
void AddBenchCommand(CLI::App& app, Command& run);

}  // namespace stagecoach

#endif  // STAGECOACH_TOOLS_COMMANDS_H_
