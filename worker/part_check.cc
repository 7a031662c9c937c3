#include "worker/part_check.h"

#include <algorithm>

#include "kernels/tensor_check.h"

namespace stagecoach {

PartCheck::PartCheck(const UnitPart& what, const WeightBounds& bounds)
    : what_(what), bounds_(bounds), hash_(XXH3_createState(), &XXH3_freeState) {
  if (hash_ != nullptr) XXH3_64bits_reset(hash_.get());
}

// Weights by groups of rows, as the check wants them, and at the end whatever
// is left.
void PartCheck::LookThrough(std::span<const std::byte> raw) {
  if (hash_ != nullptr) {
    XXH3_64bits_update(hash_.get(), raw.data() + hashed_, raw.size() - hashed_);
  }
  hashed_ = raw.size();
  const TensorInfo& tensor = *what_.tensor;
  const uint64_t row_bytes = RowBytes(tensor.type, tensor.columns()).value_or(1);
  const uint64_t group = row_bytes * kPartRows;
  const uint64_t end =
      raw.size() == what_.bytes ? raw.size() : raw.size() / std::max<uint64_t>(group, 1) * group;
  if (end == checked_ || !weights_.ok()) return;
  const auto check = [&](uint64_t begin) {
    return CheckTensorPart(
        tensor,
        {.first_row = what_.first_row + begin / row_bytes, .raw = raw.subspan(begin, end - begin)},
        bounds_);
  };
  weights_ = check(checked_);
  if (!weights_.ok()) weights_ = check(0);  // the error counts blocks from the part's first
  checked_ = end;
}

absl::Status PartCheck::status() const {
  return hash_ != nullptr ? absl::OkStatus() : absl::ResourceExhaustedError("no memory for a hash");
}

uint64_t PartCheck::hash() const { return XXH3_64bits_digest(hash_.get()); }

}  // namespace stagecoach
