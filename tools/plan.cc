// stagecoach plan: how a model would be split, without starting anything.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <charconv>
#include <nlohmann/json.hpp>
#include <string>
#include <system_error>
#include <vector>

#include "coordinator/kv_flags.h"
#include "coordinator/planner.h"
#include "model/model_file.h"
#include "tools/commands.h"
#include "tools/table.h"

namespace stagecoach {
namespace {

struct PlanFlags {
  std::string model;
  int workers = 0;
  std::vector<std::string> worker;
  std::string memory = "1TB";
  std::string weight_budget;
  std::string load_rate;
  int max_slots = 64;
  int context = 4096;
  int step_tokens = 256;
  KvOptions kv;
  bool json = false;
};

// BYTES or N%, as of stagecoach-worker --weight-budget.
absl::Status SetWeightBudget(const std::string& text, WorkerCapacity& worker) {
  if (text.ends_with('%')) {
    const auto [end, error] =
        std::from_chars(text.data(), text.data() + text.size() - 1, worker.weight_budget_percent);
    const bool whole = error == std::errc() && end == text.data() + text.size() - 1;
    if (whole && worker.weight_budget_percent > 0) return absl::OkStatus();
    return absl::InvalidArgumentError(
        fmt::format("--weight-budget: '{}' is not a percentage above 0", text));
  }
  const auto bytes = ParseBytes(text);
  if (bytes.ok()) worker.weight_budget_bytes = *bytes;
  return bytes.status();
}

// NAME:MEMORY[:BYTES_PER_SECOND]
absl::StatusOr<WorkerCapacity> ParseWorker(const std::string& text) {
  const size_t colon = text.find(':');
  if (colon == std::string::npos || colon == 0) {
    return absl::InvalidArgumentError(
        fmt::format("--worker '{}' must be NAME:MEMORY or NAME:MEMORY:BANDWIDTH", text));
  }
  WorkerCapacity capacity;
  capacity.worker = text.substr(0, colon);
  const size_t second = text.find(':', colon + 1);
  const size_t memory_end = second == std::string::npos ? text.size() : second;
  auto memory = ParseBytes(text.substr(colon + 1, memory_end - colon - 1));
  if (!memory.ok()) return memory.status();
  capacity.memory_bytes = *memory;
  if (second != std::string::npos) {
    auto bandwidth = ParseBytes(text.substr(second + 1));
    if (!bandwidth.ok()) return bandwidth.status();
    capacity.read_bytes_per_second = static_cast<double>(*bandwidth);
  }
  return capacity;
}

absl::StatusOr<std::vector<WorkerCapacity>> Workers(const PlanFlags& flags) {
  std::vector<WorkerCapacity> workers;
  for (const std::string& text : flags.worker) {
    auto capacity = ParseWorker(text);
    if (!capacity.ok()) return capacity.status();
    workers.push_back(*capacity);
  }
  auto memory = ParseBytes(flags.memory);
  if (!memory.ok()) return memory.status();
  for (int i = 0; i < flags.workers; ++i) {
    workers.push_back({fmt::format("w{}", i), *memory, 0});
  }
  for (WorkerCapacity& worker : workers) {
    if (!flags.weight_budget.empty()) {
      if (auto status = SetWeightBudget(flags.weight_budget, worker); !status.ok()) return status;
    }
    if (flags.load_rate.empty()) continue;
    const auto rate = ParseBytes(flags.load_rate);
    if (!rate.ok()) return rate.status();
    worker.load_bytes_per_second = static_cast<double>(*rate);
  }
  if (workers.empty()) {
    return absl::InvalidArgumentError("name the workers: --workers N, or --worker NAME:MEMORY ...");
  }
  return workers;
}

nlohmann::json ToJson(const ModelFile& model, const Plan& plan) {
  nlohmann::json out = {{"model_hash", model.hash()},
                        {"layers", model.params().layers},
                        {"kv_blocks", plan.kv_blocks},
                        {"max_step_tokens", plan.max_step_tokens}};
  for (const PlanStage& stage : plan.stages) {
    out["stages"].push_back({{"worker", stage.worker},
                             {"first_layer", stage.first_layer},
                             {"last_layer", stage.last_layer},
                             {"weight_bytes", stage.weight_bytes},
                             {"kv_bytes", stage.kv_bytes},
                             {"streamed_bytes", stage.streamed_bytes},
                             {"seconds_per_token", stage.seconds_per_token}});
  }
  return out;
}

absl::Status RunPlan(const PlanFlags& flags) {
  auto workers = Workers(flags);
  if (!workers.ok()) return workers.status();
  auto model = ModelFile::Open(flags.model);
  if (!model.ok()) return model.status();
  const PlanLimits limits = {flags.max_slots,
                             std::min(flags.context, (*model)->params().context_length),
                             flags.step_tokens, flags.kv};
  auto plan = MakePlan(**model, *workers, limits);
  if (!plan.ok()) return plan.status();
  if (flags.json) {
    fmt::print("{}\n", ToJson(**model, *plan).dump(2));
  } else {
    fmt::print("{}", FormatPlan(**model, *plan));
  }
  return absl::OkStatus();
}

}  // namespace

void AddPlanCommand(CLI::App& app, Command& run) {
  auto flags = std::make_shared<PlanFlags>();
  CLI::App* command = app.add_subcommand("plan", "Show how a model's layers would be split");
  command->add_option("model,--model", flags->model, "GGUF file")->required();
  command->add_option("--workers", flags->workers, "Number of equal workers");
  command->add_option("--memory", flags->memory, "Memory of each of the --workers")
      ->capture_default_str();
  command->add_option("--worker", flags->worker,
                      "NAME:MEMORY[:BANDWIDTH], once per worker in stage order, e.g. a:24GB:900GB");
  command->add_option("--weight-budget", flags->weight_budget,
                      "Memory for weights of each worker, e.g. 8GB or 25%; the rest streams");
  command->add_option("--load-rate", flags->load_rate,
                      "Bytes per second at which weights stream, e.g. 3GB (default: 1GB)");
  command->add_option("--max-slots", flags->max_slots, "Sequences at once")->capture_default_str();
  command->add_option("--context", flags->context, "Positions per sequence, at most the model's")
      ->capture_default_str();
  command->add_option("--step-tokens", flags->step_tokens, "Rows per step")->capture_default_str();
  AddKvFlags(*command, flags->kv);
  command->add_flag("--json", flags->json, "Machine-readable output");
  command->callback([flags, &run] { run = [flags] { return RunPlan(*flags); }; });
}

}  // namespace stagecoach
