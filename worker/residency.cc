#include "worker/residency.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <optional>

#include "fmt/format.h"

namespace stagecoach {
namespace {

struct KeptKinds {
  bool embedding;
  bool head;
};
constexpr std::array<KeptKinds, 4> kPreference = {
    {{true, true}, {true, false}, {false, true}, {false, false}}};

bool Keeps(const KeptKinds& kept, Unit::Kind kind) {
  return (kind == Unit::Kind::kEmbedding && kept.embedding) ||
         (kind == Unit::Kind::kHead && kept.head);
}

// What follows from keeping some kinds of unit: the totals of those, and the largest of the rest.
struct Split {
  Split(const std::vector<UnitSize>& units, const KeptKinds& kept) {
    for (const UnitSize& unit : units) {
      if (Keeps(kept, unit.kind)) {
        fixed_bytes += unit.resident_bytes;
        fixed_buffer = std::max(fixed_buffer, unit.buffer_bytes);
      } else {
        ++streaming;
        largest = std::max(largest, unit.resident_bytes);
        buffer = std::max(buffer, unit.buffer_bytes);
      }
    }
  }
  uint64_t Window(uint64_t readers) const {
    const uint64_t slots = std::min(readers + 1, streaming);
    return std::max(slots * largest + std::min(readers, streaming) * buffer, fixed_buffer);
  }

  uint64_t fixed_bytes = 0;
  uint64_t fixed_buffer = 0;  // the largest needed to load one of them
  uint64_t streaming = 0;     // number of units
  uint64_t largest = 0;
  uint64_t buffer = 0;
};

uint64_t WholeSlice(const std::vector<UnitSize>& units) {
  uint64_t bytes = 0, buffer = 0;
  for (const UnitSize& unit : units) {
    bytes += unit.resident_bytes;
    buffer = std::max(buffer, unit.buffer_bytes);
  }
  return bytes + buffer;
}

// Marks as many as possible of the `candidates`, evenly spread, within `room` bytes, but never all.
// Returns their bytes.
uint64_t FixEvenly(const std::vector<UnitSize>& units, const std::vector<size_t>& candidates,
                   uint64_t room, std::vector<bool>& fixed) {
  const size_t n = candidates.size();
  for (size_t count = n - 1; count > 0; --count) {
    const auto chosen = [&](size_t i) { return (i + 1) * count / n > i * count / n; };
    uint64_t bytes = 0;
    for (size_t i = 0; i < n; ++i) {
      if (chosen(i)) bytes += units[candidates[i]].resident_bytes;
    }
    if (bytes > room) continue;
    for (size_t i = 0; i < n; ++i) fixed[candidates[i]] = fixed[candidates[i]] || chosen(i);
    return bytes;
  }
  return 0;
}

// The residency that keeps `kept`, or nullopt if the budget is too small for that.
std::optional<Residency> Keep(const std::vector<UnitSize>& units, const KeptKinds& kept,
                              uint64_t budget, int readers, uint64_t* fixed_bytes) {
  const Split split(units, kept);
  if (split.streaming == 0) return std::nullopt;
  while (readers > 1 && split.fixed_bytes + split.Window(readers) > budget) --readers;
  const uint64_t taken = split.fixed_bytes + split.Window(readers);
  if (taken > budget) return std::nullopt;
  Residency residency{.streaming = true};
  std::vector<size_t> layers;
  for (size_t i = 0; i < units.size(); ++i) {
    residency.fixed.push_back(Keeps(kept, units[i].kind));
    if (units[i].kind == Unit::Kind::kLayer) layers.push_back(i);
  }
  *fixed_bytes = split.fixed_bytes;
  if (!layers.empty()) *fixed_bytes += FixEvenly(units, layers, budget - taken, residency.fixed);
  residency.window_units = static_cast<int>(
      std::min((budget - *fixed_bytes - split.buffer) / std::max<uint64_t>(1, split.largest),
               split.streaming));
  return residency;
}

}  // namespace

UnitSize MeasureUnit(const Backend& backend, const ModelFile& model, const Unit& unit,
                     const LoadOptions& options) {
  const BackendInfo info = backend.info();
  const std::vector<UnitTensor>& tensors = model.UnitTensors(unit);
  UnitSize size{.kind = unit.kind};
  for (const UnitTensor& entry : tensors) {
    size.resident_bytes += backend.ResidentBytes(entry.role, *entry.tensor);
  }
  if (info.own_memory) return size;
  size.buffer_bytes = LoadBufferBytes(CutUnit(tensors, options), LoadSlots(info, options), options);
  return size;
}

uint64_t SmallestBudget(const std::vector<UnitSize>& units) {
  uint64_t smallest = WholeSlice(units);
  for (const KeptKinds& kept : kPreference) {
    const Split split(units, kept);
    smallest = std::min(smallest, split.fixed_bytes + split.Window(/*readers=*/1));
  }
  return smallest;
}

absl::StatusOr<Residency> PlanResidency(const std::vector<UnitSize>& units, uint64_t budget,
                                        int readers) {
  const Residency whole{.fixed = std::vector<bool>(units.size(), true)};
  if (WholeSlice(units) <= budget) return whole;
  std::optional<Residency> best;
  uint64_t best_bytes = 0;
  for (const KeptKinds& kept : kPreference) {
    uint64_t bytes = 0;
    std::optional<Residency> candidate = Keep(units, kept, budget, readers, &bytes);
    if (!candidate || (best && bytes <= best_bytes)) continue;
    best = std::move(candidate);
    best_bytes = bytes;
  }
  if (best) return *std::move(best);
  return absl::ResourceExhaustedError(
      fmt::format("a weight budget of {} bytes is too small for this slice; the smallest that "
                  "works is {} bytes",
                  budget, SmallestBudget(units)));
}

}  // namespace stagecoach
