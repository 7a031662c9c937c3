// Who stays and who goes: the room of the layer store under a weight budget.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "absl/time/clock.h"
#include "fmt/format.h"
#include "worker/layer_store_impl.h"

namespace stagecoach {
namespace {

constexpr int kStartDistance = 2;
// Loads that the window has room for, if the backend has its own memory: one more would be of use
// to reading alone, and costs a unit that could stay.
constexpr int kWindowLoads = 2;
// A unit was loaded much too early if it then waited this many times as long as its load took.
constexpr int kEarly = 4;

// The budget in bytes, UINT64_MAX if there is none.
uint64_t Limit(const LayerStoreOptions& options, uint64_t slice_bytes) {
  uint64_t limit = options.weight_budget_bytes > 0 ? options.weight_budget_bytes : UINT64_MAX;
  if (options.weight_budget_percent > 0 && options.weight_budget_percent < 100) {
    const double share = static_cast<double>(slice_bytes) * options.weight_budget_percent / 100;
    limit = std::min(limit, static_cast<uint64_t>(share));
  }
  return limit;
}

}  // namespace

absl::Status CheckWeightBudget(const Backend& backend, const ModelFile& model,
                               const LayerStoreOptions& options) {
  const LoadOptions load = LoadOptionsOf(SuitOptions(backend, options));
  uint64_t model_bytes = 0, layer = 0, buffer = 0;
  for (const Unit& unit : StageUnits(model.params(), 0, model.params().layers)) {
    const UnitSize size = MeasureUnit(backend, model, unit, load);
    model_bytes += size.resident_bytes;
    if (unit.kind != Unit::Kind::kLayer) continue;
    layer = std::max(layer, size.resident_bytes);
    buffer = std::max(buffer, size.buffer_bytes);
  }
  const uint64_t limit = Limit(options, model_bytes);
  const uint64_t smallest = 2 * layer + buffer;
  if (limit >= smallest) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      fmt::format("a weight budget of {} bytes is too small for two layers of this model; the "
                  "smallest that works is {} bytes (more for a stage with embedding or head)",
                  limit, smallest));
}

void LayerStore::Impl::PlanRoom() {
  std::vector<UnitSize> sizes;
  uint64_t slice_bytes = 0;
  for (const EntryPtr& entry : entries_) {
    sizes.push_back(entry->size);
    slice_bytes += entry->size.resident_bytes;
  }
  limit_ = Limit(options_, slice_bytes);
  int readers = options_.prefetch ? options_.reader_threads : 1;
  if (backend_->info().own_memory) readers = std::min(readers, kWindowLoads);
  const absl::StatusOr<Residency> residency = PlanResidency(sizes, limit_, readers);
  room_status_ = residency.status();
  streaming_ = residency.ok() && residency->streaming;
  window_units_ = residency.ok() ? residency->window_units : 0;
  distance_ = std::min(kStartDistance, window_units_);
  early_units_ = 0;
  position_ = 0;
  streaming_units_ = 0;
  std::vector<const TensorInfo*> wanted;
  for (size_t i = 0; i < entries_.size(); ++i) {
    entries_[i]->fixed = !residency.ok() || residency->fixed[i];
    if (entries_[i]->fixed) continue;
    ++streaming_units_;
    for (const UnitTensor& entry : model_->UnitTensors(entries_[i]->unit)) {
      wanted.push_back(entry.tensor);
    }
  }
  if (host_) host_->SetWanted(std::move(wanted));
}

size_t LayerStore::Impl::IndexOf(const Entry& entry) const {
  const auto it = std::find_if(entries_.begin(), entries_.end(),
                               [&entry](const EntryPtr& other) { return other.get() == &entry; });
  return static_cast<size_t>(it - entries_.begin());
}

uint64_t LayerStore::Impl::Rank(const Entry& entry) const {
  const size_t n = entries_.size();
  return (IndexOf(entry) + n - position_) % n;
}

void LayerStore::Impl::MoveTo(size_t position) {
  if (position == entries_.size()) {
    position = 0;
    ++cycle_;
  }
  position_ = position;
}

bool LayerStore::Impl::Evictable(const Entry& entry) const {
  return entry.weights != nullptr && entry.users == 0 && !entry.fixed;
}

LayerStore::Impl::Entry* LayerStore::Impl::FarthestEvictable(uint64_t least_rank) const {
  const size_t n = entries_.size();
  for (uint64_t rank = n; rank-- > least_rank;) {
    Entry* const entry = entries_[(position_ + rank) % n].get();
    if (Evictable(*entry)) return entry;
  }
  return nullptr;
}

bool LayerStore::Impl::CanMakeRoom(const Entry& entry, bool urgent) const {
  const uint64_t needed = entry.load_bytes();
  uint64_t available = limit_ > used_ ? limit_ - used_ : 0;
  const size_t n = entries_.size();
  for (uint64_t rank = urgent ? 0 : Rank(entry) + 1; rank < n && available < needed; ++rank) {
    const Entry& other = *entries_[(position_ + rank) % n];
    if (Evictable(other)) available += other.size.resident_bytes;
  }
  return available >= needed;
}

bool LayerStore::Impl::MakeRoom(const Entry& entry, bool urgent) {
  const uint64_t needed = entry.load_bytes();
  while (limit_ < needed || used_ > limit_ - needed) {
    if (entry.cancelled || !CanMakeRoom(entry, urgent)) return false;
    Entry* const victim = FarthestEvictable(urgent ? 0 : Rank(entry) + 1);
    ++counters_.evictions;
    Free(*victim);
  }
  if (entry.cancelled) return false;
  Charge(needed);
  return true;
}

bool LayerStore::Impl::AwaitRoom(const Entry& entry) {
  const auto worth_trying = [this, &entry]() ABSL_SHARED_LOCKS_REQUIRED(mu_) {
    return entry.cancelled || CanMakeRoom(entry, /*urgent=*/true);
  };
  ++room_waiters_;
  bool granted = false;
  while (!entry.cancelled && !granted) {
    granted = MakeRoom(entry, /*urgent=*/true);
    if (!granted) mu_.Await(absl::Condition(&worth_trying));
  }
  --room_waiters_;
  if (!granted) FillQueue();  // the prefetches that held back
  return granted;
}

void LayerStore::Impl::Charge(uint64_t bytes) {
  used_ += bytes;
  counters_.peak_resident_bytes = std::max(counters_.peak_resident_bytes, used_);
}

void LayerStore::Impl::Free(Entry& entry) {
  std::unique_ptr<const UnitWeights> weights = std::move(entry.weights);
  const uint64_t bytes = weights->bytes();
  entry.state = UnitState::kAbsent;
  mu_.Unlock();
  weights.reset();
  mu_.Lock();
  used_ -= bytes;
}

void LayerStore::Impl::EndUse(Entry& entry) {
  --entry.users;
  if (entry.users == 0 && entry.cancelled && entry.weights != nullptr) Free(entry);
  if (streaming_) FillQueue();
}

void LayerStore::Impl::EndLease(Entry& entry) {
  absl::MutexLock lock(&mu_);
  EndUse(entry);
}

void LayerStore::Impl::AdaptDistance(const Entry& entry, bool stalled) {
  if (!streaming_ || entry.fixed) return;
  if (stalled) {
    distance_ = std::min(distance_ + 1, window_units_);
    early_units_ = 0;
    return;
  }
  if (entry.load_cycle != cycle_) return;  // perhaps there was nothing to do in between
  if (absl::Now() - entry.loaded_at < kEarly * entry.load_time) return;
  if (++early_units_ < 2 * streaming_units_) return;
  distance_ = std::max(1, distance_ - 1);
  early_units_ = 0;
}

}  // namespace stagecoach
