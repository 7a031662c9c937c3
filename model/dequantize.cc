#include "model/dequantize.h"

#include <cstring>
#include <string>

#include <fmt/format.h>

#include "model/block_decode.h"
#include "model/model_error.h"

namespace stagecoach {
namespace {

// Calls f(block, index) for each block of `raw` until it returns false. The copy makes any
// alignment of `raw` safe.
template <typename Block, typename F>
void ForEachBlock(std::span<const std::byte> raw, F f) {
  for (size_t i = 0; i < raw.size() / sizeof(Block); ++i) {
    Block block;
    memcpy(&block, raw.data() + i * sizeof(Block), sizeof(Block));
    if (!f(block, i)) return;
  }
}

}  // namespace

absl::Status DequantizeRow(TensorType type, std::span<const std::byte> raw, std::span<float> out) {
  return VisitBlockType(type, [&]<typename Block>() -> absl::Status {
    if (out.size() % Block::kElements != 0 || raw.size() % sizeof(Block) != 0 ||
        raw.size() / sizeof(Block) != out.size() / Block::kElements) {
      return MakeModelError(ModelError::kBadShape,
                            fmt::format("{} bytes of {} cannot be {} elements", raw.size(),
                                        GetTensorTypeInfo(type).name, out.size()));
    }
    ForEachBlock<Block>(raw, [&](const Block& block, size_t i) {
      DecodeBlock(block, out.data() + i * Block::kElements);
      return true;
    });
    return absl::OkStatus();
  });
}

absl::Status FiniteScales(TensorType type, std::span<const std::byte> raw) {
  return VisitBlockType(type, [&]<typename Block>() -> absl::Status {
    if (raw.size() % sizeof(Block) != 0) {
      return MakeModelError(ModelError::kBadShape,
                            fmt::format("{} bytes are not a whole number of {} blocks", raw.size(),
                                        GetTensorTypeInfo(type).name));
    }
    absl::Status status;
    ForEachBlock<Block>(raw, [&](const Block& block, size_t i) {
      if (HasFiniteScales(block)) return true;
      status = MakeModelError(ModelError::kCorrupt,
                              fmt::format("{} block {} has an infinite or NaN scale; the file is "
                                          "damaged, fetch it again",
                                          GetTensorTypeInfo(type).name, i));
      return false;
    });
    return status;
  });
}

}  // namespace stagecoach
