#include "worker/metrics.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <string_view>
#include <utility>

#include "fmt/format.h"

namespace stagecoach {
namespace {

constexpr auto kStateNames = std::to_array<std::pair<UnitState, std::string_view>>({
    {UnitState::kAbsent, "absent"},
    {UnitState::kQueued, "queued"},
    {UnitState::kReading, "reading"},
    {UnitState::kConverting, "converting"},
    {UnitState::kResident, "resident"},
    {UnitState::kFailed, "failed"},
});
static_assert(kStateNames.size() == static_cast<size_t>(UnitState::kFailed) + 1);

class Exposition {
 public:
  template <typename Number>
  void Gauge(std::string_view name, std::string_view help, Number value) {
    Add(name, help, "gauge", "", value);
  }
  template <typename Number>
  void Counter(std::string_view name, std::string_view help, Number value) {
    Add(name, help, "counter", "_total", value);
  }

  void Declare(std::string_view name, std::string_view help, std::string_view type) {
    text_ += fmt::format("# HELP stagecoach_worker_{} {}\n# TYPE stagecoach_worker_{} {}\n", name,
                         help, name, type);
  }
  template <typename Number>
  void Sample(std::string_view name, std::string_view labels, Number value) {
    text_ += fmt::format("stagecoach_worker_{}{} {}\n", name, labels, value);
  }

  std::string text() && { return std::move(text_); }

 private:
  template <typename Number>
  void Add(std::string_view name, std::string_view help, std::string_view type,
           std::string_view suffix, Number value) {
    const std::string full_name = fmt::format("{}{}", name, suffix);
    Declare(full_name, help, type);
    Sample(full_name, "", value);
  }

  std::string text_;
};

void AddTiers(const LayerStoreStats& stats, Exposition& out) {
  out.Counter("read_bytes", "Bytes read from the model file.", stats.read_bytes);
  out.Counter("read_seconds", "Reading the model file, summed over threads.", stats.read_seconds);
  out.Counter("convert_seconds", "Converting weights, summed over threads.", stats.convert_seconds);
  out.Counter("host_hits", "Tensors taken from the host tier.", stats.host_hits);
  out.Counter("host_read_bytes", "Bytes taken from the host tier.", stats.host_read_bytes);
  out.Counter("host_seconds", "Taking tensors from the host tier, summed over threads.",
              stats.host_seconds);
  out.Gauge("host_bytes", "Held by the host tier, compressed.", stats.host_bytes);
  out.Gauge("host_raw_bytes", "Held by the host tier, before compression.", stats.host_raw_bytes);
  const double ratio = stats.host_bytes == 0 ? 1.0
                                             : static_cast<double>(stats.host_raw_bytes) /
                                                   static_cast<double>(stats.host_bytes);
  out.Gauge("host_compression_ratio", "Raw bytes by held bytes of the host tier.", ratio);
}

}  // namespace

std::string FormatMetrics(const LayerStoreStats& stats, std::span<const UnitState> units) {
  Exposition out;
  out.Declare("units", "Units of the assignment, by state.", "gauge");
  for (const auto& [state, name] : kStateNames) {
    out.Sample("units", fmt::format("{{state=\"{}\"}}", name),
               std::count(units.begin(), units.end(), state));
  }
  out.Gauge("slice_bytes", "All units of the assignment, as in the file.", stats.slice_bytes);
  out.Gauge("loaded_bytes", "Those of them that are resident.", stats.loaded_bytes);
  out.Gauge("weight_budget_bytes", "Limit of resident weights; 0 = none.", stats.budget_bytes);
  out.Gauge("resident_bytes", "Weights in the backend's layout and loads under way.",
            stats.resident_bytes);
  out.Gauge("peak_resident_bytes", "Highest resident_bytes so far.", stats.peak_resident_bytes);
  out.Gauge("streaming", "1 if the assignment exceeds the weight budget.", stats.streaming ? 1 : 0);
  out.Gauge("fixed_units", "Units that stay resident.", stats.fixed_units);
  out.Gauge("window_units", "Streaming units that fit at once.", stats.window_units);
  out.Gauge("prefetch_distance_units", "Streaming units prefetched ahead.", stats.distance);
  out.Gauge("prefetch_queue_units", "Units waiting in the prefetch queue.", stats.queued_units);
  out.Counter("acquire_hits", "Units that were resident when needed.", stats.hits);
  out.Counter("acquire_late_hits", "Units whose load was under way when needed.", stats.late_hits);
  out.Counter("acquire_misses", "Units loaded synchronously when needed.", stats.misses);
  out.Counter("failed_prefetches", "Loads ahead of use that failed.", stats.failed_prefetches);
  out.Counter("evictions", "Units that gave way to others.", stats.evictions);
  out.Counter("stall_seconds", "Time the stage waited for weights.", stats.stall_seconds);
  out.Counter("load_seconds", "Time during which any unit was loading.", stats.load_seconds);
  AddTiers(stats, out);
  return std::move(out).text();
}

}  // namespace stagecoach
