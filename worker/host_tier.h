// A tier between file and device: tensors as in the file, kept in host memory, perhaps compressed.
#ifndef STAGECOACH_WORKER_HOST_TIER_H_
#define STAGECOACH_WORKER_HOST_TIER_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <set>
#include <span>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "kernels/host_memory.h"
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

// One tensor's bytes, immutable once the tier has them. Alive while anybody holds it, whatever the
// tier does meanwhile.
class HostTensor {
 public:
  // The tensor as in the file, in one piece, or nullptr if it is compressed.
  const std::shared_ptr<const HostMemory>& whole() const { return whole_; }
  // Fills `out` with the bytes from `offset` on. False if that fails.
  bool Read(uint64_t offset, std::span<std::byte> out) const;
  uint64_t bytes() const { return bytes_; }  // held

 private:
  friend class HostTierWriter;
  friend class HostTier;
  // A chunk of the same size as its original is not compressed.
  struct Chunk {
    uint64_t offset;
    size_t raw_bytes;
    std::vector<std::byte> data;
  };
  bool ReadChunk(const Chunk& chunk, std::span<std::byte> scratch, std::span<std::byte> out) const;

  std::shared_ptr<const HostMemory> whole_;
  std::vector<Chunk> chunks_;
  HostCodec codec_ = HostCodec::kNone;
  size_t element_ = 1;
  uint64_t bytes_ = 0;
};

class HostTier;

// Takes one tensor into the tier, part by part; what is not finished leaves no trace. Not
// thread-safe; must not outlive the tier.
class HostTierWriter {
 public:
  HostTierWriter() = default;  // of a tensor that is not wanted
  HostTierWriter(HostTier* tier, const TensorInfo* tensor);
  // In order. Goes without the tensor if there is no room or memory.
  void Append(std::span<const std::byte> raw);
  void Finish();

 private:
  bool AppendWhole(std::span<const std::byte> raw);
  bool AppendCompressed(std::span<const std::byte> raw);
  bool StartOver();  // with what was compressed, as it is

  HostTier* tier_ = nullptr;
  const TensorInfo* tensor_ = nullptr;
  bool compress_ = false;
  uint64_t written_ = 0;
  std::shared_ptr<HostMemory> memory_;
  std::shared_ptr<HostTensor> held_;
  std::vector<std::byte> shuffled_, compressed_;
};

// Thread-safe. Access is a cycle, so the first tensors that fit stay: replacing them by later ones
// would only turn hits into misses.
class HostTier {
 public:
  using Allocate = std::function<std::shared_ptr<HostMemory>(size_t)>;
  // `allocate` may return nullptr; the tier then goes without.
  HostTier(uint64_t capacity_bytes, HostCodec codec, Allocate allocate = NewPageMemory)
      : capacity_bytes_(capacity_bytes), codec_(codec), allocate_(std::move(allocate)) {}

  // Only these tensors are worth keeping from now on; others are dropped.
  void SetWanted(std::vector<const TensorInfo*> tensors);

  // nullptr if the tensor is not held. Nothing is copied.
  std::shared_ptr<const HostTensor> Find(const TensorInfo& tensor);

  // Keeps a copy of what is written if the tensor is wanted and there is room. Elements of F16,
  // BF16 and F32 are shuffled bytewise before compression. A type of which a tensor shrinks by less
  // than kLeastRatio is kept as it is from then on.
  HostTierWriter Write(const TensorInfo& tensor);

  HostTierStats Stats() const;

 private:
  friend class HostTierWriter;
  bool Wants(const TensorInfo& tensor, uint64_t least_bytes) const;
  bool TryCodec(const TensorInfo& tensor) const;
  // Whether the codec paid.
  bool NoteTry(const TensorInfo& tensor, uint64_t bytes);
  void Keep(const TensorInfo& tensor, std::shared_ptr<const HostTensor> held);

  const uint64_t capacity_bytes_;
  const HostCodec codec_;
  const Allocate allocate_;

  mutable absl::Mutex mu_;
  std::unordered_set<const TensorInfo*> wanted_ ABSL_GUARDED_BY(mu_);
  std::unordered_map<const TensorInfo*, std::shared_ptr<const HostTensor>> held_
      ABSL_GUARDED_BY(mu_);
  std::set<TensorType> incompressible_ ABSL_GUARDED_BY(mu_);
  HostTierStats stats_ ABSL_GUARDED_BY(mu_);
};

inline constexpr double kLeastRatio = 1.1;

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_HOST_TIER_H_
