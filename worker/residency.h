// Which units of a slice stay resident when the weight budget does not hold them all. Pure.
#ifndef STAGECOACH_WORKER_RESIDENCY_H_
#define STAGECOACH_WORKER_RESIDENCY_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "model/model_file.h"
#include "worker/unit_parts.h"

namespace stagecoach {

struct UnitSize {
  Unit::Kind kind = Unit::Kind::kLayer;
  uint64_t resident_bytes = 0;  // in the backend's layout
  // Of the backend's memory, held while it loads: LoadBufferBytes, or nothing if the buffers are in
  // the host's memory and the backend has its own.
  uint64_t buffer_bytes = 0;
};
UnitSize MeasureUnit(const Backend& backend, const ModelFile& model, const Unit& unit,
                     const LoadOptions& options = {});

// Execution visits the units in a cycle, for which the best is a set that never leaves, and a
// window through which the others stream.
struct Residency {
  bool streaming = false;   // false: everything is fixed
  std::vector<bool> fixed;  // per unit
  int window_units = 0;     // streaming units that fit beside the fixed ones and a load's buffers
};

// The window holds one unit in use and one per reader under way with its buffer, each counted as
// the largest that streams; fewer readers if that does not fit. The rest of the budget goes to
// fixed units: whichever of {embedding and head, embedding, head, neither} beside as many layers
// as fit, evenly spread so that computing the fixed ones overlaps with loading the others, leaves
// the fewest bytes to stream; the first of the four on a tie, because nothing is computed with the
// embedding that could hide its loading.
// Errors: RESOURCE_EXHAUSTED naming the budget and the smallest that works.
absl::StatusOr<Residency> PlanResidency(const std::vector<UnitSize>& units, uint64_t budget,
                                        int readers);

uint64_t SmallestBudget(const std::vector<UnitSize>& units);

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_RESIDENCY_H_
