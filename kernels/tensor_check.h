// What every backend demands of a tensor before it looks at its own limits.
#ifndef STAGECOACH_KERNELS_TENSOR_CHECK_H_
#define STAGECOACH_KERNELS_TENSOR_CHECK_H_

#include <cstddef>
#include <span>

#include "absl/status/status.h"
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

}  // namespace stagecoach

#endif  // STAGECOACH_KERNELS_TENSOR_CHECK_H_
