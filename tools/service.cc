#include "tools/service.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <utility>

#include "tools/table.h"

namespace stagecoach {
namespace {

constexpr absl::Duration kServingTimeout = absl::Minutes(10);

}  // namespace

void AddTransportFlags(CLI::App& command, ServiceFlags& flags) {
  command
      .add_option("--transport", flags.transport,
                  "Of activations between GPUs: nccl, grpc, or auto: NCCL where both ends have it")
      ->check(CLI::IsMember({"auto", "grpc", "nccl"}))
      ->capture_default_str();
  command
      .add_option("--worker-env", flags.worker_env,
                  "NAME=VALUE for each worker's environment; {} stands for its index")
      ->check([](const std::string& text) {
        const size_t equals = text.find('=');
        return equals == 0 || equals == std::string::npos ? text + " is not NAME=VALUE"
                                                          : std::string();
      });
}

void AddPipelineFlags(CLI::App& command, ServiceFlags& flags) {
  command.add_option("--workers", flags.workers, "Worker processes (stages) of a private pipeline")
      ->check(CLI::Range(1, 512))
      ->capture_default_str();
  command
      .add_option("--device", flags.device,
                  "Where workers compute: cpu, cuda:N, cuda:{} (worker i on GPU i) or auto")
      ->capture_default_str();
  AddTransportFlags(command, flags);
  command.add_option("--threads", flags.threads, "CPU threads per worker; 0 = share all cores")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  command.add_option("--max-slots", flags.max_slots, "Sequences at once")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  command.add_option("--context", flags.context, "Positions per sequence; 0 = default")
      ->check(CLI::NonNegativeNumber);
  command.add_option("--step-tokens", flags.step_tokens, "Rows of one step; 0 = default")
      ->check(CLI::NonNegativeNumber);
  command.add_option("--kv-type", flags.kv_type, "Type of cached keys and values")
      ->check(CLI::IsMember({"f16", "f32", "q8_0"}))
      ->capture_default_str();
  command.add_option("--kv-memory", flags.kv_memory,
                     "Memory for KV of each worker, e.g. 8GB or 25%");
  command.add_option("--prefetch", flags.prefetch, "Load layers ahead, or when first needed")
      ->check(CLI::IsMember({"async", "off"}))
      ->capture_default_str();
  command.add_option("--weight-budget", flags.weight_budget,
                     "Memory for weights of each worker, e.g. 8GB or 25%; the rest streams");
  command.add_flag("--verbose", flags.verbose, "Show the logs of the processes");
}

void AddServiceFlags(CLI::App& command, ServiceFlags& flags) {
  command.add_option("--server", flags.server, "host:port of a running coordinator");
  command.add_option("--model", flags.model, "GGUF file to start a private pipeline with");
  AddPipelineFlags(command, flags);
}

LocalClusterOptions ToClusterOptions(const ServiceFlags& flags) {
  LocalClusterOptions options;
  options.model = flags.model;
  options.workers = flags.workers;
  options.threads = flags.threads;
  options.max_slots = flags.max_slots;
  options.context = flags.context;
  options.coordinator_flags = {"--kv-type", flags.kv_type, "--step-tokens",
                               std::to_string(flags.step_tokens)};
  if (!flags.kv_memory.empty()) {
    options.coordinator_flags.insert(options.coordinator_flags.end(),
                                     {"--kv-memory", flags.kv_memory});
  }
  options.worker_flags = {"--device",     flags.device,  "--prefetch",
                          flags.prefetch, "--transport", flags.transport};
  options.worker_environment = flags.worker_env;
  if (!flags.weight_budget.empty()) {
    options.worker_flags.insert(options.worker_flags.end(),
                                {"--weight-budget", flags.weight_budget});
  }
  if (flags.verbose) {
    options.on_log = [](const std::string& line) { fmt::print(stderr, "{}\n", line); };
  }
  return options;
}

absl::StatusOr<std::unique_ptr<Service>> Service::Open(const ServiceFlags& flags) {
  if (flags.server.empty() == flags.model.empty()) {
    return absl::InvalidArgumentError(
        "give either --server host:port, or --model FILE to start a private pipeline");
  }
  if (flags.model.empty()) {
    std::unique_ptr<Service> service(new Service());
    service->client_ = std::make_unique<Client>(flags.server);
    return service;
  }
  auto cluster = LocalCluster::Start(ToClusterOptions(flags));
  if (!cluster.ok()) return cluster.status();
  return Adopt(std::move(*cluster));
}

absl::StatusOr<std::unique_ptr<Service>> Service::Adopt(std::unique_ptr<LocalCluster> cluster) {
  std::unique_ptr<Service> service(new Service());
  service->client_ = std::make_unique<Client>(cluster->address());
  absl::Status status = service->client_->WaitUntilServing(
      kServingTimeout, [&](const auto&) { return cluster->Health(); });
  if (!status.ok()) return status;
  service->cluster_ = std::move(cluster);
  return service;
}

std::string FormatStages(const v1::GetStatusResponse& status) {
  std::vector<std::vector<std::string>> rows = {{"stage", "worker", "layers", "resident", "loaded",
                                                 "load s", "steps", "tokens", "compute s", "wait s",
                                                 "busy", "stall s"}};
  for (const v1::StageStatus& s : status.stages()) {
    const double total = s.compute_seconds() + s.wait_seconds();
    rows.push_back(
        {fmt::format("{}", s.stage()), s.worker(),
         fmt::format("{}-{}{}{}", s.first_layer(), s.last_layer() - 1,
                     s.has_embedding() ? " +embedding" : "", s.has_head() ? " +head" : ""),
         fmt::format("{}/{}", s.resident_units(), s.units()), FormatBytes(s.loaded_bytes()),
         fmt::format("{:.3f}", s.load_seconds()), fmt::format("{}", s.steps()),
         fmt::format("{}", s.tokens()), fmt::format("{:.3f}", s.compute_seconds()),
         fmt::format("{:.3f}", s.wait_seconds()),
         fmt::format("{:.0f}%", total > 0 ? 100 * s.compute_seconds() / total : 0.0),
         fmt::format("{:.3f}", s.stall_seconds())});
  }
  return FormatTable(rows);
}

std::string FormatWeights(const v1::GetStatusResponse& status) {
  std::vector<std::vector<std::string>> rows = {
      {"stage", "budget",  "resident", "peak",   "fixed",  "window", "ahead",
       "queue", "evicted", "hits",     "late",   "missed", "hit",    "stall s",
       "file",  "file/s",  "host",     "host/s", "held",   "packed", "units"}};
  for (const v1::StageStatus& s : status.stages()) {
    const v1::WeightStatus& w = s.weights();
    if (!w.streaming() && !w.host_tier()) continue;
    rows.push_back({fmt::format("{}", s.stage()),
                    w.budget_bytes() > 0 ? FormatBytes(w.budget_bytes()) : "-",
                    FormatBytes(w.resident_bytes()),
                    FormatBytes(w.peak_resident_bytes()),
                    fmt::format("{}", w.fixed_units()),
                    fmt::format("{}", w.window_units()),
                    fmt::format("{}", w.distance()),
                    fmt::format("{}", w.queued_units()),
                    fmt::format("{}", w.evictions()),
                    fmt::format("{}", s.prefetch_hits()),
                    fmt::format("{}", s.prefetch_late_hits()),
                    fmt::format("{}", s.prefetch_misses()),
                    fmt::format("{:.1f}%", 100 * s.hit_ratio()),
                    fmt::format("{:.3f}", s.stall_seconds()),
                    FormatBytes(w.file_read_bytes()),
                    FormatBytes(static_cast<uint64_t>(s.file_bytes_per_second())),
                    FormatBytes(w.host_read_bytes()),
                    FormatBytes(static_cast<uint64_t>(s.host_bytes_per_second())),
                    FormatBytes(w.host_bytes()),
                    fmt::format("{:.2f}x", s.host_compression_ratio()),
                    s.residency()});
  }
  return rows.size() == 1 ? "" : FormatTable(rows);
}

}  // namespace stagecoach
