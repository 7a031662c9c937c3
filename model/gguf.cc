#include "model/gguf.h"

#include <utility>

#include "fmt/format.h"
#include "model/model_error.h"

namespace stagecoach {
namespace {

absl::Status WrongType(const GgufFile& gguf, std::string_view key, const GgufValue& value,
                       std::string_view wanted) {
  return MakeModelError(ModelError::kBadType,
                        fmt::format("key '{}' at byte {} is {}, but {} is wanted", key,
                                    gguf.KeyOffset(key), GgufValueTypeName(value), wanted));
}

const GgufValue* FindValue(const GgufFile& gguf, std::string_view key) {
  const auto it = gguf.metadata().find(key);
  return it == gguf.metadata().end() ? nullptr : &it->second;
}

// The value of `key` if it is held as exactly T.
template <typename T>
absl::StatusOr<const T*> Find(const GgufFile& gguf, std::string_view key, std::string_view wanted) {
  const GgufValue* value = FindValue(gguf, key);
  if (value == nullptr) return static_cast<const T*>(nullptr);
  if (const T* held = std::get_if<T>(value)) return held;
  return WrongType(gguf, key, *value, wanted);
}

template <typename T>
absl::StatusOr<std::optional<T>> FindCopy(const GgufFile& gguf, std::string_view key,
                                          std::string_view wanted) {
  const absl::StatusOr<const T*> found = Find<T>(gguf, key, wanted);
  if (!found.ok()) return found.status();
  return *found == nullptr ? std::optional<T>() : std::optional<T>(**found);
}

}  // namespace

std::string_view GgufValueTypeName(const GgufValue& value) {
  static constexpr std::string_view kNames[] = {
      "uint",
      "int",
      "float",
      "bool",
      "string",
      "array of uint",
      "array of int",
      "array of float",
      "array of double",
      "array of bool",
      "array of string",
  };
  static_assert(std::size(kNames) == std::variant_size_v<GgufValue>);
  return kNames[value.index()];
}

const TensorInfo* GgufFile::FindTensor(std::string_view name) const {
  const auto it = tensor_index_.find(name);
  return it == tensor_index_.end() ? nullptr : &tensors_[it->second];
}

uint64_t GgufFile::KeyOffset(std::string_view key) const {
  const auto it = key_offsets_.find(key);
  return it == key_offsets_.end() ? metadata_end_ : it->second;
}

absl::StatusOr<std::optional<uint64_t>> GgufFile::Uint(std::string_view key) const {
  const GgufValue* value = FindValue(*this, key);
  if (value == nullptr) return std::nullopt;
  if (const uint64_t* held = std::get_if<uint64_t>(value)) return *held;
  const int64_t* held = std::get_if<int64_t>(value);
  if (held == nullptr) return WrongType(*this, key, *value, "a non-negative integer");
  if (*held < 0) {
    return MakeModelError(ModelError::kBadType,
                          fmt::format("key '{}' at byte {} is {}, but a non-negative integer is "
                                      "wanted",
                                      key, KeyOffset(key), *held));
  }
  return static_cast<uint64_t>(*held);
}

absl::StatusOr<std::optional<double>> GgufFile::Float(std::string_view key) const {
  return FindCopy<double>(*this, key, "a float");
}

absl::StatusOr<std::optional<bool>> GgufFile::Bool(std::string_view key) const {
  return FindCopy<bool>(*this, key, "a bool");
}

absl::StatusOr<std::optional<std::string>> GgufFile::String(std::string_view key) const {
  return FindCopy<std::string>(*this, key, "a string");
}

absl::StatusOr<const std::vector<std::string>*> GgufFile::StringArray(std::string_view key) const {
  return Find<std::vector<std::string>>(*this, key, "an array of strings");
}

absl::StatusOr<const std::vector<float>*> GgufFile::FloatArray(std::string_view key) const {
  return Find<std::vector<float>>(*this, key, "an array of float32");
}

absl::StatusOr<std::optional<std::vector<int64_t>>> GgufFile::IntArray(std::string_view key) const {
  const GgufValue* value = FindValue(*this, key);
  if (value == nullptr) return std::nullopt;
  if (const auto* held = std::get_if<std::vector<int64_t>>(value)) return *held;
  const auto* held = std::get_if<std::vector<uint64_t>>(value);
  if (held == nullptr) return WrongType(*this, key, *value, "an array of integers");
  std::vector<int64_t> converted;
  converted.reserve(held->size());
  for (const uint64_t element : *held) {
    if (element > INT64_MAX) {
      return MakeModelError(ModelError::kBadType,
                            fmt::format("key '{}' at byte {} has the element {}, which is no int64",
                                        key, KeyOffset(key), element));
    }
    converted.push_back(static_cast<int64_t>(element));
  }
  return converted;
}

}  // namespace stagecoach
