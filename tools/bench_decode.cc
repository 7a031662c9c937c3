// stagecoach bench decode: prompt and decode speed of one stream, for several numbers of workers
// side by side, with the share of the memory bandwidth measured in the same run.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "coordinator/kv_flags.h"
#include "kernels/cpu/read_bandwidth.h"
#include "kernels/device.h"
#include "model/model_file.h"
#include "model/status_macros.h"
#include "tools/bench.h"
#include "tools/local_stage.h"
#include "tools/service.h"
#include "tools/table.h"

namespace stagecoach {
namespace {

struct BenchDecodeFlags {
  ServiceFlags service;
  std::vector<int> workers = {0, 1, 2};
  int prompt_tokens = 128;
  int tokens = 128;
  int repeat = 5;
  std::string json;
};

struct Sample {
  double prompt_rate = 0;  // tok/s
  double decode_rate = 0;
};

// One way of running the model; a sample is one prompt and one continuation.
class Contender {
 public:
  virtual ~Contender() = default;
  virtual absl::StatusOr<Sample> Measure(const std::vector<int32_t>& prompt, int tokens) = 0;
  virtual std::string stages() { return ""; }
};

// "cuda:{}" (worker i on GPU i) for a process that is no worker.
std::string FirstDevice(const std::string& device) {
  return device == "cuda:{}" ? "cuda:0" : device;
}

// The whole model in this process.
class InProcessContender : public Contender {
 public:
  static absl::StatusOr<std::unique_ptr<Contender>> Start(
      const std::shared_ptr<const ModelFile>& model, const ServiceFlags& flags, int context) {
    auto stages = LocalStages::Create(model, {.device = FirstDevice(flags.device),
                                              .threads = flags.threads,
                                              .max_context = context,
                                              .max_step_tokens = context,
                                              .kv_type = KvTypeNames().at(flags.kv_type)});
    if (!stages.ok()) return stages.status();
    auto contender = std::make_unique<InProcessContender>();
    contender->stages_ = *std::move(stages);
    return contender;
  }

  absl::StatusOr<Sample> Measure(const std::vector<int32_t>& prompt, int tokens) override {
    const absl::Time start = absl::Now();
    auto token = stages_->Begin(prompt);
    if (!token.ok()) return token.status();
    const absl::Time first = absl::Now();
    for (int i = 1; i < tokens; ++i) {
      token = stages_->Continue({&*token, 1});
      if (!token.ok()) return token.status();
    }
    const absl::Time end = absl::Now();
    return Sample{static_cast<double>(prompt.size()) / absl::ToDoubleSeconds(first - start),
                  (tokens - 1.0) / absl::ToDoubleSeconds(end - first)};
  }

 private:
  std::unique_ptr<LocalStages> stages_;
};

// A private coordinator with worker processes.
class ClusterContender : public Contender {
 public:
  static absl::StatusOr<std::unique_ptr<Contender>> Start(ServiceFlags flags, int workers) {
    flags.workers = workers;
    auto service = Service::Open(flags);
    if (!service.ok()) return service.status();
    auto contender = std::make_unique<ClusterContender>();
    contender->service_ = std::move(*service);
    return contender;
  }

  absl::StatusOr<Sample> Measure(const std::vector<int32_t>& prompt, int tokens) override {
    v1::GenerateRequest request;
    request.mutable_token_ids()->mutable_ids()->Assign(prompt.begin(), prompt.end());
    request.set_max_tokens(static_cast<uint32_t>(tokens));
    request.set_ignore_eos(true);
    request.set_cache_salt(std::to_string(++prompts_));  // each prompt is computed anew
    v1::GenerateEvent last;
    absl::Status status =
        service_->client().Generate(request, absl::InfiniteFuture(), [&](const auto& event) {
          last = event;
          return true;
        });
    if (!status.ok()) return status;
    const v1::Timings& t = last.timings();
    return Sample{static_cast<double>(prompt.size()) / t.prompt_ms() * 1e3,
                  (last.usage().completion_tokens() - 1.0) / t.decode_ms() * 1e3};
  }

  std::string stages() override {
    auto status = service_->client().GetStatus();
    return status.ok() ? FormatStages(*status) : "";
  }

 private:
  std::unique_ptr<Service> service_;
  int prompts_ = 0;
};

struct Row {
  int workers = 0;
  std::unique_ptr<Contender> contender;
  std::vector<double> prompt_rates;
  std::vector<double> decode_rates;
};

// Bytes that decoding one token reads: every layer and the head, and one row of the embedding.
uint64_t DecodeBytes(const ModelFile& model) {
  uint64_t bytes = model.UnitBytes({Unit::Kind::kHead, 0});
  for (int i = 0; i < model.params().layers; ++i) {
    bytes += model.UnitBytes({Unit::Kind::kLayer, i});
  }
  return bytes;
}

// Rounds go over all contenders in turn, so that a slow moment of the machine hits all alike.
absl::Status MeasureAll(const BenchDecodeFlags& flags, const ModelFile& model,
                        std::vector<Row>& rows) {
  const std::vector<int32_t> prompt = MakeTestPrompt(model.params(), flags.prompt_tokens);
  for (int round = -1; round < flags.repeat; ++round) {
    for (Row& row : rows) {
      auto sample = row.contender->Measure(prompt, flags.tokens);
      if (!sample.ok()) return sample.status();
      if (round < 0) continue;  // warm-up: the first pass may wait for weights
      row.prompt_rates.push_back(sample->prompt_rate);
      row.decode_rates.push_back(sample->decode_rate);
    }
  }
  return absl::OkStatus();
}

nlohmann::json Report(const BenchDecodeFlags& flags, const ModelFile& model,
                      const std::vector<Row>& rows, double bandwidth) {
  const double bytes = static_cast<double>(DecodeBytes(model));
  const double baseline = Median(rows.front().decode_rates);
  std::vector<std::vector<std::string>> table = {{"processes", "threads each", "prompt tok/s",
                                                  "decode tok/s", "vs first", "GB/s",
                                                  "of read bandwidth"}};
  nlohmann::json out = {{"benchmark", "decode"},           {"model", flags.service.model},
                        {"device", flags.service.device},  {"transport", flags.service.transport},
                        {"decode_bytes_per_token", bytes}, {"read_bandwidth", bandwidth}};
  for (const Row& row : rows) {
    const double prompt = Median(row.prompt_rates), decode = Median(row.decode_rates);
    table.push_back({row.workers == 0 ? "1, no links" : fmt::format("1 + {} workers", row.workers),
                     fmt::format("{}", flags.service.threads), fmt::format("{:.0f}", prompt),
                     fmt::format("{:.1f}", decode), fmt::format("{:.2f}x", decode / baseline),
                     fmt::format("{:.2f}", decode * bytes / 1e9),
                     fmt::format("{:.0f}%", 100 * decode * bytes / bandwidth)});
    out["rows"].push_back({{"workers", row.workers},
                           {"threads", flags.service.threads},
                           {"prompt_tokens_per_second", prompt},
                           {"decode_tokens_per_second", decode},
                           {"ratio_to_first", decode / baseline},
                           {"bandwidth_share", decode * bytes / bandwidth},
                           {"prompt_samples", row.prompt_rates},
                           {"decode_samples", row.decode_rates}});
  }
  fmt::print("{}", FormatTable(table));
  return out;
}

// Of the device's memory; of one core's where that is the CPU.
absl::StatusOr<double> ReadBandwidth(const std::string& device) {
  if (device == "cpu") return MeasureReadBandwidth(1);
  STAGECOACH_ASSIGN_OR_RETURN(const std::unique_ptr<Backend> backend,
                              OpenDeviceFlag(FirstDevice(device), 1));
  return MeasureDeviceBandwidth(*backend, 1);
}

absl::Status RunBenchDecode(BenchDecodeFlags& flags) {
  auto model = ModelFile::Open(flags.service.model);
  if (!model.ok()) return model.status();
  const int context = flags.prompt_tokens + flags.tokens + 1;
  flags.service.context = std::max(flags.service.context, context);
  STAGECOACH_ASSIGN_OR_RETURN(const double bandwidth, ReadBandwidth(flags.service.device));
  std::vector<Row> rows;
  for (const int workers : flags.workers) {
    auto contender = workers == 0 ? InProcessContender::Start(*model, flags.service, context)
                                  : ClusterContender::Start(flags.service, workers);
    if (!contender.ok()) return contender.status();
    rows.push_back({.workers = workers, .contender = std::move(*contender)});
  }
  fmt::print(
      "{}: {} prompt tokens, {} generated, median of {} rounds; {} reads {:.1f} GB/s, "
      "a token reads {}\n\n",
      (*model)->params().name, flags.prompt_tokens, flags.tokens, flags.repeat,
      flags.service.device == "cpu" ? "one core" : flags.service.device, bandwidth / 1e9,
      FormatBytes(DecodeBytes(**model)));
  if (absl::Status status = MeasureAll(flags, **model, rows); !status.ok()) return status;
  const nlohmann::json report = Report(flags, **model, rows, bandwidth);
  for (const Row& row : rows) {
    const std::string stages = row.contender->stages();
    if (!stages.empty()) fmt::print("\n{} workers:\n{}", row.workers, stages);
  }
  return WriteBenchJson(flags.json, report);
}

}  // namespace

void AddBenchDecode(CLI::App& bench, Command& run) {
  auto flags = std::make_shared<BenchDecodeFlags>();
  flags->service.threads = 1;
  CLI::App* command = bench.add_subcommand("decode", "Prompt and decode speed of one stream");
  command->add_option("--model", flags->service.model, "GGUF file")->required();
  command
      ->add_option("--workers", flags->workers,
                   "Worker processes, several side by side; 0 = one process without links")
      ->delimiter(',')
      ->check(CLI::Range(0, 512))
      ->capture_default_str();
  command
      ->add_option("--device", flags->service.device,
                   "Where it is computed: cpu, cuda:N, cuda:{} (worker i on GPU i) or auto")
      ->capture_default_str();
  AddTransportFlags(*command, flags->service);
  command->add_option("--threads", flags->service.threads, "Threads per process")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  command->add_option("--prompt-tokens", flags->prompt_tokens, "Length of the prompt")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command->add_option("--tokens", flags->tokens, "Tokens to generate")
      ->check(CLI::Range(2, 1 << 20))
      ->capture_default_str();
  command->add_option("--repeat", flags->repeat, "Rounds after a warm-up")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  command->add_flag("--verbose", flags->service.verbose, "Show the logs of the processes");
  command->add_option("--json", flags->json, "Write the results here too");
  command->callback([flags, &run] { run = [flags] { return RunBenchDecode(*flags); }; });
}

}  // namespace stagecoach
