// What every backend demands of a tensor before it looks at its own limits.
#ifndef STAGECOACH_KERNELS_TENSOR_CHECK_H_
#define STAGECOACH_KERNELS_TENSOR_CHECK_H_

#include <cstddef>
#include <span>

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "model/model_file.h"

namespace stagecoach {

// Norm weights and biases: one dimension, used elementwise. All other roles are matrices.
bool IsVectorRole(TensorRole role);

// A vector has one dimension and a float type; a matrix has two, whole blocks per row and sizes
// that fit an int. Errors: kUnsupportedType, kBadShape; both name the tensor.
absl::Status CheckTensorShape(TensorRole role, const TensorInfo& tensor);

// That `raw` is the tensor's bytes and holds no infinite or NaN block scale.
// Errors: kBadShape, kCorrupt; both name the tensor.
absl::Status CheckTensorData(const TensorInfo& tensor, std::span<const std::byte> raw);

// The same of a part: that it is whole rows of the tensor, from a multiple of kPartRows on and up
// to one or to the last row, and that its weights pass CheckWeights (not looked at if it says so
// itself).
absl::Status CheckTensorPart(const TensorInfo& tensor, const TensorPart& part,
                             const WeightBounds& bounds = {});
// The part's number of rows; it has been checked.
uint64_t PartRows(const TensorInfo& tensor, const TensorPart& part);

}  // namespace stagecoach

#endif  // STAGECOACH_KERNELS_TENSOR_CHECK_H_
