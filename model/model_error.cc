#include "model/model_error.h"

#include <array>
#include <cstddef>
#include <utility>

#include "absl/strings/cord.h"
#include "fmt/format.h"

namespace stagecoach {
namespace {

// Carries the name of the code, so that GetModelError need not trust the message.
constexpr char kPayloadUrl[] = "stagecoach/model_error";

struct ErrorEntry {
  ModelError error;
  std::string_view name;
  absl::StatusCode code;
};

constexpr auto kEntries = std::to_array<ErrorEntry>({
    {ModelError::kTruncated, "TRUNCATED", absl::StatusCode::kDataLoss},
    {ModelError::kBadMagic, "BAD_MAGIC", absl::StatusCode::kInvalidArgument},
    {ModelError::kBadVersion, "BAD_VERSION", absl::StatusCode::kInvalidArgument},
    {ModelError::kLimit, "LIMIT", absl::StatusCode::kInvalidArgument},
    {ModelError::kBadType, "BAD_TYPE", absl::StatusCode::kInvalidArgument},
    {ModelError::kBadKey, "BAD_KEY", absl::StatusCode::kInvalidArgument},
    {ModelError::kDuplicate, "DUPLICATE", absl::StatusCode::kInvalidArgument},
    {ModelError::kUnsupported, "UNSUPPORTED", absl::StatusCode::kUnimplemented},
    {ModelError::kOverflow, "OVERFLOW", absl::StatusCode::kInvalidArgument},
    {ModelError::kBadAlign, "BAD_ALIGN", absl::StatusCode::kInvalidArgument},
    {ModelError::kMissingKey, "MISSING_KEY", absl::StatusCode::kInvalidArgument},
    {ModelError::kUnsupportedArch, "UNSUPPORTED_ARCH", absl::StatusCode::kUnimplemented},
    {ModelError::kBadHparam, "BAD_HPARAM", absl::StatusCode::kInvalidArgument},
    {ModelError::kBadName, "BAD_NAME", absl::StatusCode::kInvalidArgument},
    {ModelError::kBadShape, "BAD_SHAPE", absl::StatusCode::kInvalidArgument},
    {ModelError::kUnsupportedType, "UNSUPPORTED_TYPE", absl::StatusCode::kUnimplemented},
    {ModelError::kBadOffset, "BAD_OFFSET", absl::StatusCode::kInvalidArgument},
    {ModelError::kOverlap, "OVERLAP", absl::StatusCode::kInvalidArgument},
    {ModelError::kShapeMismatch, "SHAPE_MISMATCH", absl::StatusCode::kInvalidArgument},
    {ModelError::kMissingTensor, "MISSING_TENSOR", absl::StatusCode::kInvalidArgument},
    {ModelError::kBadVocab, "BAD_VOCAB", absl::StatusCode::kInvalidArgument},
    {ModelError::kCorrupt, "CORRUPT", absl::StatusCode::kDataLoss},
    {ModelError::kChanged, "CHANGED", absl::StatusCode::kAborted},
    {ModelError::kIo, "IO", absl::StatusCode::kUnavailable},
});

constexpr bool EntriesInEnumOrder() {
  for (size_t i = 0; i < kEntries.size(); ++i) {
    if (kEntries[i].error != static_cast<ModelError>(i)) return false;
  }
  return kEntries.size() == static_cast<size_t>(ModelError::kIo) + 1;
}
static_assert(EntriesInEnumOrder());

const ErrorEntry& EntryOf(ModelError error) { return kEntries[static_cast<size_t>(error)]; }

}  // namespace

std::string_view ModelErrorName(ModelError error) { return EntryOf(error).name; }

absl::Status MakeModelError(ModelError error, const std::string& message) {
  const ErrorEntry& entry = EntryOf(error);
  absl::Status status(entry.code, fmt::format("{}: {}", entry.name, message));
  status.SetPayload(kPayloadUrl, absl::Cord(std::string(entry.name)));
  return status;
}

std::optional<ModelError> GetModelError(const absl::Status& status) {
  const auto payload = status.GetPayload(kPayloadUrl);
  if (!payload) return std::nullopt;
  const std::string name(*payload);
  for (const ErrorEntry& entry : kEntries) {
    if (entry.name == name) return entry.error;
  }
  return std::nullopt;
}

absl::Status WithPath(const absl::Status& status, const std::string& path) {
  if (status.ok()) return status;
  const std::string message(status.message().data(), status.message().size());
  absl::Status annotated(status.code(), fmt::format("{} (file '{}')", message, path));
  status.ForEachPayload([&](absl::string_view url, const absl::Cord& payload) {
    annotated.SetPayload(url, payload);
  });
  return annotated;
}

}  // namespace stagecoach
