#include "tools/bench.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <utility>

namespace stagecoach {
namespace {

std::string CpuName() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    const size_t colon = line.find(": ");
    if (line.rfind("model name", 0) == 0 && colon != std::string::npos) {
      return line.substr(colon + 2);
    }
  }
  return "unknown";
}

}  // namespace

absl::Status WriteBenchJson(const std::string& path, nlohmann::json results) {
  if (path.empty()) return absl::OkStatus();
  results["machine"] = {{"cpu", CpuName()}, {"cores", std::thread::hardware_concurrency()}};
  std::ofstream out(path, std::ios::trunc);
  out << results.dump(2) << "\n";
  if (!out.flush()) return absl::NotFoundError(fmt::format("cannot write {}", path));
  return absl::OkStatus();
}

double Median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

void AddBenchCommand(CLI::App& app, Command& run) {
  CLI::App* bench = app.add_subcommand("bench", "Measure");
  bench->require_subcommand(1);
  AddBenchDecode(*bench, run);
  AddBenchHop(*bench, run);
  AddBenchKernels(*bench, run);
  AddBenchPrefetch(*bench, run);
  AddBenchServe(*bench, run);
  AddBenchScaling(*bench, run);
  AddBenchCancel(*bench, run);
}

}  // namespace stagecoach
