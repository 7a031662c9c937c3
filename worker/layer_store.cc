#include "worker/layer_store.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <optional>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "fmt/format.h"
#include "worker/prefetcher.h"
#include "worker/unit_loader.h"

namespace stagecoach {

// One mutex guards the units and the counters; it is never held while reading or converting.
// Lock order: mu_, then those inside the prefetcher and the loader.
class LayerStore::Impl {
 public:
  Impl(Backend* backend, std::shared_ptr<const ModelFile> model, LayerStoreOptions options)
      : model_(model), loader_(backend, std::move(model)) {
    if (!options.prefetch) return;
    prefetcher_.emplace(std::max(1, options.reader_threads), std::max(1, options.max_queued_units),
                        [this](Prefetcher::Ticket ticket, std::vector<std::byte>& buffer) {
                          Prefetch(ticket, buffer);
                        });
  }
  ~Impl() { Shutdown(); }

  void Assign(const std::vector<Unit>& units);
  absl::StatusOr<UnitLease> Acquire(const Unit& unit);
  std::vector<UnitState> States() const;
  LayerStoreStats Stats() const;
  void Shutdown();

 private:
  // One assigned unit. Kept alive by the store, and by a load or an Acquire under way. All but
  // the constants and `cancelled` is guarded by mu_.
  struct Entry {
    Entry(const Unit& unit, Prefetcher::Ticket ticket) : unit(unit), ticket(ticket) {}
    bool under_way() const {
      return state == UnitState::kQueued || state == UnitState::kReading ||
             state == UnitState::kConverting;
    }

    const Unit unit;
    const Prefetcher::Ticket ticket;
    std::atomic<bool> cancelled = false;  // no longer wanted; never reset
    UnitState state = UnitState::kAbsent;
    bool prefetched = false;                     // the load under way is the prefetcher's
    std::shared_ptr<const UnitWeights> weights;  // kResident
    absl::Status error;                          // kFailed
  };

  std::shared_ptr<Entry> Find(const Unit& unit) const ABSL_SHARED_LOCKS_REQUIRED(mu_);
  absl::Status MakeResident(const std::shared_ptr<Entry>& entry) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Runs one load, releasing mu_ meanwhile.
  void Load(const std::shared_ptr<Entry>& entry, bool prefetched, std::vector<std::byte>& buffer)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // The prefetcher's threads come in here.
  void Prefetch(Prefetcher::Ticket ticket, std::vector<std::byte>& buffer);
  // Queues absent units in execution order until the queue is full. Which units are worth loading
  // next is decided here alone.
  void FillQueue() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const std::shared_ptr<const ModelFile> model_;

  UnitLoader loader_;

  mutable absl::Mutex mu_;
  std::vector<std::shared_ptr<Entry>> entries_ ABSL_GUARDED_BY(mu_);  // execution order
  Prefetcher::Ticket next_ticket_ ABSL_GUARDED_BY(mu_) = 0;
  bool shutdown_ ABSL_GUARDED_BY(mu_) = false;
  int waiters_ ABSL_GUARDED_BY(mu_) = 0;  // threads inside Acquire that did not find a resident
  int loads_ ABSL_GUARDED_BY(mu_) = 0;    // under way
  absl::Time loading_since_ ABSL_GUARDED_BY(mu_);
  absl::Duration load_time_ ABSL_GUARDED_BY(mu_);
  absl::Duration stall_time_ ABSL_GUARDED_BY(mu_);
  LayerStoreStats counters_ ABSL_GUARDED_BY(mu_);  // hits, late_hits, misses, failed_prefetches

  // Last: its threads use all of the above. Set in the constructor or never; thread-safe itself.
  std::optional<Prefetcher> prefetcher_;
};

void LayerStore::Impl::Assign(const std::vector<Unit>& units) {
  std::vector<std::shared_ptr<Entry>> previous;  // weights are freed after the mutex
  absl::MutexLock lock(&mu_);
  if (shutdown_) return;
  std::vector<std::shared_ptr<Entry>> wanted;
  for (const Unit& unit : units) {
    std::shared_ptr<Entry> entry = Find(unit);
    if (entry == nullptr) entry = std::make_shared<Entry>(unit, next_ticket_++);
    wanted.push_back(std::move(entry));
  }
  previous.swap(entries_);
  entries_ = wanted;
  for (const std::shared_ptr<Entry>& entry : previous) {
    // The queue is filled anew, in the new order. A ticket that has left the queue stays under way.
    if (prefetcher_ && prefetcher_->Cancel(entry->ticket)) entry->state = UnitState::kAbsent;
    if (entry->state == UnitState::kFailed) entry->state = UnitState::kAbsent;
    if (std::find(wanted.begin(), wanted.end(), entry) == wanted.end()) entry->cancelled = true;
  }
  FillQueue();
}

absl::StatusOr<UnitLease> LayerStore::Impl::Acquire(const Unit& unit) {
  absl::MutexLock lock(&mu_);
  const std::shared_ptr<Entry> entry = Find(unit);
  if (shutdown_) return absl::CancelledError("the layer store was shut down");
  if (entry == nullptr) {
    return absl::CancelledError(fmt::format("{} is not assigned to this worker", UnitName(unit)));
  }
  if (entry->state == UnitState::kResident) {
    ++counters_.hits;
    return UnitLease(entry->weights);
  }
  ++waiters_;
  const absl::Time start = absl::Now();
  const absl::Status status = MakeResident(entry);
  stall_time_ += absl::Now() - start;
  --waiters_;
  if (!status.ok()) return status;
  return UnitLease(entry->weights);
}

absl::Status LayerStore::Impl::MakeResident(const std::shared_ptr<Entry>& entry) {
  const auto settled = [&entry] { return entry->cancelled || !entry->under_way(); };
  while (true) {
    if (entry->cancelled) {
      return absl::CancelledError(fmt::format("{} is no longer wanted", UnitName(entry->unit)));
    }
    if (entry->state == UnitState::kResident) {
      ++counters_.late_hits;
      return absl::OkStatus();
    }
    if (!entry->under_way()) break;
    const bool prefetched = entry->prefetched;
    if (prefetched && prefetcher_) prefetcher_->Promote(entry->ticket);
    mu_.Await(absl::Condition(&settled));
    // Another caller's synchronous load failed just now: no use in a further try.
    if (!prefetched && entry->state == UnitState::kFailed) return entry->error;
  }
  ++counters_.misses;
  std::vector<std::byte> buffer;
  Load(entry, /*prefetched=*/false, buffer);
  if (entry->state == UnitState::kResident) return absl::OkStatus();
  if (entry->cancelled) {
    return absl::CancelledError(fmt::format("{} is no longer wanted", UnitName(entry->unit)));
  }
  return entry->error;
}

void LayerStore::Impl::Load(const std::shared_ptr<Entry>& entry, bool prefetched,
                            std::vector<std::byte>& buffer) {
  entry->state = UnitState::kReading;
  entry->prefetched = prefetched;
  if (loads_++ == 0) loading_since_ = absl::Now();
  mu_.Unlock();
  absl::StatusOr<std::unique_ptr<UnitWeights>> weights =
      loader_.Load(entry->unit, entry->cancelled, buffer, [this, &entry](UnitState state) {
        absl::MutexLock lock(&mu_);
        entry->state = state;
      });
  mu_.Lock();
  if (--loads_ == 0) load_time_ += absl::Now() - loading_since_;
  if (entry->cancelled) {
    entry->state = UnitState::kAbsent;
  } else if (weights.ok()) {
    entry->weights = *std::move(weights);
    entry->state = UnitState::kResident;
  } else {
    entry->error = weights.status();
    entry->state = UnitState::kFailed;
    if (prefetched) ++counters_.failed_prefetches;
  }
}

void LayerStore::Impl::Prefetch(Prefetcher::Ticket ticket, std::vector<std::byte>& buffer) {
  absl::MutexLock lock(&mu_);
  const auto it = std::find_if(entries_.begin(), entries_.end(),
                               [ticket](const auto& entry) { return entry->ticket == ticket; });
  if (it == entries_.end() || (*it)->cancelled) return;
  const std::shared_ptr<Entry> entry = *it;
  FillQueue();
  Load(entry, /*prefetched=*/true, buffer);
}

void LayerStore::Impl::FillQueue() {
  if (!prefetcher_ || shutdown_) return;
  for (const std::shared_ptr<Entry>& entry : entries_) {
    if (entry->state != UnitState::kAbsent) continue;
    if (!prefetcher_->Push(entry->ticket)) return;
    entry->state = UnitState::kQueued;
    entry->prefetched = true;
  }
}

std::shared_ptr<LayerStore::Impl::Entry> LayerStore::Impl::Find(const Unit& unit) const {
  const auto it = std::find_if(entries_.begin(), entries_.end(),
                               [&unit](const auto& entry) { return entry->unit == unit; });
  return it == entries_.end() ? nullptr : *it;
}

std::vector<UnitState> LayerStore::Impl::States() const {
  absl::MutexLock lock(&mu_);
  std::vector<UnitState> states;
  for (const std::shared_ptr<Entry>& entry : entries_) states.push_back(entry->state);
  return states;
}

LayerStoreStats LayerStore::Impl::Stats() const {
  absl::MutexLock lock(&mu_);
  LayerStoreStats stats = counters_;
  for (const std::shared_ptr<Entry>& entry : entries_) {
    const uint64_t bytes = model_->UnitBytes(entry->unit);
    stats.slice_bytes += bytes;
    if (entry->state == UnitState::kResident) stats.loaded_bytes += bytes;
  }
  stats.read_bytes = loader_.read_bytes();
  const absl::Duration running = loads_ > 0 ? absl::Now() - loading_since_ : absl::ZeroDuration();
  stats.load_seconds = absl::ToDoubleSeconds(load_time_ + running);
  stats.stall_seconds = absl::ToDoubleSeconds(stall_time_);
  return stats;
}

void LayerStore::Impl::Shutdown() {
  {
    absl::MutexLock lock(&mu_);
    shutdown_ = true;
    for (const std::shared_ptr<Entry>& entry : entries_) entry->cancelled = true;
  }
  if (prefetcher_) prefetcher_->Shutdown();
  absl::MutexLock lock(&mu_);
  const auto left = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return waiters_ == 0; };
  mu_.Await(absl::Condition(&left));
  for (const std::shared_ptr<Entry>& entry : entries_) {
    if (entry->state == UnitState::kQueued) entry->state = UnitState::kAbsent;
  }
}

LayerStore::LayerStore(Backend* backend, std::shared_ptr<const ModelFile> model,
                       LayerStoreOptions options)
    : impl_(std::make_unique<Impl>(backend, std::move(model), options)) {}
LayerStore::~LayerStore() = default;
void LayerStore::Assign(const std::vector<Unit>& units) { impl_->Assign(units); }
absl::StatusOr<UnitLease> LayerStore::Acquire(const Unit& unit) { return impl_->Acquire(unit); }
std::vector<UnitState> LayerStore::States() const { return impl_->States(); }
LayerStoreStats LayerStore::Stats() const { return impl_->Stats(); }
void LayerStore::Shutdown() { impl_->Shutdown(); }

}  // namespace stagecoach
