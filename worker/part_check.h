// Looks through the bytes of a part while they come.
#ifndef STAGECOACH_WORKER_PART_CHECK_H_
#define STAGECOACH_WORKER_PART_CHECK_H_

#include <cstdint>
#include <memory>
#include <span>

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "worker/unit_parts.h"
#include "xxhash.h"

namespace stagecoach {

// The part's hash (HashTensorBytes), and whether its weights keep to what the backend can hold
// (CheckTensorPart). Not thread-safe.
class PartCheck {
 public:
  // Both must outlive it.
  PartCheck(const UnitPart& what, const WeightBounds& bounds);

  // raw: the part as far as it has come, at least as far as the time before.
  void LookThrough(std::span<const std::byte> raw);

  // Once it has come as a whole. RESOURCE_EXHAUSTED: there was no memory for a hash.
  absl::Status status() const;
  uint64_t hash() const;
  const absl::Status& weights() const { return weights_; }

 private:
  const UnitPart& what_;
  const WeightBounds& bounds_;
  const std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> hash_;
  uint64_t hashed_ = 0, checked_ = 0;  // bytes
  absl::Status weights_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_PART_CHECK_H_
