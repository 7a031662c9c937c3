// Tensor element types of GGUF and their block geometry (ggml's ids).
#ifndef STAGECOACH_MODEL_TENSOR_TYPE_H_
#define STAGECOACH_MODEL_TENSOR_TYPE_H_

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace stagecoach {

enum class TensorType : uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ2_K = 10,
  kQ3_K = 11,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kBF16 = 30,
};

struct TensorTypeInfo {
  TensorType type;
  std::string_view name;    // "Q4_K"
  uint32_t block_elements;  // consecutive elements of a row that share a block
  uint32_t block_bytes;
};

// All supported types, in order of their ids.
std::span<const TensorTypeInfo> AllTensorTypes();

// nullptr for an id that is unknown, removed or not supported.
const TensorTypeInfo* FindTensorType(uint32_t ggml_id);
const TensorTypeInfo& GetTensorTypeInfo(TensorType type);

// Case-insensitive ("q4_k", "F16"); nullopt if there is no such type.
std::optional<TensorType> ParseTensorType(std::string_view name);

// What ggml calls an id that this project does not support ("IQ2_XXS", "unknown type 77").
std::string DescribeTensorTypeId(uint32_t ggml_id);

// Bytes of one row. Errors: kBadShape if columns is not a multiple of the block, kOverflow.
absl::StatusOr<uint64_t> RowBytes(TensorType type, uint64_t columns);

}  // namespace stagecoach

#endif  // STAGECOACH_MODEL_TENSOR_TYPE_H_
