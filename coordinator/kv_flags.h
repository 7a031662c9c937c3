// Flags of the KV pool, for the commands that plan one.
#ifndef STAGECOACH_COORDINATOR_KV_FLAGS_H_
#define STAGECOACH_COORDINATOR_KV_FLAGS_H_

#include <CLI/CLI.hpp>
#include <map>
#include <string>

#include "coordinator/planner.h"

namespace stagecoach {

// "f16", "f32", "q8_0".
const std::map<std::string, KvType>& KvTypeNames();

// Declares --kv-type, --kv-blocks and --kv-memory. `options` must outlive the parse.
void AddKvFlags(CLI::App& command, KvOptions& options);

}  // namespace stagecoach

#endif  // STAGECOACH_COORDINATOR_KV_FLAGS_H_
