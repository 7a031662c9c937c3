#include "model/tensor_type.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <cstddef>

#include "fmt/format.h"
#include "model/checked_math.h"
#include "model/model_error.h"

namespace stagecoach {
namespace {

constexpr auto kTypes = std::to_array<TensorTypeInfo>({
    {TensorType::kF32, "F32", 1, 4},
    {TensorType::kF16, "F16", 1, 2},
    {TensorType::kQ4_0, "Q4_0", 32, 18},
    {TensorType::kQ4_1, "Q4_1", 32, 20},
    {TensorType::kQ5_0, "Q5_0", 32, 22},
    {TensorType::kQ5_1, "Q5_1", 32, 24},
    {TensorType::kQ8_0, "Q8_0", 32, 34},
    {TensorType::kQ2_K, "Q2_K", 256, 84},
    {TensorType::kQ3_K, "Q3_K", 256, 110},
    {TensorType::kQ4_K, "Q4_K", 256, 144},
    {TensorType::kQ5_K, "Q5_K", 256, 176},
    {TensorType::kQ6_K, "Q6_K", 256, 210},
    {TensorType::kBF16, "BF16", 1, 2},
});

// ggml's names by id, for messages about types that are not in kTypes.
constexpr auto kGgmlNames = std::to_array<std::string_view>({
    "F32",   "F16",        "Q4_0",       "Q4_1",       "Q4_2",     "Q4_3",     "Q5_0",
    "Q5_1",  "Q8_0",       "Q8_1",       "Q2_K",       "Q3_K",     "Q4_K",     "Q5_K",
    "Q6_K",  "Q8_K",       "IQ2_XXS",    "IQ2_XS",     "IQ3_XXS",  "IQ1_S",    "IQ4_NL",
    "IQ3_S", "IQ2_S",      "IQ4_XS",     "I8",         "I16",      "I32",      "I64",
    "F64",   "IQ1_M",      "BF16",       "Q4_0_4_4",   "Q4_0_4_8", "Q4_0_8_8", "TQ1_0",
    "TQ2_0", "IQ4_NL_4_4", "IQ4_NL_4_8", "IQ4_NL_8_8", "MXFP4",
});

bool EqualsIgnoringCase(std::string_view a, std::string_view b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](unsigned char x, unsigned char y) {
    return std::tolower(x) == std::tolower(y);
  });
}

}  // namespace

std::span<const TensorTypeInfo> AllTensorTypes() { return kTypes; }

const TensorTypeInfo* FindTensorType(uint32_t ggml_id) {
  for (const TensorTypeInfo& info : kTypes) {
    if (static_cast<uint32_t>(info.type) == ggml_id) return &info;
  }
  return nullptr;
}

const TensorTypeInfo& GetTensorTypeInfo(TensorType type) {
  return *FindTensorType(static_cast<uint32_t>(type));
}

std::optional<TensorType> ParseTensorType(std::string_view name) {
  for (const TensorTypeInfo& info : kTypes) {
    if (EqualsIgnoringCase(info.name, name)) return info.type;
  }
  return std::nullopt;
}

std::string DescribeTensorTypeId(uint32_t ggml_id) {
  if (ggml_id < kGgmlNames.size()) return std::string(kGgmlNames[ggml_id]);
  return fmt::format("unknown type {}", ggml_id);
}

absl::StatusOr<uint64_t> RowBytes(TensorType type, uint64_t columns) {
  const TensorTypeInfo& info = GetTensorTypeInfo(type);
  if (columns % info.block_elements != 0) {
    return MakeModelError(ModelError::kBadShape,
                          fmt::format("a row of {} elements is not whole {} blocks of {}", columns,
                                      info.name, info.block_elements));
  }
  const std::optional<uint64_t> bytes = CheckedMul(columns / info.block_elements, info.block_bytes);
  if (!bytes) {
    return MakeModelError(ModelError::kOverflow,
                          fmt::format("a row of {} {} elements is too large", columns, info.name));
  }
  return *bytes;
}

}  // namespace stagecoach
