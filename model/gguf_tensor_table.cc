#include <algorithm>
#include <cstddef>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "model/checked_math.h"
#include "model/gguf_parser.h"
#include "model/status_macros.h"
#include "model/unicode.h"

namespace stagecoach {

std::string QuoteForMessage(std::string_view text) {
  constexpr size_t kShown = 80;
  const std::string escaped = absl::Utf8SafeCEscape({text.data(), std::min(text.size(), kShown)});
  return fmt::format("'{}{}'", escaped, text.size() > kShown ? "..." : "");
}

// Whether `text` is UTF-8 without control characters (U+0000..U+001F, U+007F..U+009F).
bool IsPrintableUtf8(std::string_view text) {
  while (!text.empty()) {
    const Utf8Character character = FirstUtf8Character(text);
    if (character.status != Utf8Status::kValid || character.code < 0x20 ||
        (character.code >= 0x7f && character.code < 0xa0)) {
      return false;
    }
    text.remove_prefix(character.length);
  }
  return true;
}

absl::Status GgufParser::ReadTensorName(uint64_t index, std::string* name) {
  const uint64_t start = cursor_.position();
  what_ = fmt::format("tensor {} of {} at byte {}", index, tensor_count_, start);
  uint64_t length = 0;
  STAGECOACH_RETURN_IF_ERROR(cursor_.ReadNumber(&length, what_));
  if (length == 0 || length > kMaxTensorNameBytes) {
    return Fail(ModelError::kBadName, "its name has length {}; 1 to {} are allowed", length,
                kMaxTensorNameBytes);
  }
  name->resize(length);
  STAGECOACH_RETURN_IF_ERROR(cursor_.Read(std::as_writable_bytes(std::span(*name)), what_));
  what_ = fmt::format("tensor {} at byte {}", QuoteForMessage(*name), start);
  if (!IsPrintableUtf8(*name)) {
    return Fail(ModelError::kBadName, "its name has control characters or is not UTF-8");
  }
  if (name->find_first_of("/\\") != std::string::npos || name->find("..") != std::string::npos) {
    return Fail(ModelError::kBadName, "its name looks like a path");
  }
  return absl::OkStatus();
}

absl::Status GgufParser::ReadShape(TensorInfo* tensor) {
  uint32_t dim_count = 0;
  STAGECOACH_RETURN_IF_ERROR(cursor_.ReadNumber(&dim_count, what_));
  if (dim_count == 0 || dim_count > kMaxTensorDims) {
    return Fail(ModelError::kBadShape, "{} dimensions; 1 to {} are allowed", dim_count,
                kMaxTensorDims);
  }
  tensor->dims.resize(dim_count);
  for (uint64_t& dim : tensor->dims) {
    STAGECOACH_RETURN_IF_ERROR(cursor_.ReadNumber(&dim, what_));
    if (dim == 0 || dim > INT64_MAX) {
      return Fail(ModelError::kBadShape, "dimension {} at byte {}", static_cast<int64_t>(dim),
                  cursor_.position() - sizeof(dim));
    }
  }
  return absl::OkStatus();
}

absl::Status GgufParser::SizeTensor(uint32_t type_id, TensorInfo* tensor) {
  const TensorTypeInfo* type = FindTensorType(type_id);
  if (type == nullptr) {
    return Fail(ModelError::kUnsupportedType,
                "tensor type {} ({}) is not supported; quantise the model to another type", type_id,
                DescribeTensorTypeId(type_id));
  }
  tensor->type = type->type;
  if (tensor->columns() % type->block_elements != 0) {
    return Fail(ModelError::kBadShape, "rows of {} elements are not whole {} blocks of {}",
                tensor->columns(), type->name, type->block_elements);
  }
  std::optional<uint64_t> elements = 1;
  for (const uint64_t dim : tensor->dims) {
    elements = CheckedMul(*elements, dim);
    if (!elements) return Fail(ModelError::kOverflow, "the product of its dimensions wraps");
  }
  const std::optional<uint64_t> bytes =
      CheckedMul(*elements / type->block_elements, type->block_bytes);
  if (!bytes) return Fail(ModelError::kOverflow, "its size in bytes wraps");
  tensor->bytes = *bytes;
  return absl::OkStatus();
}

absl::Status GgufParser::ReadTensor(uint64_t index) {
  TensorInfo tensor;
  tensor.file_index = file_index_;
  tensor.record_offset = cursor_.position();
  STAGECOACH_RETURN_IF_ERROR(ReadTensorName(index, &tensor.name));
  STAGECOACH_RETURN_IF_ERROR(ReadShape(&tensor));
  uint32_t type_id = 0;
  STAGECOACH_RETURN_IF_ERROR(cursor_.ReadNumber(&type_id, what_));
  STAGECOACH_RETURN_IF_ERROR(SizeTensor(type_id, &tensor));
  // Relative to the data for now; PlaceTensors makes it absolute.
  STAGECOACH_RETURN_IF_ERROR(cursor_.ReadNumber(&tensor.offset, what_));
  const auto [it, inserted] = out_.tensor_index_.emplace(tensor.name, index);
  if (!inserted) {
    return Fail(ModelError::kDuplicate, "the tensor is already there at byte {}",
                out_.tensors_[it->second].record_offset);
  }
  out_.tensors_.push_back(std::move(tensor));
  return absl::OkStatus();
}

absl::Status GgufParser::PlaceTensors() {
  // Cannot wrap: the position is within the file and the alignment is small.
  out_.data_offset_ = *CheckedAlignUp(cursor_.position(), out_.alignment_);
  for (TensorInfo& tensor : out_.tensors_) {
    what_ = fmt::format("tensor {} at byte {}", QuoteForMessage(tensor.name), tensor.record_offset);
    if (tensor.offset % out_.alignment_ != 0) {
      return Fail(ModelError::kBadOffset, "its offset {} is not a multiple of the alignment {}",
                  tensor.offset, out_.alignment_);
    }
    const std::optional<uint64_t> begin = CheckedAdd(out_.data_offset_, tensor.offset);
    const std::optional<uint64_t> end = begin ? CheckedAdd(*begin, tensor.bytes) : std::nullopt;
    if (!end) return Fail(ModelError::kOverflow, "its offset {} wraps", tensor.offset);
    if (*end > file_.size()) {
      return Fail(ModelError::kTruncated,
                  "its data [{}, {}) runs past the end of the file at byte {}; fetch it again",
                  *begin, *end, file_.size());
    }
    tensor.offset = *begin;
  }
  return absl::OkStatus();
}

absl::Status GgufParser::CheckOverlaps() {
  std::vector<size_t> order(out_.tensors_.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return out_.tensors_[a].offset < out_.tensors_[b].offset; });
  for (size_t i = 1; i < order.size(); ++i) {
    const TensorInfo& before = out_.tensors_[order[i - 1]];
    const TensorInfo& tensor = out_.tensors_[order[i]];
    if (tensor.offset < before.offset + before.bytes) {
      what_ =
          fmt::format("tensor {} at byte {}", QuoteForMessage(tensor.name), tensor.record_offset);
      return Fail(ModelError::kOverlap, "its data at byte {} overlaps that of tensor {}",
                  tensor.offset, QuoteForMessage(before.name));
    }
  }
  return absl::OkStatus();
}

}  // namespace stagecoach
