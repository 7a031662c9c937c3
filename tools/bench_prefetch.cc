// stagecoach bench prefetch: what loading weights ahead of their use buys, from a cold start and
// under a weight budget that does not hold the model.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "model/model_file.h"
#include "model/status_macros.h"
#include "tools/bench.h"
#include "tools/prefetch_measure.h"
#include "tools/table.h"
#include "worker/layer_store.h"

namespace stagecoach {
namespace {

constexpr char kBalanced[] = "balanced";
constexpr int kMostRows = 4096;

struct BenchPrefetchFlags {
  PrefetchSetup setup;
  std::string model;
  std::string budget = "25%";
  std::string io = "direct";
  std::vector<std::string> rows = {"1"};
  std::string host_cache;
  std::vector<std::string> codecs = {"none", "lz4", "zstd"};
  std::string json;
};

std::string Rate(double bytes_per_second) {
  return fmt::format("{:.2f} GB/s", bytes_per_second / 1e9);
}
std::string Share(double share) { return fmt::format("{:.0f}%", 100 * share); }

// What a load can reach at most, with the device as it is.
double LoadCeiling(const ColdStart& c) {
  return c.copy_rate > 0 ? std::min(c.plain_rate, c.copy_rate) : c.plain_rate;
}

void PrintColdStart(const BenchPrefetchFlags& flags, const ModelFile& model, const ColdStart& c) {
  const bool direct = model.file(0).read_alignment() > 1;
  const PrefetchSetup& setup = flags.setup;
  fmt::print(
      "cold start on {}: {} reads{}, {} stage{}, {} load{} at once of {} thread{} each, {} prompt "
      "tokens\n",
      setup.device, direct ? "direct" : "buffered", setup.cached ? " of a cached file" : "",
      setup.cold_stages, setup.cold_stages == 1 ? "" : "s", c.store.reader_threads,
      c.store.reader_threads == 1 ? "" : "s", c.store.load_threads,
      c.store.load_threads == 1 ? "" : "s", setup.prompt_tokens);
  const auto row = [](const char* what, double seconds, const std::string& rest) {
    return std::vector<std::string>{what, fmt::format("{:.3f} s", seconds), rest};
  };
  const std::string copies =
      c.copy_rate > 0 ? fmt::format(" and pinned copies ({})", Rate(c.copy_rate)) : "";
  fmt::print("{}\n",
             FormatTable(
                 {{"until", "time", ""},
                  row("first layer resident", c.first_layer_seconds,
                      Share(c.first_layer_share) + " of the bytes landed"),
                  row("first token", c.first_token_seconds,
                      Share(c.first_token_share) + " of the bytes landed"),
                  row("all resident", c.resident_seconds,
                      fmt::format("{}, {} of the slower of plain reads ({}){}", Rate(c.load_rate),
                                  Share(c.load_rate / LoadCeiling(c)), Rate(c.plain_rate), copies)),
                  row("of which reading", c.read_seconds, "summed over threads"),
                  row("of which converting", c.convert_seconds,
                      "summed over threads, waits for copies included")}));
  if (c.touch_rate > 0) {
    fmt::print("memory of that size was touched before, at {}\n", Rate(c.touch_rate));
  }
  fmt::print("\n");
}

struct Regime {
  std::string name;
  std::string key;
  LayerStoreOptions store;
  Steady steady;
};

// What the host tier served, of the regimes that had one.
void ReportHostTier(const std::vector<Regime>& regimes, nlohmann::json& report) {
  std::vector<std::vector<std::string>> table = {
      {"", "tensors served", "of bytes", "copied at", "held", "ratio", "codec's ratio"}};
  for (const Regime& regime : regimes) {
    const LayerStoreStats& stats = regime.steady.stats;
    if (stats.host_bytes == 0) continue;
    const bool copied = stats.host_seconds > 0;  // as opposed to handed over
    const double rate =
        copied ? static_cast<double>(stats.host_read_bytes) / stats.host_seconds : 0;
    const double ratio =
        static_cast<double>(stats.host_raw_bytes) / static_cast<double>(stats.host_bytes);
    table.push_back(
        {regime.name, fmt::format("{}", stats.host_hits), FormatBytes(stats.host_read_bytes),
         copied ? Rate(rate) : "-", FormatBytes(stats.host_bytes), fmt::format("{:.2f}", ratio),
         stats.host_codec_ratio == 0 ? "-" : fmt::format("{:.2f}", stats.host_codec_ratio)});
    report[regime.key].update({{"host_hits", stats.host_hits},
                               {"host_read_bytes", stats.host_read_bytes},
                               {"host_bytes_per_second", copied ? nlohmann::json(rate) : nullptr},
                               {"host_bytes", stats.host_bytes},
                               {"host_compression_ratio", ratio},
                               {"host_codec_ratio", stats.host_codec_ratio}});
  }
  if (table.size() > 1) fmt::print("\n{}", FormatTable(table));
}

// How fast weights came into the device's own memory, of the regimes that stream.
void ReportCopies(const std::vector<Regime>& regimes, double copy_rate, nlohmann::json& report) {
  if (copy_rate == 0) return;
  std::vector<std::vector<std::string>> table = {
      {"host to device", "copying at", "busy", "in all", "acquiring only: at", "busy", "in all"}};
  for (const Regime& regime : regimes) {
    if (!regime.steady.stats.streaming) continue;
    std::vector<std::string> row = {regime.name};
    for (const auto& [rates, key] : {std::pair(&regime.steady.copies, "copies"),
                                     std::pair(&regime.steady.acquire_copies, "acquire_copies")}) {
      row.insert(row.end(), {Rate(rates->busy_rate), Share(rates->busy_share),
                             fmt::format("{} ({})", Rate(rates->total_rate),
                                         Share(rates->total_rate / copy_rate))});
      report[regime.key][key] = {{"bytes_per_second", rates->total_rate},
                                 {"busy_bytes_per_second", rates->busy_rate},
                                 {"busy_share", rates->busy_share}};
    }
    table.push_back(std::move(row));
  }
  fmt::print("\n{}shares of plain copies from pinned memory, {}\n", FormatTable(table),
             Rate(copy_rate));
}

// T_io of a regime: its own passes that only acquire; without prefetching those of the regime with.
double IoSeconds(const std::vector<Regime>& regimes, const Regime& regime) {
  return regime.store.prefetch ? regime.steady.acquire_seconds : regimes[1].steady.acquire_seconds;
}

nlohmann::json ReportSteady(const std::vector<Regime>& regimes, int units) {
  const Steady& resident = regimes[0].steady;
  const double t_compute = resident.seconds;
  nlohmann::json out = {{"t_compute_seconds", t_compute}};
  std::vector<std::vector<std::string>> table = {{"", "total/pass", "T_io", "overlap", "sync loads",
                                                  "late hits", "hits", "stalled", "read/pass",
                                                  "resident", "peak RSS", "tokens"}};
  for (const Regime& regime : regimes) {
    const Steady& s = regime.steady;
    const bool streams = s.stats.streaming;
    const bool equal = s.tokens == resident.tokens;
    const double t_io = IoSeconds(regimes, regime);
    const double efficiency = std::max(t_io, t_compute) / s.seconds;
    table.push_back({regime.name, fmt::format("{:.4f} s", s.seconds),
                     streams ? fmt::format("{:.4f} s", t_io) : "-",
                     streams ? fmt::format("{:.3f}", efficiency) : "-",
                     fmt::format("{:.1f} of {}", s.sync_loads, units),
                     fmt::format("{:.1f}", s.late_hits), Share(s.hit_ratio), Share(s.stall_share),
                     FormatBytes(static_cast<uint64_t>(s.read_bytes)),
                     FormatBytes(s.stats.resident_bytes), FormatBytes(s.peak_memory),
                     equal ? "equal" : "DIFFERENT"});
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
  fmt::print("T_compute {:.4f} s (all resident), T_io: acquiring only, per pass\n{}", t_compute,
             FormatTable(table));
  return out;
}

absl::StatusOr<LayerStoreOptions> BudgetOptions(const BenchPrefetchFlags& flags) {
  LayerStoreOptions options{.reader_threads = flags.setup.reader_threads,
                            .load_threads = flags.setup.load_threads};
  if (flags.budget.ends_with('%')) {
    options.weight_budget_percent = std::strtod(flags.budget.c_str(), nullptr);
    if (options.weight_budget_percent > 0) return options;
    return absl::InvalidArgumentError(fmt::format("--budget {} is no share", flags.budget));
  }
  STAGECOACH_ASSIGN_OR_RETURN(options.weight_budget_bytes, ParseBytes(flags.budget));
  return options;
}

absl::StatusOr<std::vector<Regime>> MakeRegimes(const BenchPrefetchFlags& flags) {
  STAGECOACH_ASSIGN_OR_RETURN(LayerStoreOptions budget, BudgetOptions(flags));
  std::vector<Regime> regimes = {{"all resident", "resident", {}, {}},
                                 {"prefetch on", "prefetch_on", budget, {}}};
  budget.prefetch = false;
  regimes.push_back({"prefetch off", "prefetch_off", budget, {}});
  if (flags.host_cache.empty()) return regimes;
  budget.prefetch = true;
  STAGECOACH_ASSIGN_OR_RETURN(budget.host_cache_bytes, ParseBytes(flags.host_cache));
  for (const std::string& codec : flags.codecs) {
    budget.host_cache_codec = codec == "lz4"    ? HostCodec::kLz4
                              : codec == "zstd" ? HostCodec::kZstd
                                                : HostCodec::kNone;
    regimes.push_back(
        {codec == "none" ? "host tier" : "host " + codec, "host_" + codec, budget, {}});
  }
  return regimes;
}

absl::StatusOr<nlohmann::json> BenchRows(const BenchPrefetchFlags& flags, double copy_rate,
                                         std::vector<Regime>& regimes, int rows) {
  for (Regime& regime : regimes) {
    STAGECOACH_ASSIGN_OR_RETURN(regime.steady, MeasureSteady(flags.setup, regime.store, rows));
  }
  const LayerStoreStats& on = regimes[1].steady.stats;
  fmt::print(
      "steady state: budget {} of {} ({}), {} fixed units, window of {}, distance {}, {} "
      "row{} a pass\n",
      flags.budget, FormatBytes(on.slice_bytes), FormatBytes(on.budget_bytes), on.fixed_units,
      on.window_units, on.distance, rows, rows == 1 ? "" : "s");
  const ModelParams& params = flags.setup.model->params();
  nlohmann::json report =
      ReportSteady(regimes, static_cast<int>(StageUnits(params, 0, params.layers).size()));
  ReportCopies(regimes, copy_rate, report);
  ReportHostTier(regimes, report);
  fmt::print("\n");
  report["rows"] = rows;
  return report;
}

// `text` as a number, or so many rows that computing takes as long as loading did in the last
// regime, which is the one with the fastest loads.
absl::StatusOr<int> ParseRows(const BenchPrefetchFlags& flags, const std::string& text,
                              const std::vector<Regime>& regimes) {
  if (text == kBalanced) {
    const Steady& last = regimes.size() > 3 ? regimes[3].steady : regimes[1].steady;
    if (last.acquire_seconds == 0) {
      return absl::InvalidArgumentError("--rows balanced must come after a number");
    }
    return BalancedRows(flags.setup, last.acquire_seconds);
  }
  int rows = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), rows);
  if (error != std::errc() || end != text.data() + text.size() || rows < 1 || rows > kMostRows) {
    return absl::InvalidArgumentError(
        fmt::format("--rows {}: give numbers from 1 to {}, or {}", text, kMostRows, kBalanced));
  }
  return rows;
}

absl::Status RunBenchPrefetch(BenchPrefetchFlags flags) {
  const ReadMode mode = flags.io == "direct"     ? ReadMode::kDirect
                        : flags.io == "buffered" ? ReadMode::kBuffered
                                                 : ReadMode::kAuto;
  STAGECOACH_ASSIGN_OR_RETURN(flags.setup.model, ModelFile::Open(flags.model, {.read_mode = mode}));
  STAGECOACH_ASSIGN_OR_RETURN(std::vector<Regime> regimes, MakeRegimes(flags));
  STAGECOACH_ASSIGN_OR_RETURN(const ColdStart cold, MeasureColdStart(flags.setup));
  PrintColdStart(flags, *flags.setup.model, cold);
  nlohmann::json report = {{"benchmark", "prefetch"},
                           {"model", flags.model},
                           {"device", flags.setup.device},
                           {"budget", flags.budget},
                           {"pinned_copy_bytes_per_second", cold.copy_rate},
                           {"cold_start",
                            {{"plain_read_bytes_per_second", cold.plain_rate},
                             {"first_layer_seconds", cold.first_layer_seconds},
                             {"first_layer_share", cold.first_layer_share},
                             {"first_token_seconds", cold.first_token_seconds},
                             {"first_token_share", cold.first_token_share},
                             {"resident_seconds", cold.resident_seconds},
                             {"load_bytes_per_second", cold.load_rate},
                             {"share_of_ceiling", cold.load_rate / LoadCeiling(cold)},
                             {"read_seconds", cold.read_seconds},
                             {"convert_seconds", cold.convert_seconds}}}};
  for (const std::string& text : flags.rows) {
    STAGECOACH_ASSIGN_OR_RETURN(const int rows, ParseRows(flags, text, regimes));
    STAGECOACH_ASSIGN_OR_RETURN(report["steady"].emplace_back(),
                                BenchRows(flags, cold.copy_rate, regimes, rows));
  }
  return WriteBenchJson(flags.json, report);
}

void AddSetupFlags(CLI::App& command, PrefetchSetup& setup) {
  command.add_option("--device", setup.device, "Where it computes: cpu, cuda:N or auto")
      ->capture_default_str();
  command.add_option("--threads", setup.threads, "Compute threads")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  command
      .add_option("--reader-threads", setup.reader_threads,
                  "Units that are loaded at once; 0 = as suits the device")
      ->check(CLI::Range(0, 64))
      ->capture_default_str();
  command
      .add_option("--load-threads", setup.load_threads,
                  "Threads that read each of them; 0 = as suits the device")
      ->check(CLI::Range(0, 64))
      ->capture_default_str();
  command.add_option("--cold-stages", setup.cold_stages, "Stages of the cold start")
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  command.add_flag("--cached", setup.cached, "Leave the file in the page cache");
  command.add_option("--passes", setup.passes, "Passes after warm-up")
      ->check(CLI::Range(1, 100000))
      ->capture_default_str();
  command.add_option("--prompt-tokens", setup.prompt_tokens, "Length of the prompt")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
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
  AddSetupFlags(*command, flags->setup);
  command
      ->add_option("--rows", flags->rows,
                   "Rows a pass, several in turn (1,96): 1 decodes, more are a prompt; 'balanced' "
                   "after them: as many as take as long to compute as to load")
      ->delimiter(',')
      ->capture_default_str();
  command->add_option("--host-cache", flags->host_cache,
                      "Also with a host tier of this size (2GB)");
  command->add_option("--codecs", flags->codecs, "By these codecs of it")
      ->delimiter(',')
      ->check(CLI::IsMember({"none", "lz4", "zstd"}))
      ->capture_default_str();
  command->add_option("--json", flags->json, "Write the results here too");
  command->callback([flags, &run] { run = [flags] { return RunBenchPrefetch(*flags); }; });
}

}  // namespace stagecoach
