#include "kernels/tensor_check.h"

#include <cstdint>
#include <limits>
#include <optional>
#include <string>

#include "fmt/format.h"
#include "model/checked_math.h"
#include "model/model_error.h"
#include "model/status_macros.h"

namespace stagecoach {

bool IsVectorRole(TensorRole role) {
  switch (role) {
    case TensorRole::kOutputNorm:
    case TensorRole::kAttnNorm:
    case TensorRole::kAttnQBias:
    case TensorRole::kAttnKBias:
    case TensorRole::kAttnVBias:
    case TensorRole::kAttnOutputBias:
    case TensorRole::kFfnNorm:
      return true;
    case TensorRole::kTokenEmbedding:
    case TensorRole::kOutput:
    case TensorRole::kAttnQ:
    case TensorRole::kAttnK:
    case TensorRole::kAttnV:
    case TensorRole::kAttnOutput:
    case TensorRole::kFfnGate:
    case TensorRole::kFfnUp:
    case TensorRole::kFfnDown:
      return false;
  }
  __builtin_unreachable();
}

absl::Status CheckTensorShape(TensorRole role, const TensorInfo& tensor) {
  const TensorTypeInfo& type = GetTensorTypeInfo(tensor.type);
  if (IsVectorRole(role) && type.block_elements != 1) {
    return MakeModelError(ModelError::kUnsupportedType,
                          fmt::format("tensor {} ({}) is {}; norms and biases must be F32, F16 or "
                                      "BF16",
                                      tensor.name, TensorRoleName(role), type.name));
  }
  const size_t wanted_dims = IsVectorRole(role) ? 1 : 2;
  if (tensor.dims.size() != wanted_dims) {
    return MakeModelError(ModelError::kBadShape,
                          fmt::format("tensor {} ({}) has {} dimensions instead of {}", tensor.name,
                                      TensorRoleName(role), tensor.dims.size(), wanted_dims));
  }
  constexpr uint64_t kMaxSide = std::numeric_limits<int32_t>::max();
  if (tensor.columns() == 0 || tensor.columns() > kMaxSide || tensor.rows() == 0 ||
      tensor.rows() > kMaxSide || tensor.columns() % type.block_elements != 0) {
    return MakeModelError(
        ModelError::kBadShape,
        fmt::format("tensor {} ({}) of {} x {} elements is not rows of whole {} blocks",
                    tensor.name, TensorRoleName(role), tensor.rows(), tensor.columns(), type.name));
  }
  return absl::OkStatus();
}

absl::Status CheckTensorData(const TensorInfo& tensor, std::span<const std::byte> raw) {
  STAGECOACH_ASSIGN_OR_RETURN(const uint64_t row_bytes, RowBytes(tensor.type, tensor.columns()));
  const std::optional<uint64_t> bytes = CheckedMul(row_bytes, tensor.rows());
  if (bytes != raw.size()) {
    return MakeModelError(
        ModelError::kBadShape,
        fmt::format("tensor {} comes with {} bytes but its shape needs {}", tensor.name, raw.size(),
                    bytes ? fmt::format("{}", *bytes) : "more than 2^64"));
  }
  return CheckWeights(tensor, 0, raw, {});
}

absl::Status CheckTensorPart(const TensorInfo& tensor, const TensorPart& part,
                             const WeightBounds& bounds) {
  STAGECOACH_ASSIGN_OR_RETURN(const uint64_t row_bytes, RowBytes(tensor.type, tensor.columns()));
  const uint64_t rows = row_bytes == 0 ? 0 : part.raw.size() / row_bytes;
  const bool whole_rows = row_bytes > 0 && part.raw.size() % row_bytes == 0 && rows > 0;
  if (!whole_rows || part.first_row % kPartRows != 0 || part.first_row > tensor.rows() ||
      rows > tensor.rows() - part.first_row ||
      (part.first_row + rows < tensor.rows() && rows % kPartRows != 0)) {
    return MakeModelError(
        ModelError::kBadShape,
        fmt::format("tensor {} comes with {} bytes from row {} on, which are no part of its {} "
                    "rows of {} bytes",
                    tensor.name, part.raw.size(), part.first_row, tensor.rows(), row_bytes));
  }
  return part.checked ? absl::OkStatus() : CheckWeights(tensor, part.first_row, part.raw, bounds);
}

uint64_t PartRows(const TensorInfo& tensor, const TensorPart& part) {
  return part.raw.size() / RowBytes(tensor.type, tensor.columns()).value();
}

}  // namespace stagecoach
