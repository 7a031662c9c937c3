// stagecoach bench prefetch: what loading weights ahead of their use buys, from a cold start and
// under a weight budget that does not hold the model.
#include <fcntl.h>
#include <fmt/format.h>
#include <malloc.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "kernels/cpu/aligned_buffer.h"
#include "model/direct_file.h"
#include "model/model_file.h"
#include "model/status_macros.h"
#include "tools/bench.h"
#include "tools/local_stage.h"
#include "tools/table.h"
#include "worker/layer_store.h"
#include "worker/read_buffer.h"

namespace stagecoach {
namespace {

constexpr int kColdStages = 2;
constexpr int kWarmUpPasses = 3;  // the prefetch distance settles
constexpr size_t kPlainReadBytes = 8 << 20;

struct BenchPrefetchFlags {
  std::string model;
  std::string budget = "25%";
  std::string io = "direct";
  int threads = 1;
  int reader_threads = 1;
  int passes = 16;
  int prompt_tokens = 8;
  int rows = 1;
  std::string host_cache;
  std::string json;
};

using ModelPtr = std::shared_ptr<const ModelFile>;

double SecondsSince(absl::Time start) { return absl::ToDoubleSeconds(absl::Now() - start); }

// Clean pages of the model leave the page cache.
void DropPageCache(const ModelFile& model) {
  for (size_t i = 0; i < model.parts().size(); ++i) {
    const int fd = ::open(model.file(static_cast<int>(i)).path().c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) continue;
    ::posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    ::close(fd);
  }
}

// Reads all tensor data from front to back and does nothing with it; returns bytes per second.
absl::StatusOr<double> PlainReadRate(const ModelFile& model) {
  DropPageCache(model);
  ReadBuffer buffer;
  if (!buffer.Reserve(kPlainReadBytes)) return absl::ResourceExhaustedError("no read buffer");
  uint64_t bytes = 0;
  const absl::Time start = absl::Now();
  for (size_t i = 0; i < model.parts().size(); ++i) {
    const RandomAccessFile& file = model.file(static_cast<int>(i));
    const uint64_t data = model.parts()[i].data_offset();
    for (uint64_t at = data / kDirectAlignment * kDirectAlignment; at < file.size();) {
      const size_t chunk = std::min<uint64_t>(kPlainReadBytes, file.size() - at);
      STAGECOACH_RETURN_IF_ERROR(ReadFully(file, at, {buffer.data(), chunk}));
      at += chunk;
      bytes += chunk;
    }
  }
  return static_cast<double>(bytes) / SecondsSince(start);
}

// The peak of this process's memory from the last reset on; Linux resets it on request.
void ResetPeakMemory() {
  ::malloc_trim(0);
  std::ofstream("/proc/self/clear_refs") << "5";
}
uint64_t PeakMemory() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("VmHWM:")) return std::stoull(line.substr(6)) * 1024;
  }
  return 0;
}

// Takes as much memory as the weights will, and gives it back; returns bytes per second. On a
// virtual machine the first touch of memory may be slower than storage, and is no part of a load.
absl::StatusOr<double> TouchMemory(uint64_t bytes) {
  const absl::Time start = absl::Now();
  STAGECOACH_RETURN_IF_ERROR(cpu::AlignedBuffer<std::byte>::Create(bytes).status());
  return static_cast<double>(bytes) / SecondsSince(start);
}

struct ColdStart {
  double plain_rate = 0;  // B/s, here and below
  double touch_rate = 0;
  double first_layer_seconds = 0;
  double first_layer_share = 0;  // of the bytes had landed by then
  double first_token_seconds = 0;
  double first_token_share = 0;
  double resident_seconds = 0;
  double load_rate = 0;
  double read_seconds = 0;  // summed over threads
  double convert_seconds = 0;
};

LayerStoreStats Sum(LocalStages& stages, int count) {
  LayerStoreStats sum;
  for (int i = 0; i < count; ++i) {
    const LayerStoreStats stats = stages.store(i).Stats();
    sum.slice_bytes += stats.slice_bytes;
    sum.loaded_bytes += stats.loaded_bytes;
    sum.read_bytes += stats.read_bytes;
    sum.read_seconds += stats.read_seconds;
    sum.convert_seconds += stats.convert_seconds;
  }
  return sum;
}

double Landed(const LayerStoreStats& stats) {
  return static_cast<double>(stats.loaded_bytes) / static_cast<double>(stats.slice_bytes);
}

absl::StatusOr<ColdStart> MeasureColdStart(const BenchPrefetchFlags& flags, const ModelPtr& model) {
  ColdStart cold;
  STAGECOACH_ASSIGN_OR_RETURN(cold.plain_rate, PlainReadRate(*model));
  DropPageCache(*model);
  STAGECOACH_ASSIGN_OR_RETURN(cold.touch_rate, TouchMemory(model->file(0).size()));
  const absl::Time start = absl::Now();
  STAGECOACH_ASSIGN_OR_RETURN(
      const auto stages,
      LocalStages::Create(model, {.stages = kColdStages,
                                  .threads = flags.threads,
                                  .max_context = flags.prompt_tokens + 1,
                                  .max_step_tokens = flags.prompt_tokens,
                                  .store = {.reader_threads = flags.reader_threads}}));
  const absl::Status first_layer =
      stages->store(0).Acquire({.kind = Unit::Kind::kLayer, .layer = 0}).status();
  STAGECOACH_RETURN_IF_ERROR(first_layer);
  cold.first_layer_seconds = SecondsSince(start);
  cold.first_layer_share = Landed(Sum(*stages, kColdStages));
  const absl::Status first_token =
      stages->Begin(MakeTestPrompt(model->params(), flags.prompt_tokens)).status();
  STAGECOACH_RETURN_IF_ERROR(first_token);
  cold.first_token_seconds = SecondsSince(start);
  LayerStoreStats stats = Sum(*stages, kColdStages);
  cold.first_token_share = Landed(stats);
  while (stats.loaded_bytes < stats.slice_bytes) {
    absl::SleepFor(absl::Milliseconds(1));
    stats = Sum(*stages, kColdStages);
  }
  double load_seconds = 0;  // the stages load at the same time
  for (int i = 0; i < kColdStages; ++i) {
    load_seconds = std::max(load_seconds, stages->store(i).Stats().load_seconds);
  }
  cold.resident_seconds = load_seconds;
  cold.load_rate = static_cast<double>(stats.slice_bytes) / load_seconds;
  cold.read_seconds = stats.read_seconds;
  cold.convert_seconds = stats.convert_seconds;
  return cold;
}

// What `passes` passes took after warm-up, per pass where nothing else is said.
struct Steady {
  double seconds = 0;  // median
  double compute_seconds = 0;
  double stall_share = 0;  // of the time
  double sync_loads = 0;   // misses
  double hit_ratio = 0;    // of all acquisitions
  double late_hits = 0;
  double evictions = 0;
  double read_bytes = 0;
  double acquire_seconds = 0;  // a pass that only acquires, and computes nothing
  std::vector<int32_t> tokens;
  LayerStoreStats stats;     // at the end
  uint64_t peak_memory = 0;  // of the process
};

// What pass number `pass` computes: the last token, or a chunk of `rows` made-up ones.
std::vector<int32_t> PassTokens(const BenchPrefetchFlags& flags, const ModelParams& params,
                                int pass, int32_t last) {
  if (flags.rows == 1) return {last};
  std::vector<int32_t> all = MakeTestPrompt(params, (pass + 1) * flags.rows);
  return {all.end() - flags.rows, all.end()};
}

absl::StatusOr<double> AcquirePass(LayerStore& store, const ModelParams& params) {
  const absl::Time start = absl::Now();
  for (const Unit& unit : StageUnits(params, 0, params.layers)) {
    STAGECOACH_RETURN_IF_ERROR(store.Acquire(unit).status());
  }
  return SecondsSince(start);
}

void FillRates(const LayerStoreStats& before, const LayerStoreStats& after, int passes,
               double total_seconds, Steady& steady) {
  const auto per_pass = [passes](uint64_t a, uint64_t b) {
    return static_cast<double>(b - a) / passes;
  };
  steady.sync_loads = per_pass(before.misses, after.misses);
  steady.late_hits = per_pass(before.late_hits, after.late_hits);
  steady.evictions = per_pass(before.evictions, after.evictions);
  steady.read_bytes = per_pass(before.read_bytes, after.read_bytes);
  const double hits = per_pass(before.hits, after.hits);
  steady.hit_ratio = hits / (hits + steady.late_hits + steady.sync_loads);
  steady.stall_share = (after.stall_seconds - before.stall_seconds) / total_seconds;
}

absl::StatusOr<Steady> MeasureSteady(const BenchPrefetchFlags& flags, const ModelPtr& model,
                                     const LayerStoreOptions& store) {
  ResetPeakMemory();
  const int all_passes = kWarmUpPasses + flags.passes;
  STAGECOACH_ASSIGN_OR_RETURN(
      const auto stages,
      LocalStages::Create(model, {.threads = flags.threads,
                                  .max_context = flags.prompt_tokens + all_passes * flags.rows + 1,
                                  .max_step_tokens = std::max(flags.prompt_tokens, flags.rows),
                                  .store = store}));
  Steady steady;
  STAGECOACH_ASSIGN_OR_RETURN(int32_t token,
                              stages->Begin(MakeTestPrompt(model->params(), flags.prompt_tokens)));
  steady.tokens.push_back(token);
  std::vector<double> seconds;
  LayerStoreStats before;
  double compute_before = 0;
  for (int pass = 0; pass < all_passes; ++pass) {
    if (pass == kWarmUpPasses) {
      before = stages->store(0).Stats();
      compute_before = stages->compute_seconds();
    }
    const absl::Time start = absl::Now();
    STAGECOACH_ASSIGN_OR_RETURN(token,
                                stages->Continue(PassTokens(flags, model->params(), pass, token)));
    if (pass >= kWarmUpPasses) seconds.push_back(SecondsSince(start));
    steady.tokens.push_back(token);
  }
  steady.stats = stages->store(0).Stats();
  double total = 0;
  for (const double s : seconds) total += s;
  FillRates(before, steady.stats, flags.passes, total, steady);
  steady.seconds = Median(seconds);
  steady.compute_seconds = (stages->compute_seconds() - compute_before) / flags.passes;
  std::vector<double> acquire;
  for (int pass = 0; pass < kWarmUpPasses; ++pass) {
    STAGECOACH_ASSIGN_OR_RETURN(acquire.emplace_back(),
                                AcquirePass(stages->store(0), model->params()));
  }
  steady.acquire_seconds = Median(acquire);
  steady.peak_memory = PeakMemory();
  return steady;
}

void PrintColdStart(const BenchPrefetchFlags& flags, const ModelFile& model, const ColdStart& c) {
  const bool direct = model.file(0).read_alignment() > 1;
  fmt::print("cold start: {} reads, {} stages of {} prefetch thread{}, {} prompt tokens\n",
             direct ? "direct" : "buffered", kColdStages, flags.reader_threads,
             flags.reader_threads == 1 ? "" : "s", flags.prompt_tokens);
  const auto row = [](const char* what, double seconds, const std::string& rest) {
    return std::vector<std::string>{what, fmt::format("{:.3f} s", seconds), rest};
  };
  fmt::print(
      "{}\n",
      FormatTable(
          {{"until", "time", ""},
           row("first layer resident", c.first_layer_seconds,
               fmt::format("{:.0f}% of the bytes landed", 100 * c.first_layer_share)),
           row("first token", c.first_token_seconds,
               fmt::format("{:.0f}% of the bytes landed", 100 * c.first_token_share)),
           row("all resident", c.resident_seconds,
               fmt::format("{:.2f} GB/s, {:.0f}% of a plain read ({:.2f} GB/s)", c.load_rate / 1e9,
                           100 * c.load_rate / c.plain_rate, c.plain_rate / 1e9)),
           row("of which reading", c.read_seconds, "summed over threads"),
           row("of which converting", c.convert_seconds, "summed over threads")}));
  fmt::print("memory of that size was touched before, at {:.2f} GB/s\n\n", c.touch_rate / 1e9);
}

struct Regime {
  const char* name;
  const char* key;
  Steady steady;
};

constexpr struct {
  HostCodec codec;
  const char* name;
  const char* key;
} kHostCodecs[] = {{HostCodec::kNone, "host tier", "host_none"},
                   {HostCodec::kLz4, "host lz4", "host_lz4"},
                   {HostCodec::kZstd, "host zstd", "host_zstd"}};

// What the host tier served, of the regimes that had one.
void ReportHostTier(const std::vector<Regime>& regimes, nlohmann::json& report) {
  std::vector<std::vector<std::string>> table = {
      {"", "tensors served", "of bytes", "at", "held", "ratio", "codec's ratio"}};
  for (const Regime& regime : regimes) {
    const LayerStoreStats& stats = regime.steady.stats;
    if (stats.host_bytes == 0) continue;
    const double rate = static_cast<double>(stats.host_read_bytes) / stats.host_seconds;
    const double ratio =
        static_cast<double>(stats.host_raw_bytes) / static_cast<double>(stats.host_bytes);
    table.push_back(
        {regime.name, fmt::format("{}", stats.host_hits), FormatBytes(stats.host_read_bytes),
         fmt::format("{:.2f} GB/s", rate / 1e9), FormatBytes(stats.host_bytes),
         fmt::format("{:.2f}", ratio),
         stats.host_codec_ratio == 0 ? "-" : fmt::format("{:.2f}", stats.host_codec_ratio)});
    report[regime.key].update({{"host_hits", stats.host_hits},
                               {"host_read_bytes", stats.host_read_bytes},
                               {"host_bytes_per_second", rate},
                               {"host_bytes", stats.host_bytes},
                               {"host_compression_ratio", ratio},
                               {"host_codec_ratio", stats.host_codec_ratio}});
  }
  if (table.size() > 1) fmt::print("\n{}", FormatTable(table));
}

nlohmann::json ReportSteady(const std::vector<Regime>& regimes, int units) {
  const Steady& resident = regimes[0].steady;
  const double t_compute = resident.seconds, t_io = regimes[1].steady.acquire_seconds;
  nlohmann::json out = {{"t_compute_seconds", t_compute}, {"t_io_seconds", t_io}};
  std::vector<std::vector<std::string>> table = {{"", "total/pass", "sync loads", "late hits",
                                                  "hits", "stalled", "read/pass", "overlap",
                                                  "resident", "peak RSS", "tokens"}};
  for (const Regime& regime : regimes) {
    const Steady& s = regime.steady;
    const bool streams = s.stats.streaming;
    const bool equal = s.tokens == resident.tokens;
    const double efficiency = std::max(t_io, t_compute) / s.seconds;
    table.push_back(
        {regime.name, fmt::format("{:.4f} s", s.seconds),
         fmt::format("{:.1f} of {}", s.sync_loads, units), fmt::format("{:.1f}", s.late_hits),
         fmt::format("{:.0f}%", 100 * s.hit_ratio), fmt::format("{:.0f}%", 100 * s.stall_share),
         FormatBytes(static_cast<uint64_t>(s.read_bytes)),
         streams ? fmt::format("{:.3f}", efficiency) : "-", FormatBytes(s.stats.resident_bytes),
         FormatBytes(s.peak_memory), equal ? "equal" : "DIFFERENT"});
    out[regime.key] = {{"seconds_per_pass", s.seconds},
                       {"compute_seconds_per_pass", s.compute_seconds},
                       {"sync_loads_per_pass", s.sync_loads},
                       {"late_hits_per_pass", s.late_hits},
                       {"hit_ratio", s.hit_ratio},
                       {"stall_share", s.stall_share},
                       {"read_bytes_per_pass", s.read_bytes},
                       {"evictions_per_pass", s.evictions},
                       {"acquire_only_seconds", s.acquire_seconds},
                       {"overlap_efficiency", streams ? nlohmann::json(efficiency) : nullptr},
                       {"fixed_units", s.stats.fixed_units},
                       {"window_units", s.stats.window_units},
                       {"distance", s.stats.distance},
                       {"peak_resident_bytes", s.stats.peak_resident_bytes},
                       {"peak_rss_bytes", s.peak_memory},
                       {"tokens_equal", equal}};
  }
  fmt::print("T_compute {:.4f} s (all resident), T_io {:.4f} s (acquiring only), per pass\n{}",
             t_compute, t_io, FormatTable(table));
  return out;
}

absl::StatusOr<LayerStoreOptions> BudgetOptions(const BenchPrefetchFlags& flags) {
  LayerStoreOptions options{.reader_threads = flags.reader_threads};
  if (flags.budget.ends_with('%')) {
    options.weight_budget_percent = std::strtod(flags.budget.c_str(), nullptr);
    if (options.weight_budget_percent > 0) return options;
    return absl::InvalidArgumentError(fmt::format("--budget {} is no share", flags.budget));
  }
  STAGECOACH_ASSIGN_OR_RETURN(options.weight_budget_bytes, ParseBytes(flags.budget));
  return options;
}

absl::Status RunBenchPrefetch(const BenchPrefetchFlags& flags) {
  const ReadMode mode = flags.io == "direct"     ? ReadMode::kDirect
                        : flags.io == "buffered" ? ReadMode::kBuffered
                                                 : ReadMode::kAuto;
  STAGECOACH_ASSIGN_OR_RETURN(const ModelPtr model,
                              ModelFile::Open(flags.model, {.read_mode = mode}));
  STAGECOACH_ASSIGN_OR_RETURN(LayerStoreOptions budget, BudgetOptions(flags));
  STAGECOACH_ASSIGN_OR_RETURN(const ColdStart cold, MeasureColdStart(flags, model));
  PrintColdStart(flags, *model, cold);

  std::vector<Regime> regimes = {{"all resident", "resident"},
                                 {"prefetch on", "prefetch_on"},
                                 {"prefetch off", "prefetch_off"}};
  STAGECOACH_ASSIGN_OR_RETURN(regimes[0].steady, MeasureSteady(flags, model, LayerStoreOptions()));
  STAGECOACH_ASSIGN_OR_RETURN(regimes[1].steady, MeasureSteady(flags, model, budget));
  budget.prefetch = false;
  STAGECOACH_ASSIGN_OR_RETURN(regimes[2].steady, MeasureSteady(flags, model, budget));
  if (!flags.host_cache.empty()) {
    STAGECOACH_ASSIGN_OR_RETURN(budget.host_cache_bytes, ParseBytes(flags.host_cache));
    budget.prefetch = true;
    for (const auto& [codec, name, key] : kHostCodecs) {
      budget.host_cache_codec = codec;
      STAGECOACH_ASSIGN_OR_RETURN(Steady steady, MeasureSteady(flags, model, budget));
      regimes.push_back({name, key, std::move(steady)});
    }
  }
  const LayerStoreStats& on = regimes[1].steady.stats;
  fmt::print(
      "steady state: budget {} of {} ({}), {} fixed units, window of {}, distance {}, {} "
      "row{} a pass\n",
      flags.budget, FormatBytes(on.slice_bytes), FormatBytes(on.budget_bytes), on.fixed_units,
      on.window_units, on.distance, flags.rows, flags.rows == 1 ? "" : "s");
  nlohmann::json report = ReportSteady(
      regimes, static_cast<int>(StageUnits(model->params(), 0, model->params().layers).size()));
  ReportHostTier(regimes, report);
  report["benchmark"] = "prefetch";
  report["model"] = flags.model;
  report["budget"] = flags.budget;
  report["rows"] = flags.rows;
  report["cold_start"] = {{"plain_read_bytes_per_second", cold.plain_rate},
                          {"first_layer_seconds", cold.first_layer_seconds},
                          {"first_layer_share", cold.first_layer_share},
                          {"first_token_seconds", cold.first_token_seconds},
                          {"first_token_share", cold.first_token_share},
                          {"resident_seconds", cold.resident_seconds},
                          {"load_bytes_per_second", cold.load_rate},
                          {"read_seconds", cold.read_seconds},
                          {"convert_seconds", cold.convert_seconds}};
  return WriteBenchJson(flags.json, report);
}

}  // namespace

void AddBenchPrefetch(CLI::App& bench, Command& run) {
  auto flags = std::make_shared<BenchPrefetchFlags>();
  CLI::App* command = bench.add_subcommand("prefetch", "What loading weights ahead of use buys");
  command->add_option("--model", flags->model, "GGUF file")->required();
  command->add_option("--budget", flags->budget, "Weight budget: 25% of the model, or 1GB")
      ->capture_default_str();
  command->add_option("--io", flags->io, "How the file is read")
      ->check(CLI::IsMember({"auto", "direct", "buffered"}))
      ->capture_default_str();
  command->add_option("--threads", flags->threads, "Compute threads")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  command->add_option("--reader-threads", flags->reader_threads, "Prefetch threads")
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  command->add_option("--passes", flags->passes, "Passes after warm-up")
      ->check(CLI::Range(1, 100000))
      ->capture_default_str();
  command->add_option("--prompt-tokens", flags->prompt_tokens, "Length of the prompt")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  command->add_option("--rows", flags->rows, "Rows a pass: 1 decodes, more are chunks of a prompt")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  command->add_option("--host-cache", flags->host_cache,
                      "Also with a host tier of this size (2GB), by codec");
  command->add_option("--json", flags->json, "Write the results here too");
  command->callback([flags, &run] { run = [flags] { return RunBenchPrefetch(*flags); }; });
}

}  // namespace stagecoach
