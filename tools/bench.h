// What the benchmarks share: subcommands and JSON output.
#ifndef STAGECOACH_TOOLS_BENCH_H_
#define STAGECOACH_TOOLS_BENCH_H_

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "tools/commands.h"

namespace stagecoach {

void AddBenchDecode(CLI::App& bench, Command& run);
void AddBenchHop(CLI::App& bench, Command& run);
void AddBenchKernels(CLI::App& bench, Command& run);
void AddBenchPrefetch(CLI::App& bench, Command& run);
void AddBenchServe(CLI::App& bench, Command& run);
void AddBenchScaling(CLI::App& bench, Command& run);
void AddBenchCancel(CLI::App& bench, Command& run);

// Writes `results` to `path` (nothing if it is empty), with the machine it was measured on.
absl::Status WriteBenchJson(const std::string& path, nlohmann::json results);

double Median(std::vector<double> values);  // of at least one value

}  // namespace stagecoach

#endif  // STAGECOACH_TOOLS_BENCH_H_
