// stagecoach bench kernels: each single operation of a device, checked against the float64
// reference and then timed, with its share of what the device reads or multiplies at most, measured
// in the same run.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "kernels/conformance.h"
#include "kernels/cpu/read_bandwidth.h"
#include "kernels/device.h"
#include "model/status_macros.h"
#include "model/tensor_type.h"
#include "tools/bench.h"
#include "tools/local_stage.h"

namespace stagecoach {
namespace {

constexpr int kBlockColumns = 256;  // of the types with the longest blocks
constexpr uint64_t kBandwidthBytes = uint64_t{512} << 20;

struct BenchKernelsFlags {
  std::string device = "cpu";
  int threads = 1;
  std::vector<std::string> shapes;
  TimingOptions timing;
  std::string json;
};

struct Ceilings {
  double bandwidth = 0;  // bytes per second
  DevicePeaks peaks;
};

// Which ceiling bounds an operation, and how near it came: the time that it would take there over
// the time that it took.
struct Share {
  const char* bound = "memory";
  double share = 0;
};
Share ShareOfCeiling(const TimingResult& result, const Ceilings& ceilings) {
  const double peak = result.int8 ? ceilings.peaks.int8 : ceilings.peaks.floats;
  const double reading = static_cast<double>(result.bytes) / ceilings.bandwidth;
  const double computing = peak > 0 ? static_cast<double>(result.flops) / peak : 0;
  return {computing > reading ? "compute" : "memory",
          std::max(reading, computing) / result.seconds};
}

void PrintHeader() {
  fmt::print("{:9} {:5} {:20} {:>5} {:>11} {:>9} {:>9}  {}\n", "operation", "type", "shape", "rows",
             "us", "GB/s", "TFLOP/s", "of ceiling");
}

void PrintRow(const TimingResult& result, const Ceilings& ceilings) {
  fmt::print("{:9} {:5} {:20} {:>5} ", result.op, result.type, result.shape, result.rows);
  if (!result.error.empty()) {
    fmt::print("{}\n", result.error);
  } else {
    const Share share = ShareOfCeiling(result, ceilings);
    fmt::print("{:>11.2f} {:>9.1f} {:>9}  {:.0f}% {}\n", 1e6 * result.seconds,
               1e-9 * static_cast<double>(result.bytes) / result.seconds,
               result.flops == 0 ? ""
                                 : fmt::format("{:.3f}", 1e-12 * static_cast<double>(result.flops) /
                                                             result.seconds),
               100 * share.share, share.bound);
  }
  std::fflush(stdout);
}

nlohmann::json ToJson(const TimingResult& result, const Ceilings& ceilings) {
  nlohmann::json row = {{"op", result.op},     {"type", result.type},   {"shape", result.shape},
                        {"rows", result.rows}, {"bytes", result.bytes}, {"flops", result.flops}};
  if (!result.error.empty()) {
    row["error"] = result.error;
    return row;
  }
  const Share share = ShareOfCeiling(result, ceilings);
  row["seconds"] = result.seconds;
  row["bytes_per_second"] = static_cast<double>(result.bytes) / result.seconds;
  row["flops_per_second"] = static_cast<double>(result.flops) / result.seconds;
  row["bound"] = share.bound;
  row["ceiling_share"] = share.share;
  return row;
}

// "4096x14336": outputs, columns.
absl::StatusOr<MatrixShape> ParseShape(const std::string& text) {
  MatrixShape shape;
  const char* const end = text.data() + text.size();
  const auto n = std::from_chars(text.data(), end, shape.n);
  if (n.ec == std::errc() && n.ptr != end && *n.ptr == 'x') {
    const auto k = std::from_chars(n.ptr + 1, end, shape.k);
    if (k.ec == std::errc() && k.ptr == end && shape.n > 0 && shape.k > 0 &&
        shape.k % kBlockColumns == 0) {
      return shape;
    }
  }
  return absl::InvalidArgumentError(fmt::format(
      "'{}' is no shape: give outputs x columns, columns in multiples of {}, as in 4096x14336",
      text, kBlockColumns));
}

absl::Status RunBenchKernels(BenchKernelsFlags& flags) {
  if (!flags.shapes.empty()) flags.timing.shapes.clear();
  for (const std::string& text : flags.shapes) {
    STAGECOACH_ASSIGN_OR_RETURN(flags.timing.shapes.emplace_back(), ParseShape(text));
  }
  for (std::string& type : flags.timing.types) {
    const std::optional<TensorType> parsed = ParseTensorType(type);
    if (!parsed) return absl::InvalidArgumentError("there is no type " + type);
    type = GetTensorTypeInfo(*parsed).name;  // q4_k: Q4_K
  }
  STAGECOACH_ASSIGN_OR_RETURN(const std::unique_ptr<Backend> backend,
                              OpenDeviceFlag(flags.device, flags.threads));
  Ceilings ceilings;
  if (backend->info().kind == "cpu") {  // more thoroughly than a worker at its start
    ceilings.bandwidth = MeasureReadBandwidth(flags.threads, kBandwidthBytes);
  } else {
    STAGECOACH_ASSIGN_OR_RETURN(ceilings.bandwidth, MeasureDeviceBandwidth(*backend, 0));
  }
  STAGECOACH_ASSIGN_OR_RETURN(ceilings.peaks, MeasureDevicePeaks(*backend, flags.threads));
  fmt::print("{}: reads {:.1f} GB/s; multiplies and adds {:.3f} T/s of int8, {:.3f} T/s of {}\n\n",
             backend->info().description, 1e-9 * ceilings.bandwidth, 1e-12 * ceilings.peaks.int8,
             1e-12 * ceilings.peaks.floats, backend->info().kind == "cpu" ? "floats" : "halves");
  nlohmann::json report = {{"benchmark", "kernels"},
                           {"device", flags.device},
                           {"description", backend->info().description},
                           {"kernel_revision", backend->info().kernel_revision},
                           {"read_bandwidth", ceilings.bandwidth},
                           {"peak_int8_per_second", ceilings.peaks.int8},
                           {"peak_float_per_second", ceilings.peaks.floats},
                           {"rows", nlohmann::json::array()}};
  PrintHeader();
  int wrong = 0;
  TimeConformance(*backend, flags.timing, [&](const TimingResult& result) {
    PrintRow(result, ceilings);
    report["rows"].push_back(ToJson(result, ceilings));
    wrong += result.error.starts_with("WRONG") ? 1 : 0;
  });
  STAGECOACH_RETURN_IF_ERROR(WriteBenchJson(flags.json, report));
  if (report["rows"].empty()) {
    return absl::InvalidArgumentError("no operation fits --ops and --types");
  }
  if (wrong == 0) return absl::OkStatus();
  return absl::DataLossError(fmt::format("{} operations computed something wrong", wrong));
}

}  // namespace

void AddBenchKernels(CLI::App& bench, Command& run) {
  auto flags = std::make_shared<BenchKernelsFlags>();
  CLI::App* command =
      bench.add_subcommand("kernels", "Single operations: checked, then timed from cold caches");
  command->add_option("--device", flags->device, "cpu, cuda:N or auto")->capture_default_str();
  command->add_option("--threads", flags->threads, "Of the CPU")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  command->add_option("--ops", flags->timing.filter,
                      "Only operations whose name contains this: MatMul, RmsNorm, SwiGlu, Rope, "
                      "Attention");
  command->add_option("--types", flags->timing.types, "Of weights and KV; default: all")
      ->delimiter(',');
  command
      ->add_option("--shapes", flags->shapes,
                   "Of products, outputs x columns; default: 4096x4096,14336x4096,4096x14336")
      ->delimiter(',');
  command->add_option("--rows", flags->timing.rows, "Of activations")
      ->delimiter(',')
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  command
      ->add_option("--seconds", flags->timing.seconds_per_case,
                   "Measured at least of each, in 5 to 30 runs")
      ->check(CLI::Range(0.0, 60.0))
      ->capture_default_str();
  command->add_option("--json", flags->json, "Write the results here too");
  command->callback([flags, &run] { run = [flags] { return RunBenchKernels(*flags); }; });
}

}  // namespace stagecoach
