// What a backend that multiplies weights in a narrow format can hold of them, and the
// check of a file's blocks against it (model/block_decode.h: delta, scale, quant, min).
#ifndef STAGECOACH_KERNELS_WEIGHT_BOUNDS_H_
#define STAGECOACH_KERNELS_WEIGHT_BOUNDS_H_

#include <cstddef>
#include <limits>
#include <span>

#include "absl/status/status.h"
#include "model/gguf.h"

namespace stagecoach {

// Of magnitudes. By default everything finite is held.
struct WeightBounds {
  static constexpr float kNone = std::numeric_limits<float>::infinity();
  float delta = kNone;      // delta is less
  float delta_min = kNone;  // delta_min is less
  float scale = kNone;      // delta * scale of a group, rounded to a half, is less
  float weight = kNone;     // delta_min * min of a group, and every weight, is this at most;
                            // the only one that float types have

  bool any() const {
    return delta != kNone || delta_min != kNone || scale != kNone || weight != kNone;
  }
};

// `raw`: whole rows of the tensor, from row `first_row` on, whose bytes are whole blocks. Reads
// each block once, and little more than its deltas unless it comes near a bound. Errors, naming
// tensor, row and block: kCorrupt for a scale (of float types: an element) that is not finite;
// kUnsupported, with the value and the bound, for a block that is not within `bounds`.
absl::Status CheckWeights(const TensorInfo& tensor, size_t first_row,
                          std::span<const std::byte> raw, const WeightBounds& bounds);

}  // namespace stagecoach

#endif  // STAGECOACH_KERNELS_WEIGHT_BOUNDS_H_
