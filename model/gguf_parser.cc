#include "model/gguf_parser.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <type_traits>
#include <utility>

#include "fmt/format.h"
#include "model/checked_math.h"
#include "model/status_macros.h"

namespace stagecoach {
namespace {

constexpr uint32_t kMagic = 0x46554747;  // "GGUF"
constexpr uint32_t kOldestVersion = 2;
constexpr uint32_t kNewestVersion = 3;

// Value types of the metadata, by id.
constexpr uint32_t kTypeBool = 7;
constexpr uint32_t kTypeString = 8;
constexpr uint32_t kTypeArray = 9;

// Bytes of the smallest records: length + name, type, value; length + name, dims, type, offset.
constexpr uint64_t kMinKeyRecord = 8 + 1 + 4 + 1;
constexpr uint64_t kMinTensorRecord = 8 + 1 + 4 + 8 + 4 + 8;
// More than any storage holds: such a count is a wrapped or negative number.
constexpr uint64_t kImpossibleCount = uint64_t{1} << 48;
// What an entry costs in memory besides its text: tree nodes, std::string, the allocator's share.
constexpr uint64_t kKeyCost = 256;
constexpr uint64_t kTensorCost = 320;
constexpr uint64_t kStringCost = 48;

constexpr uint64_t kNumbersPerRead = 4096;

// Calls fn.operator()<Stored, Widened>() for the number type `type`; false for other types.
template <typename Fn>
bool DispatchNumber(uint32_t type, Fn&& fn) {
  switch (type) {
    case 0:
      fn.template operator()<uint8_t, uint64_t>();
      return true;
    case 1:
      fn.template operator()<int8_t, int64_t>();
      return true;
    case 2:
      fn.template operator()<uint16_t, uint64_t>();
      return true;
    case 3:
      fn.template operator()<int16_t, int64_t>();
      return true;
    case 4:
      fn.template operator()<uint32_t, uint64_t>();
      return true;
    case 5:
      fn.template operator()<int32_t, int64_t>();
      return true;
    case 6:
      fn.template operator()<float, float>();
      return true;
    case 10:
      fn.template operator()<uint64_t, uint64_t>();
      return true;
    case 11:
      fn.template operator()<int64_t, int64_t>();
      return true;
    case 12:
      fn.template operator()<double, double>();
      return true;
    default:
      return false;
  }
}

bool EndsLikeTensorName(std::string_view key) {
  return key.ends_with(".weight") || key.ends_with(".bias");
}

}  // namespace

absl::Status GgufParser::Run() {
  STAGECOACH_RETURN_IF_ERROR(ReadMagicAndVersion());
  STAGECOACH_RETURN_IF_ERROR(ReadCounts());
  for (uint64_t i = 0; i < key_count_; ++i) STAGECOACH_RETURN_IF_ERROR(ReadKey(i));
  out_.metadata_end_ = cursor_.position();
  STAGECOACH_RETURN_IF_ERROR(ReadAlignment());
  out_.tensors_.reserve(tensor_count_);
  for (uint64_t i = 0; i < tensor_count_; ++i) STAGECOACH_RETURN_IF_ERROR(ReadTensor(i));
  STAGECOACH_RETURN_IF_ERROR(PlaceTensors());
  STAGECOACH_RETURN_IF_ERROR(CheckOverlaps());
  return cursor_.HashUpTo(out_.data_offset_, &out_.header_hash_);
}

absl::Status GgufParser::Charge(uint64_t bytes) {
  if (bytes > kMaxMetadataBytes - charged_) {
    return Fail(ModelError::kLimit, "the header would take more than {} bytes of memory",
                kMaxMetadataBytes);
  }
  charged_ += bytes;
  return absl::OkStatus();
}

absl::Status GgufParser::ReadMagicAndVersion() {
  uint32_t magic = 0;
  STAGECOACH_RETURN_IF_ERROR(cursor_.ReadNumber(&magic, "the magic number"));
  if (magic != kMagic) {
    char text[sizeof(magic)];
    std::memcpy(text, &magic, sizeof(magic));
    return Fail(ModelError::kBadMagic,
                "the file has {} at byte 0 and not 'GGUF'; convert models of older formats",
                QuoteForMessage({text, sizeof(text)}));
  }
  STAGECOACH_RETURN_IF_ERROR(cursor_.ReadNumber(&out_.version_, "the version"));
  if (out_.version_ >= kOldestVersion && out_.version_ <= kNewestVersion) return absl::OkStatus();
  const uint32_t swapped = __builtin_bswap32(out_.version_);
  if (swapped >= 1 && swapped <= kNewestVersion) {
    return Fail(ModelError::kBadVersion,
                "version {:#x} at byte 4 is {} in big-endian byte order (endianness); convert the "
                "model to little-endian",
                out_.version_, swapped);
  }
  return Fail(ModelError::kBadVersion, "version {} at byte 4; versions {} to {} are supported",
              out_.version_, kOldestVersion, kNewestVersion);
}

absl::Status GgufParser::ReadCounts() {
  STAGECOACH_RETURN_IF_ERROR(cursor_.ReadNumber(&tensor_count_, "the tensor count"));
  STAGECOACH_RETURN_IF_ERROR(cursor_.ReadNumber(&key_count_, "the key count"));
  if (tensor_count_ > kMaxTensors) {
    return Fail(ModelError::kLimit, "tensor count {} at byte 8; at most {} are allowed",
                tensor_count_, kMaxTensors);
  }
  if (key_count_ > kMaxMetadataKeys) {
    return Fail(ModelError::kLimit, "key count {} at byte 16; at most {} are allowed", key_count_,
                kMaxMetadataKeys);
  }
  STAGECOACH_RETURN_IF_ERROR(cursor_.Require(
      key_count_ * kMinKeyRecord + tensor_count_ * kMinTensorRecord,
      fmt::format("a header of {} keys and {} tensors", key_count_, tensor_count_)));
  return Charge(tensor_count_ * kTensorCost);
}

absl::Status GgufParser::ReadKey(uint64_t index) {
  const uint64_t start = cursor_.position();
  what_ = fmt::format("key {} of {} at byte {}", index, key_count_, start);
  uint64_t length = 0;
  STAGECOACH_RETURN_IF_ERROR(cursor_.ReadNumber(&length, what_));
  if (length > kMaxKeyBytes || length > cursor_.remaining()) {
    return Fail(ModelError::kLimit,
                "its name has length {}; at most {} are allowed and {} bytes "
                "are left in the file",
                length, kMaxKeyBytes, cursor_.remaining());
  }
  if (length == 0) return Fail(ModelError::kBadKey, "its name is empty");
  STAGECOACH_RETURN_IF_ERROR(Charge(kKeyCost + 2 * length));
  std::string key(length, '\0');
  STAGECOACH_RETURN_IF_ERROR(cursor_.Read(std::as_writable_bytes(std::span(key)), what_));
  what_ = fmt::format("key {} at byte {}", QuoteForMessage(key), start);
  if (!IsPrintableUtf8(key)) {
    return Fail(ModelError::kBadKey, "its name has control characters or is not UTF-8");
  }
  uint32_t type = 0;
  STAGECOACH_RETURN_IF_ERROR(cursor_.ReadNumber(&type, what_));
  if (EndsLikeTensorName(key) && type >= 1 && type <= kMaxTensorDims) {
    return Fail(ModelError::kBadType,
                "this is a tensor's name where a key is expected; the header's key count {} is "
                "too high",
                key_count_);
  }
  GgufValue value;
  STAGECOACH_RETURN_IF_ERROR(ReadValue(type, &value));
  if (!out_.metadata_.emplace(key, std::move(value)).second) {
    return Fail(ModelError::kDuplicate, "the key is already there at byte {}",
                out_.key_offsets_.find(key)->second);
  }
  out_.key_offsets_.emplace(std::move(key), start);
  return absl::OkStatus();
}

absl::Status GgufParser::ReadValue(uint32_t type, GgufValue* value) {
  if (type == kTypeArray) return ReadArray(value);
  if (type == kTypeString) return ReadScalarString(&value->emplace<std::string>());
  if (type == kTypeBool) return ReadBool(&value->emplace<bool>());
  absl::Status status;
  const bool known = DispatchNumber(type, [&]<typename Stored, typename Widened>() {
    Stored stored = 0;
    status = cursor_.ReadNumber(&stored, what_);
    using Held = std::conditional_t<std::is_same_v<Widened, float>, double, Widened>;
    value->emplace<Held>(stored);
  });
  if (!known) return Fail(ModelError::kBadType, "unknown value type {}", type);
  return status;
}

absl::Status GgufParser::ReadBool(bool* value) {
  uint8_t byte = 0;
  STAGECOACH_RETURN_IF_ERROR(cursor_.ReadNumber(&byte, what_));
  if (byte > 1) {
    return Fail(ModelError::kBadType, "byte {} holds {}, which is no bool (0 or 1)",
                cursor_.position() - 1, byte);
  }
  *value = byte == 1;
  return absl::OkStatus();
}

absl::Status GgufParser::ReadScalarString(std::string* value) {
  uint64_t length = 0;
  STAGECOACH_RETURN_IF_ERROR(cursor_.ReadNumber(&length, what_));
  if (length > kMaxStringBytes) {
    return Fail(ModelError::kLimit, "a string of length {}; at most {} bytes are allowed", length,
                kMaxStringBytes);
  }
  STAGECOACH_RETURN_IF_ERROR(cursor_.Require(length, what_));
  STAGECOACH_RETURN_IF_ERROR(Charge(length));
  value->resize(length);
  return cursor_.Read(std::as_writable_bytes(std::span(*value)), what_);
}

absl::Status GgufParser::CheckArrayBytes(uint64_t count, uint64_t element_bytes) {
  const std::optional<uint64_t> bytes = CheckedMul(count, element_bytes);
  if (!bytes || count >= kImpossibleCount) {
    return Fail(ModelError::kOverflow, "an array of {} elements is larger than any file", count);
  }
  STAGECOACH_RETURN_IF_ERROR(cursor_.Require(*bytes, what_));
  if (count > kMaxArrayElements) {
    return Fail(ModelError::kLimit, "an array of {} elements; at most {} are allowed", count,
                kMaxArrayElements);
  }
  return absl::OkStatus();
}

absl::Status GgufParser::ReadArray(GgufValue* value) {
  uint32_t type = 0;
  uint64_t count = 0;
  STAGECOACH_RETURN_IF_ERROR(cursor_.ReadNumber(&type, what_));
  STAGECOACH_RETURN_IF_ERROR(cursor_.ReadNumber(&count, what_));
  if (type == kTypeArray) return Fail(ModelError::kUnsupported, "an array of arrays");
  if (type == kTypeString) {
    STAGECOACH_RETURN_IF_ERROR(CheckArrayBytes(count, sizeof(uint64_t)));
    return ReadStringArray(count, &value->emplace<std::vector<std::string>>());
  }
  if (type == kTypeBool) {
    STAGECOACH_RETURN_IF_ERROR(CheckArrayBytes(count, 1));
    STAGECOACH_RETURN_IF_ERROR(Charge(count / 8 + 1));
    std::vector<bool>& values = value->emplace<std::vector<bool>>(count);
    for (uint64_t i = 0; i < count; ++i) {
      bool element = false;
      STAGECOACH_RETURN_IF_ERROR(ReadBool(&element));
      values[i] = element;
    }
    return absl::OkStatus();
  }
  absl::Status status;
  const bool known = DispatchNumber(type, [&]<typename Stored, typename Widened>() {
    status = ReadNumbers<Stored>(count, &value->emplace<std::vector<Widened>>());
  });
  if (!known) return Fail(ModelError::kBadType, "an array of the unknown value type {}", type);
  return status;
}

template <typename Stored, typename Widened>
absl::Status GgufParser::ReadNumbers(uint64_t count, std::vector<Widened>* values) {
  STAGECOACH_RETURN_IF_ERROR(CheckArrayBytes(count, sizeof(Stored)));
  STAGECOACH_RETURN_IF_ERROR(Charge(count * sizeof(Widened)));
  values->reserve(count);
  std::array<Stored, kNumbersPerRead> chunk;
  while (values->size() < count) {
    const size_t n = std::min<uint64_t>(chunk.size(), count - values->size());
    const std::span<Stored> part = std::span(chunk).first(n);
    STAGECOACH_RETURN_IF_ERROR(cursor_.Read(std::as_writable_bytes(part), what_));
    values->insert(values->end(), part.begin(), part.end());
  }
  return absl::OkStatus();
}

absl::Status GgufParser::ReadStringArray(uint64_t count, std::vector<std::string>* values) {
  STAGECOACH_RETURN_IF_ERROR(Charge(count * kStringCost));
  values->reserve(count);
  for (uint64_t i = 0; i < count; ++i) {
    uint64_t length = 0;
    STAGECOACH_RETURN_IF_ERROR(cursor_.ReadNumber(&length, what_));
    if (length > cursor_.remaining()) {
      return Fail(ModelError::kTruncated,
                  "element {} at byte {} has length {}, but the file ends at byte {}", i,
                  cursor_.position() - sizeof(length), length, file_.size());
    }
    if (length > kMaxStringBytes) {
      return Fail(ModelError::kLimit, "element {} has length {}; at most {} bytes are allowed", i,
                  length, kMaxStringBytes);
    }
    STAGECOACH_RETURN_IF_ERROR(Charge(length));
    std::string& element = values->emplace_back(length, '\0');
    STAGECOACH_RETURN_IF_ERROR(cursor_.Read(std::as_writable_bytes(std::span(element)), what_));
  }
  return absl::OkStatus();
}

absl::Status GgufParser::ReadAlignment() {
  constexpr std::string_view kKey = "general.alignment";
  const absl::StatusOr<std::optional<uint64_t>> alignment = out_.Uint(kKey);
  if (!alignment.ok()) return alignment.status();
  if (!alignment->has_value()) return absl::OkStatus();
  out_.alignment_ = **alignment;
  if (out_.alignment_ > kMaxAlignment || !std::has_single_bit(out_.alignment_)) {
    what_ = fmt::format("key '{}' at byte {}", kKey, out_.KeyOffset(kKey));
    return Fail(ModelError::kBadAlign, "alignment {} is not a power of two of at most {}",
                out_.alignment_, kMaxAlignment);
  }
  return absl::OkStatus();
}

absl::StatusOr<GgufFile> GgufFile::Parse(const RandomAccessFile& file, int file_index) {
  GgufParser parser(file, file_index);
  if (absl::Status status = parser.Run(); !status.ok()) return WithPath(status, file.path());
  return parser.Take();
}

}  // namespace stagecoach
