// GGUF v2/v3: the metadata and the tensor table of one file. Format: the public GGUF specification.
// Parsing touches only the header; tensor data is never read here.
//
// Where the specification leaves room, or files in the wild differ, the parser
// - refuses a bool byte other than 0 and 1 (kBadType) and arrays of arrays (kUnsupported);
// - wants `general.alignment` to be a power of two of at most kMaxAlignment (kBadAlign);
// - accepts gaps between tensors, tensors out of order and bytes after the last one, but no two
//   tensors that share a byte (kOverlap);
// - refuses names that contain a path separator or "..", though a name is never used as a path;
// - takes a key that looks like a tensor's name, with a value type that looks like a number of
//   dimensions, for the sign of a key count that is too high (kBadType).
#ifndef STAGECOACH_MODEL_GGUF_H_
#define STAGECOACH_MODEL_GGUF_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "model/file.h"
#include "model/tensor_type.h"

namespace stagecoach {

// Bounds on what a file may ask for; over them: ModelError::kLimit.
inline constexpr uint64_t kMaxTensors = 65536;
inline constexpr uint64_t kMaxMetadataKeys = 65536;
inline constexpr uint64_t kMaxKeyBytes = 65535;
inline constexpr uint64_t kMaxStringBytes = 16 << 20;
inline constexpr uint64_t kMaxArrayElements = 4 << 20;
inline constexpr uint64_t kMaxMetadataBytes = 64 << 20;  // held in memory for one header
inline constexpr uint64_t kMaxTensorNameBytes = 63;
inline constexpr uint32_t kMaxTensorDims = 4;
inline constexpr uint64_t kMaxAlignment = 64 << 10;

// Integers are widened on reading (signedness kept), floats likewise. Arrays are flat.
using GgufValue = std::variant<uint64_t, int64_t, double, bool, std::string, std::vector<uint64_t>,
                               std::vector<int64_t>, std::vector<float>, std::vector<double>,
                               std::vector<bool>, std::vector<std::string>>;

// "uint", "int", "float", "bool", "string", "array of uint", ...
std::string_view GgufValueTypeName(const GgufValue& value);

// One tensor of the table. `dims` as stored: dims[0] is the fastest (the columns of a row).
struct TensorInfo {
  std::string name;
  TensorType type = TensorType::kF32;
  std::vector<uint64_t> dims;  // 1..4 entries, each >= 1
  uint64_t offset = 0;         // absolute, in the file `file_index`
  uint64_t bytes = 0;
  int file_index = 0;          // 0 except in split models
  uint64_t record_offset = 0;  // where the tensor's record starts in the header, for messages

  uint64_t columns() const { return dims.empty() ? 0 : dims[0]; }
  uint64_t rows() const {  // product of the other dims; cannot overflow after parsing
    uint64_t n = 1;
    for (size_t i = 1; i < dims.size(); ++i) n *= dims[i];
    return n;
  }
};

// Immutable after Parse; const members are thread-safe.
class GgufFile {
 public:
  // Reads and checks the header of `file`: bounds, types, names, alignment, shapes, offsets,
  // overlaps, and that every tensor lies inside the file. Errors: any ModelError; the message names
  // the key or tensor and the byte offset. `file_index` is put into the tensors.
  static absl::StatusOr<GgufFile> Parse(const RandomAccessFile& file, int file_index = 0);

  uint32_t version() const { return version_; }
  uint64_t alignment() const { return alignment_; }
  uint64_t data_offset() const { return data_offset_; }  // where tensor data starts
  const std::map<std::string, GgufValue, std::less<>>& metadata() const { return metadata_; }
  const std::vector<TensorInfo>& tensors() const { return tensors_; }  // in file order of the table
  const TensorInfo* FindTensor(std::string_view name) const;
  // Where a key's record starts in the file; of an absent key, where the metadata ends.
  uint64_t KeyOffset(std::string_view key) const;

  // xxh3-128 of the header bytes (up to data_offset), 32 hex digits.
  const std::string& header_hash() const { return header_hash_; }

  // Typed look-ups. Absent: nullopt. Another type: kBadType naming the key, what it is and what
  // was wanted. Any integer type that holds the value (and is >= 0 for Uint) is accepted.
  absl::StatusOr<std::optional<uint64_t>> Uint(std::string_view key) const;
  absl::StatusOr<std::optional<double>> Float(std::string_view key) const;  // integers refused
  absl::StatusOr<std::optional<bool>> Bool(std::string_view key) const;
  absl::StatusOr<std::optional<std::string>> String(std::string_view key) const;
  // Arrays: nullptr if absent; owned by this object.
  absl::StatusOr<const std::vector<std::string>*> StringArray(std::string_view key) const;
  absl::StatusOr<const std::vector<float>*> FloatArray(std::string_view key) const;
  absl::StatusOr<std::optional<std::vector<int64_t>>> IntArray(std::string_view key) const;

 private:
  friend class GgufParser;
  uint32_t version_ = 0;
  uint64_t alignment_ = 32;
  uint64_t data_offset_ = 0;
  uint64_t metadata_end_ = 0;
  std::map<std::string, uint64_t, std::less<>> key_offsets_;
  std::map<std::string, GgufValue, std::less<>> metadata_;
  std::vector<TensorInfo> tensors_;
  std::map<std::string, size_t, std::less<>> tensor_index_;
  std::string header_hash_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_MODEL_GGUF_H_
