// Tensor bytes of any supported type to floats, on the host.
#ifndef STAGECOACH_MODEL_DEQUANTIZE_H_
#define STAGECOACH_MODEL_DEQUANTIZE_H_

#include <cstddef>
#include <span>

#include "absl/status/status.h"
#include "model/tensor_type.h"

namespace stagecoach {

// Decodes out.size() consecutive elements: one row, or whole rows one after the other. `raw` may
// have any alignment. Errors: kBadShape if out.size() is not a multiple of the block or raw.size()
// is not the bytes of that many elements.
absl::Status DequantizeRow(TensorType type, std::span<const std::byte> raw, std::span<float> out);

// OK if no block of `raw` has an infinite or NaN scale (for float types: element). Errors: kCorrupt
// with the index of the first bad block; kBadShape if raw is not a whole number of blocks.
absl::Status FiniteScales(TensorType type, std::span<const std::byte> raw);

}  // namespace stagecoach

#endif  // STAGECOACH_MODEL_DEQUANTIZE_H_
