#include "worker/unit_parts.h"

#include <algorithm>
#include <cstddef>
#include <functional>
#include <numeric>

namespace stagecoach {

std::vector<UnitPart> CutTensor(const UnitTensor& entry, const LoadOptions& options) {
  const TensorInfo& tensor = *entry.tensor;
  const uint64_t rows = std::max<uint64_t>(tensor.rows(), 1);
  const uint64_t row_bytes = tensor.bytes / rows;
  uint64_t part_rows = rows;
  if (tensor.bytes > options.part_bytes && tensor.bytes % rows == 0) {
    part_rows = std::max<uint64_t>(options.part_bytes / row_bytes / kPartRows, 1) * kPartRows;
  }
  std::vector<UnitPart> parts;
  for (uint64_t row = 0; row < rows; row += part_rows) {
    const bool last = rows - row <= part_rows;
    const uint64_t offset = row * row_bytes;
    parts.push_back({.role = entry.role,
                     .tensor = &tensor,
                     .first_row = row,
                     .offset = offset,
                     .bytes = last ? tensor.bytes - offset : part_rows * row_bytes,
                     .index = static_cast<int>(parts.size()),
                     .last = last});
    if (last) break;
  }
  return parts;
}

std::vector<UnitPart> CutUnit(const std::vector<UnitTensor>& tensors, const LoadOptions& options) {
  std::vector<UnitPart> parts;
  for (const UnitTensor& tensor : tensors) {
    const std::vector<UnitPart> cut = CutTensor(tensor, options);
    parts.insert(parts.end(), cut.begin(), cut.end());
  }
  return parts;
}

int LoadSlots(const BackendInfo& backend, const LoadOptions& options) {
  return std::max(1, options.threads) + (backend.own_memory ? kHeldParts : 1);
}

uint64_t BufferBytes(const UnitPart& part, const LoadOptions& options) {
  const bool whole = part.index == 0 && part.last;
  // Parts of larger tensors differ by a few rows: let them use each other's buffers.
  return whole ? part.bytes : std::max(part.bytes, options.part_bytes);
}

uint64_t LoadBufferBytes(const std::vector<UnitPart>& parts, int slots,
                         const LoadOptions& options) {
  std::vector<uint64_t> bytes;
  for (const UnitPart& part : parts) bytes.push_back(BufferBytes(part, options));
  std::sort(bytes.begin(), bytes.end(), std::greater<>());
  bytes.resize(std::min<size_t>(bytes.size(), slots));
  return std::accumulate(bytes.begin(), bytes.end(), uint64_t{0});
}

}  // namespace stagecoach
