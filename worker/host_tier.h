// A tier between file and device: tensors as in the file, kept in host memory, perhaps compressed.
#ifndef STAGECOACH_WORKER_HOST_TIER_H_
#define STAGECOACH_WORKER_HOST_TIER_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <set>
#include <span>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "model/gguf.h"
#include "model/tensor_type.h"

namespace stagecoach {

enum class HostCodec { kNone, kLz4, kZstd };

struct HostTierStats {
  uint64_t hits = 0;       // tensors served
  uint64_t bytes = 0;      // held now
  uint64_t raw_bytes = 0;  // of which these many before compression
  // What the codec was tried on, whether or not it paid: before and after.
  uint64_t tried_raw_bytes = 0;
  uint64_t tried_bytes = 0;
};

// Thread-safe. Access is a cycle, so the first tensors that fit stay: replacing them by later ones
// would only turn hits into misses.
class HostTier {
 public:
  HostTier(uint64_t capacity_bytes, HostCodec codec)
      : capacity_bytes_(capacity_bytes), codec_(codec) {}

  // Only these tensors are worth keeping from now on; others are dropped.
  void SetWanted(std::vector<const TensorInfo*> tensors);

  // Fills `out` (tensor.bytes) and returns true, or returns false if the tensor is not held.
  bool Get(const TensorInfo& tensor, std::span<std::byte> out);

  // Keeps a copy if the tensor is wanted and there is room. Elements of F16, BF16 and F32 are
  // shuffled bytewise before compression. A type of which a tensor shrinks by less than
  // kLeastRatio is kept as it is from then on.
  void Put(const TensorInfo& tensor, std::span<const std::byte> raw);

  HostTierStats Stats() const;

 private:
  struct Stored;
  bool Wants(const TensorInfo& tensor, uint64_t least_bytes) const;
  bool TryCodec(const TensorInfo& tensor) const;

  const uint64_t capacity_bytes_;
  const HostCodec codec_;

  mutable absl::Mutex mu_;
  std::unordered_set<const TensorInfo*> wanted_ ABSL_GUARDED_BY(mu_);
  std::unordered_map<const TensorInfo*, std::shared_ptr<const Stored>> held_ ABSL_GUARDED_BY(mu_);
  std::set<TensorType> incompressible_ ABSL_GUARDED_BY(mu_);
  HostTierStats stats_ ABSL_GUARDED_BY(mu_);
};

inline constexpr double kLeastRatio = 1.1;

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_HOST_TIER_H_
