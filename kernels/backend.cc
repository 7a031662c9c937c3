#include "kernels/backend.h"

#include <bit>
#include <limits>
#include <optional>

#include "model/checked_math.h"

namespace stagecoach {

namespace {

// One head at one position.
uint64_t HeadBytes(KvType type, uint64_t length) {
  switch (type) {
    case KvType::kF16:
      return 2 * length;
    case KvType::kF32:
      return 4 * length;
    case KvType::kQ8_0:
      return length + 2 * ((length + 31) / 32);
  }
  return 0;
}

}  // namespace

uint64_t KvPositionBytes(KvType type, int kv_heads, int key_length, int value_length) {
  const uint64_t head = HeadBytes(type, key_length) + HeadBytes(type, value_length);
  return CheckedMul(head, static_cast<uint64_t>(kv_heads))
      .value_or(std::numeric_limits<uint64_t>::max());
}

uint64_t KvBytes(const KvShape& shape) {
  std::optional<uint64_t> bytes =
      KvPositionBytes(shape.type, shape.kv_heads, shape.key_length, shape.value_length);
  for (const uint64_t factor :
       {static_cast<uint64_t>(kKvBlockPositions), static_cast<uint64_t>(shape.layers),
        static_cast<uint64_t>(shape.blocks)}) {
    if (bytes) bytes = CheckedMul(*bytes, factor);
  }
  return bytes.value_or(std::numeric_limits<uint64_t>::max());
}

uint64_t Backend::ResidentBytes(TensorRole, const TensorInfo& tensor) const { return tensor.bytes; }

absl::Status Backend::TakeResidual(Workspace&, int) {
  return absl::UnimplementedError("this backend takes residuals from the host only");
}

absl::Status Backend::LeaveResidual(Workspace&, std::span<uint8_t>) {
  return absl::UnimplementedError("this backend gives residuals to the host only");
}

bool AllFinite(std::span<const float> values) {
  constexpr uint32_t kExponent = 0x7f800000;
  uint32_t non_finite = 0;
  for (const float value : values) {
    non_finite |= (std::bit_cast<uint32_t>(value) & kExponent) == kExponent;
  }
  return non_finite == 0;
}

absl::StatusOr<std::shared_ptr<HostMemory>> Backend::NewHostMemory(size_t bytes) {
  std::shared_ptr<HostMemory> memory = NewPageMemory(bytes);
  if (memory == nullptr) return absl::ResourceExhaustedError("no host memory for weights");
  return memory;
}

absl::Status Backend::SetOpTimer(OpTimer*) {
  return absl::UnimplementedError(info().kind + " does not time single operations");
}

absl::Status Backend::HeadTop(Workspace&, const UnitWeights&, std::span<const int32_t>, int,
                              std::span<TopLogit>, std::span<uint64_t>) {
  return absl::UnimplementedError("this backend gives all logits only");
}

absl::Status Backend::HeadDraw(Workspace&, const UnitWeights&, std::span<const int32_t>,
                               std::span<const TokenDraw>, std::span<int32_t>) {
  return absl::UnimplementedError("this backend draws no tokens");
}

absl::Status Backend::EnqueuePicks(Workspace&, const UnitWeights&, std::span<const int32_t>,
                                   std::span<const TokenDraw>) {
  return absl::UnimplementedError("this backend ends its steps at once");
}

absl::Status Backend::EnqueueResidual(Workspace&) {
  return absl::UnimplementedError("this backend ends its steps at once");
}

bool Backend::EndReady(Workspace&) { return true; }

absl::Status Backend::AwaitEnd(Workspace&, std::span<int32_t>, std::span<uint8_t>) {
  return absl::UnimplementedError("this backend ends its steps at once");
}

}  // namespace stagecoach
