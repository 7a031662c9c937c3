#include "kernels/backend.h"

#include <limits>
#include <optional>

#include "model/checked_math.h"

namespace stagecoach {

uint64_t KvBytes(const KvShape& shape) {
  const uint64_t element_bytes = shape.type == KvType::kF16 ? 2 : 4;
  const uint64_t row_elements =
      static_cast<uint64_t>(shape.key_length) + static_cast<uint64_t>(shape.value_length);
  std::optional<uint64_t> bytes = element_bytes * kKvBlockPositions;
  for (const uint64_t factor :
       {row_elements, static_cast<uint64_t>(shape.kv_heads), static_cast<uint64_t>(shape.layers),
        static_cast<uint64_t>(shape.blocks)}) {
    if (bytes) bytes = CheckedMul(*bytes, factor);
  }
  return bytes.value_or(std::numeric_limits<uint64_t>::max());
}

uint64_t Backend::ResidentBytes(TensorRole, const TensorInfo& tensor) const { return tensor.bytes; }

absl::Status Backend::HeadTop(Workspace&, const UnitWeights&, std::span<const int32_t>, int,
                              std::span<TopLogit>) {
  return absl::UnimplementedError("this backend gives all logits only");
}

}  // namespace stagecoach
