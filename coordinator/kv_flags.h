// Flags of the KV pool, for the commands that plan one.
#ifndef STAGECOACH_COORDINATOR_KV_FLAGS_H_
#define STAGECOACH_COORDINATOR_KV_FLAGS_H_

#include <CLI/CLI.hpp>

#include "coordinator/planner.h"

namespace stagecoach {

// Declares --kv-type, --kv-blocks and --kv-memory. `options` must outlive the parse.
void AddKvFlags(CLI::App& command, KvOptions& options);

}  // namespace stagecoach

#endif  // STAGECOACH_COORDINATOR_KV_FLAGS_H_
