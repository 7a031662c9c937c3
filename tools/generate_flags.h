// Sampling and length flags shared by the commands that generate.
#ifndef STAGECOACH_TOOLS_GENERATE_FLAGS_H_
#define STAGECOACH_TOOLS_GENERATE_FLAGS_H_

#include <string>

#include "absl/status/statusor.h"

#include "proto/inference.pb.h"

namespace CLI {
class App;
}

namespace stagecoach {

// Declares --max-tokens, --temperature, --top-k, ... writing straight into `request`, which must
// outlive the command.
void AddGenerateFlags(CLI::App& command, v1::GenerateRequest& request);

// Runs `request` on `client`, streaming the text to stdout. Returns the last event (finish reason,
// usage, timings) with all token ids of the call.
class Client;
absl::StatusOr<v1::GenerateEvent> StreamToStdout(Client& client,
                                                 const v1::GenerateRequest& request);

// "24 prompt tokens in 18.2 ms (1319 tok/s), 160 tokens in 410 ms (388 tok/s), finished: stop"
std::string FormatUsage(const v1::GenerateEvent& last);

}  // namespace stagecoach

#endif  // STAGECOACH_TOOLS_GENERATE_FLAGS_H_
