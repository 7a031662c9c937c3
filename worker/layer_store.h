// The weights of one stage: which units are resident, and leases that pin them while kernels read.
#ifndef STAGECOACH_WORKER_LAYER_STORE_H_
#define STAGECOACH_WORKER_LAYER_STORE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "kernels/backend.h"
#include "model/model_file.h"
#include "worker/host_tier.h"
#include "worker/unit_parts.h"

namespace stagecoach {

enum class UnitState { kAbsent, kQueued, kReading, kConverting, kResident, kFailed };

// The state of the assignment, and counters since construction; seconds are wall clock.
struct LayerStoreStats {
  uint64_t slice_bytes = 0;   // of all units of the assignment, as in the file
  uint64_t loaded_bytes = 0;  // those of them that are resident now
  uint64_t read_bytes = 0;    // read from the file, since construction
  double load_seconds = 0;    // during which at least one load was under way
  uint64_t hits = 0;          // Acquire found the unit resident
  uint64_t late_hits = 0;     // Acquire waited for a load already under way
  uint64_t misses = 0;        // Acquire had to load the unit itself
  double stall_seconds = 0;   // Acquire waited, late hits and misses together
  uint64_t failed_prefetches = 0;

  bool streaming = false;       // the slice exceeds the weight budget
  uint64_t budget_bytes = 0;    // 0 = no limit
  uint64_t resident_bytes = 0;  // weights in the backend's layout, leased ones that are no longer
                                // assigned too, and what loads under way have been granted
  uint64_t peak_resident_bytes = 0;
  uint64_t evictions = 0;
  int fixed_units = 0;   // that stay resident
  int window_units = 0;  // streaming units that fit at once
  int distance = 0;      // streaming units that are prefetched ahead now
  int queued_units = 0;
  std::vector<bool> fixed;  // per assigned unit

  double read_seconds = 0;       // reading the file, summed over threads
  double convert_seconds = 0;    // to the backend's layout, summed over threads
  bool host_tier = false;        // there is one
  uint64_t host_hits = 0;        // tensors taken from the host tier instead of the file
  uint64_t host_read_bytes = 0;  // of those tensors
  double host_seconds = 0;       // decompressing them, summed over threads
  uint64_t host_bytes = 0;       // held by the host tier now
  uint64_t host_raw_bytes = 0;   // of which these many before compression
  double host_codec_ratio = 0;   // what the codec measured where it was tried; 0 = not tried
};

// Why an assigned unit is not resident although its load has begun.
struct StorageTrouble {
  bool stalled = false;  // a read has been under way for kStallTime
  std::string detail;    // names the unit and the cause; empty: there is no trouble
};
inline constexpr absl::Duration kStallTime = absl::Seconds(1);

// Keeps the unit's weights alive and in place until destroyed. Movable.
class UnitLease {
 public:
  UnitLease() = default;
  explicit UnitLease(std::shared_ptr<const UnitWeights> weights) : weights_(std::move(weights)) {}
  const UnitWeights& operator*() const { return *weights_; }
  const UnitWeights* get() const { return weights_.get(); }

 private:
  std::shared_ptr<const UnitWeights> weights_;
};

struct LayerStoreOptions {
  bool prefetch = true;      // false: every unit is loaded synchronously when first needed
  int reader_threads = 0;    // prefetch threads: units that load at once; 0 = as suits the backend
  int load_threads = 0;      // that read the parts of one unit; likewise
  int max_queued_units = 8;  // bound of the prefetch queue; the rest follow as it drains

  // At most this much is resident and being loaded (read buffers counted) at any moment; buffers
  // that wait for the next load while units stream are not, but had room in the plan. Percent:
  // of the slice in the backend's layout, rounded down; 100 and more are no limit. 0 = none.
  uint64_t weight_budget_bytes = 0;
  double weight_budget_percent = 0;

  uint64_t host_cache_bytes = 0;  // of the host tier, for units that stream; 0 = none
  HostCodec host_cache_codec = HostCodec::kNone;

  uint64_t part_bytes = 0;  // see LoadOptions; 0 = as suits the backend
};

// The options with the numbers that suit the backend in place of zeros: one that converts on the
// host gets one thread of each kind; one that has its own memory, reached by its own copies, as
// many as keep storage and copies busy, and smaller parts.
LayerStoreOptions SuitOptions(const Backend& backend, LayerStoreOptions options);

// RESOURCE_EXHAUSTED, naming the smallest budget that works, if not even two layers of the model
// fit into the weight budget, whatever the slice will be.
absl::Status CheckWeightBudget(const Backend& backend, const ModelFile& model,
                               const LayerStoreOptions& options);

// Thread-safe. Every assigned unit becomes resident and stays so until the assignment changes,
// unless the slice exceeds the weight budget. Then some units are fixed and the others stream
// through what is left of it (residency.h): execution is taken to visit the units in a cycle, the
// prefetcher brings the next `distance` of the streaming ones behind the latest Acquire, past the
// end of the cycle too, and a load may displace only what is needed later and not leased. The
// distance grows by one with each Acquire that stalls, within the window, and shrinks by one after
// two cycles in which units waited for their use over four times as long as they took to load.
class LayerStore {
 public:
  // `backend` must outlive the store.
  LayerStore(Backend* backend, std::shared_ptr<const ModelFile> model, LayerStoreOptions options);
  ~LayerStore();  // Shutdown()
  LayerStore(const LayerStore&) = delete;
  LayerStore& operator=(const LayerStore&) = delete;

  // Makes `units` (execution order) the ones to hold: starts prefetching those that are absent,
  // cancels queued loads and drops residents that are no longer wanted (leases keep theirs alive).
  void Assign(const std::vector<Unit>& units);

  // Blocks until `unit` is resident: joins a load under way, else loads it on this thread. A
  // failed prefetch is tried again here once. Errors: those of reading and converting, naming the
  // tensor; CANCELLED after Shutdown or if the unit is not assigned (any more); that of
  // WeightBytes(). While streaming it also waits for leases to end if they leave no room, so a
  // thread must not hold one when it acquires another.
  absl::StatusOr<UnitLease> Acquire(const Unit& unit);

  // What the assigned units take at most in the backend's memory: all, or the weight budget.
  // RESOURCE_EXHAUSTED naming the smallest budget that works if it is too small for them.
  absl::StatusOr<uint64_t> WeightBytes() const;

  std::vector<UnitState> States() const;  // one per assigned unit
  LayerStoreStats Stats() const;
  // The oldest stalled read, or else the first unit in execution order whose load failed.
  StorageTrouble Trouble() const;

  // Cancels queued loads, stops those under way at their next chunk, joins threads, wakes waiters
  // and waits until they have left. Idempotent; safe at any moment and from several threads.
  void Shutdown();

 private:
  class Impl;
  std::shared_ptr<Impl> impl_;  // leases keep weak references
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_LAYER_STORE_H_
