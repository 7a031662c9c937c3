// Inside of the layer store; included by its implementation files only.
#ifndef STAGECOACH_WORKER_LAYER_STORE_IMPL_H_
#define STAGECOACH_WORKER_LAYER_STORE_IMPL_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "worker/host_buffers.h"
#include "worker/host_tier.h"
#include "worker/layer_store.h"
#include "worker/prefetcher.h"
#include "worker/residency.h"
#include "worker/unit_loader.h"

namespace stagecoach {

inline LoadOptions LoadOptionsOf(const LayerStoreOptions& options) {
  return {.threads = options.load_threads, .part_bytes = options.part_bytes};
}

// One mutex guards the units and the counters; it is never held while reading, converting or
// freeing weights. Lock order: mu_, then those inside the prefetcher, the loader and the host tier.
//
// Room: used_ counts the weights that exist and what loads under way have been granted. A load is
// granted its room before it begins, so used_ never exceeds limit_.
class LayerStore::Impl : public std::enable_shared_from_this<Impl> {
 public:
  Impl(Backend* backend, std::shared_ptr<const ModelFile> model, const LayerStoreOptions& options);
  ~Impl() { Shutdown(); }

  void Assign(const std::vector<Unit>& units);
  absl::StatusOr<UnitLease> Acquire(const Unit& unit);
  absl::StatusOr<uint64_t> WeightBytes() const;
  std::vector<UnitState> States() const;
  LayerStoreStats Stats() const;
  StorageTrouble Trouble() const;
  void Shutdown();

 private:
  // One assigned unit. Kept alive by the store, its leases, and a load or an Acquire under way. All
  // but the constants and `cancelled` is guarded by mu_.
  struct Entry {
    Entry(const Unit& unit, const UnitSize& size, Prefetcher::Ticket ticket)
        : unit(unit), size(size), ticket(ticket) {}
    bool under_way() const {
      return state == UnitState::kQueued || state == UnitState::kReading ||
             state == UnitState::kConverting;
    }
    uint64_t load_bytes() const { return size.resident_bytes + size.buffer_bytes; }

    const Unit unit;
    const UnitSize size;
    const Prefetcher::Ticket ticket;
    std::atomic<bool> cancelled = false;  // no longer wanted; never reset
    UnitState state = UnitState::kAbsent;
    bool fixed = true;        // never evicted
    bool prefetched = false;  // the load under way is the prefetcher's
    int users = 0;            // leases, and threads inside Acquire: not evicted while there are any
    std::unique_ptr<const UnitWeights> weights;  // kResident
    absl::Status error;                          // kFailed

    // Of the latest load.
    absl::Duration load_time;
    absl::Time loaded_at;
    uint64_t load_cycle = 0;
  };
  using EntryPtr = std::shared_ptr<Entry>;

  HostTier* MakeHostTier();
  // The assigned unit that the tensor belongs to, or nullptr.
  EntryPtr FindByTensor(const TensorInfo* tensor) const ABSL_SHARED_LOCKS_REQUIRED(mu_);
  EntryPtr Find(const Unit& unit) const ABSL_SHARED_LOCKS_REQUIRED(mu_);
  UnitSize Measure(const Unit& unit) const {
    return MeasureUnit(*backend_, *model_, unit, LoadOptionsOf(options_));
  }
  absl::Status MakeResident(const EntryPtr& entry) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Runs one load, releasing mu_ meanwhile. Its room has been granted.
  void Load(const EntryPtr& entry, bool prefetched) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // The prefetcher's threads come in here.
  void Prefetch(Prefetcher::Ticket ticket);
  // Queues absent units until the queue is full: all in execution order, or while streaming the
  // fixed and the next streaming ones from position_ on. Which units are worth loading next is
  // decided here alone.
  void FillQueue() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // --- layer_store_room.cc: who stays and who goes.
  // Decides which units are fixed.
  void PlanRoom() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Whether there is, or eviction can make, room to load the entry. A prefetch displaces only what
  // is needed later, an `urgent` load whatever nobody uses.
  bool CanMakeRoom(const Entry& entry, bool urgent) const ABSL_SHARED_LOCKS_REQUIRED(mu_);
  Entry* FarthestEvictable(uint64_t least_rank) const ABSL_SHARED_LOCKS_REQUIRED(mu_);
  bool Evictable(const Entry& entry) const ABSL_SHARED_LOCKS_REQUIRED(mu_);
  // Evicts and grants room if it can. Releases mu_ while it frees.
  bool MakeRoom(const Entry& entry, bool urgent) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // The same, waiting until it can. False once the entry is cancelled.
  bool AwaitRoom(const Entry& entry) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Charge(uint64_t bytes) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Frees the weights of an entry, releasing mu_ meanwhile.
  void Free(Entry& entry) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void EndUse(Entry& entry) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void EndLease(Entry& entry);
  // How many units the cycle visits before it comes to this one.
  uint64_t Rank(const Entry& entry) const ABSL_SHARED_LOCKS_REQUIRED(mu_);
  void MoveTo(size_t position) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  size_t IndexOf(const Entry& entry) const ABSL_SHARED_LOCKS_REQUIRED(mu_);
  void AdaptDistance(const Entry& entry, bool stalled) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const LayerStoreOptions options_;
  Backend* const backend_;
  const std::shared_ptr<const ModelFile> model_;

  HostAllocator allocator_;
  std::optional<HostTier> host_;
  UnitLoader loader_;

  mutable absl::Mutex mu_;
  std::vector<EntryPtr> entries_ ABSL_GUARDED_BY(mu_);  // execution order
  Prefetcher::Ticket next_ticket_ ABSL_GUARDED_BY(mu_) = 0;
  bool shutdown_ ABSL_GUARDED_BY(mu_) = false;
  int waiters_ ABSL_GUARDED_BY(mu_) = 0;  // threads inside Acquire that did not find a resident
  int loads_ ABSL_GUARDED_BY(mu_) = 0;    // under way
  absl::Time loading_since_ ABSL_GUARDED_BY(mu_);
  absl::Duration load_time_ ABSL_GUARDED_BY(mu_);
  absl::Duration stall_time_ ABSL_GUARDED_BY(mu_);
  // hits, late_hits, misses, failed_prefetches, evictions, peak_resident_bytes
  LayerStoreStats counters_ ABSL_GUARDED_BY(mu_);

  uint64_t used_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t limit_ ABSL_GUARDED_BY(mu_) = UINT64_MAX;
  absl::Status room_status_ ABSL_GUARDED_BY(mu_);  // whether limit_ is enough for entries_
  bool streaming_ ABSL_GUARDED_BY(mu_) = false;
  int window_units_ ABSL_GUARDED_BY(mu_) = 0;
  int distance_ ABSL_GUARDED_BY(mu_) = 0;
  int early_units_ ABSL_GUARDED_BY(mu_) = 0;       // loaded much too early, since the latest stall
  size_t position_ ABSL_GUARDED_BY(mu_) = 0;       // index of the unit that is needed next
  uint64_t cycle_ ABSL_GUARDED_BY(mu_) = 0;        // how often position_ has passed the end
  int room_waiters_ ABSL_GUARDED_BY(mu_) = 0;      // prefetches hold back while there are any
  bool making_room_ ABSL_GUARDED_BY(mu_) = false;  // for a prefetch
  int streaming_units_ ABSL_GUARDED_BY(mu_) = 0;   // number of those that are not fixed

  // Last: its threads use all of the above. Set in the constructor or never; thread-safe itself.
  std::optional<Prefetcher> prefetcher_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_LAYER_STORE_IMPL_H_
