// The weights of one stage: which units are resident, and leases that pin them while kernels read.
#ifndef STAGECOACH_WORKER_LAYER_STORE_H_
#define STAGECOACH_WORKER_LAYER_STORE_H_

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "model/model_file.h"

namespace stagecoach {

enum class UnitState { kAbsent, kQueued, kReading, kConverting, kResident, kFailed };

// Progress of the assignment and counters since construction; seconds are wall clock.
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
};

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
  int reader_threads = 1;    // prefetch threads
  int max_queued_units = 8;  // bound of the prefetch queue; the rest follow as it drains
};

// Thread-safe. Every assigned unit becomes resident and stays so until the assignment changes.
class LayerStore {
 public:
  // `backend` must outlive the store.
  LayerStore(Backend* backend, std::shared_ptr<const ModelFile> model, LayerStoreOptions options);
  ~LayerStore();  // Shutdown()

  // Makes `units` (execution order) the ones to hold: starts prefetching those that are absent,
  // cancels queued loads and drops residents that are no longer wanted (leases keep theirs alive).
  void Assign(const std::vector<Unit>& units);

  // Blocks until `unit` is resident: joins a load under way, else loads it on this thread. A
  // failed prefetch is tried again here once. Errors: those of reading and converting, naming the
  // tensor; CANCELLED after Shutdown or if the unit is not assigned (any more).
  absl::StatusOr<UnitLease> Acquire(const Unit& unit);

  std::vector<UnitState> States() const;  // one per assigned unit
  LayerStoreStats Stats() const;

  // Cancels queued loads, stops those under way at their next chunk, joins threads, wakes waiters
  // and waits until they have left. Idempotent; safe at any moment and from several threads.
  void Shutdown();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_LAYER_STORE_H_
