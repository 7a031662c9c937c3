// Typed errors for model files. Every refusal of bytes from a file is an absl::Status that carries
// one of these codes; its message starts with the code's name and says what to do next.
#ifndef STAGECOACH_MODEL_MODEL_ERROR_H_
#define STAGECOACH_MODEL_MODEL_ERROR_H_

#include <optional>
#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace stagecoach {

enum class ModelError {
  kTruncated,
  kBadMagic,
  kBadVersion,
  kLimit,
  kBadType,
  kBadKey,
  kDuplicate,
  kUnsupported,
  kOverflow,
  kBadAlign,
  kMissingKey,
  kUnsupportedArch,
  kBadHparam,
  kBadName,
  kBadShape,
  kUnsupportedType,
  kBadOffset,
  kOverlap,
  kShapeMismatch,
  kMissingTensor,
  kBadVocab,
  kCorrupt,
  kChanged,
  kIo,
};

// "TRUNCATED", "BAD_MAGIC", ...
std::string_view ModelErrorName(ModelError error);

// A status whose message is "<NAME>: <message>". kIo maps to UNAVAILABLE, kChanged to ABORTED,
// kTruncated/kCorrupt to DATA_LOSS, kUnsupported* to UNIMPLEMENTED, the rest to INVALID_ARGUMENT.
absl::Status MakeModelError(ModelError error, const std::string& message);

// The code carried by `status`, or nullopt if MakeModelError did not make it.
std::optional<ModelError> GetModelError(const absl::Status& status);

// `status` with " (file '<path>')" appended to its message; keeps the code and the ModelError.
absl::Status WithPath(const absl::Status& status, const std::string& path);

}  // namespace stagecoach

#endif  // STAGECOACH_MODEL_MODEL_ERROR_H_
