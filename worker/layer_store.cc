#include "worker/layer_store.h"

#include <algorithm>
#include <cmath>
#include <thread>
#include <utility>

#include "absl/time/clock.h"
#include "fmt/format.h"
#include "worker/layer_store_impl.h"

namespace stagecoach {
namespace {

// For a backend with its own memory: units that load at once (while one waits for room or comes to
// its end, others are read), threads that read the parts of each, and what these read at a time:
// enough for the copies to the device, and little enough that a unit has many.
constexpr int kOwnMemoryLoads = 3;
constexpr int kOwnMemoryReads = 8;
constexpr uint64_t kOwnMemoryPartBytes = 4 << 20;

absl::Status NoLongerWanted(const Unit& unit) {
  return absl::CancelledError(fmt::format("{} is no longer wanted", UnitName(unit)));
}

}  // namespace

LayerStore::Impl::Impl(Backend* backend, std::shared_ptr<const ModelFile> model,
                       const LayerStoreOptions& options)
    : options_(SuitOptions(*backend, options)),
      backend_(backend),
      model_(model),
      allocator_(backend),
      loader_(backend, std::move(model), &allocator_, LoadOptionsOf(options_), MakeHostTier()) {
  loader_.Prepare(options_.prefetch ? options_.reader_threads : 1);
  if (!options_.prefetch) return;
  prefetcher_.emplace(options_.reader_threads, std::max(1, options_.max_queued_units),
                      [this](Prefetcher::Ticket ticket) { Prefetch(ticket); });
}

HostTier* LayerStore::Impl::MakeHostTier() {
  if (options_.host_cache_bytes == 0) return nullptr;
  return &host_.emplace(options_.host_cache_bytes, options_.host_cache_codec,
                        [this](size_t bytes) { return allocator_.New(bytes); });
}

LayerStoreOptions SuitOptions(const Backend& backend, LayerStoreOptions options) {
  const bool own_memory = backend.info().own_memory;
  const int cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  if (options.reader_threads <= 0) options.reader_threads = own_memory ? kOwnMemoryLoads : 1;
  if (options.load_threads <= 0) {
    options.load_threads = own_memory ? std::clamp(cores / 2, 1, kOwnMemoryReads) : 1;
  }
  if (options.part_bytes == 0) options.part_bytes = own_memory ? kOwnMemoryPartBytes : kPartBytes;
  return options;
}

void LayerStore::Impl::Assign(const std::vector<Unit>& units) {
  loader_.FreeBuffers();
  std::vector<std::unique_ptr<const UnitWeights>> unwanted;  // freed without the mutex
  uint64_t freed = 0;
  {
    absl::MutexLock lock(&mu_);
    if (shutdown_) return;
    std::vector<EntryPtr> wanted;
    for (const Unit& unit : units) {
      EntryPtr entry = Find(unit);
      if (entry == nullptr) {
        entry = std::make_shared<Entry>(unit, Measure(unit), next_ticket_++);
      }
      wanted.push_back(std::move(entry));
    }
    entries_.swap(wanted);
    for (const EntryPtr& entry : wanted) {  // the previous ones
      // The queue is filled anew, in the new order. What has left the queue stays under way.
      if (prefetcher_ && prefetcher_->Cancel(entry->ticket)) entry->state = UnitState::kAbsent;
      if (entry->state == UnitState::kFailed) entry->state = UnitState::kAbsent;
      if (std::find(entries_.begin(), entries_.end(), entry) != entries_.end()) continue;
      entry->cancelled = true;
      if (entry->weights == nullptr || entry->users > 0) continue;
      freed += entry->weights->bytes();
      unwanted.push_back(std::move(entry->weights));
    }
    PlanRoom();
  }
  unwanted.clear();
  absl::MutexLock lock(&mu_);
  used_ -= freed;
  FillQueue();
}

absl::StatusOr<UnitLease> LayerStore::Impl::Acquire(const Unit& unit) {
  absl::MutexLock lock(&mu_);
  const EntryPtr entry = Find(unit);
  if (shutdown_) return absl::CancelledError("the layer store was shut down");
  if (entry == nullptr) {
    return absl::CancelledError(fmt::format("{} is not assigned to this worker", UnitName(unit)));
  }
  if (!room_status_.ok()) return room_status_;
  MoveTo(IndexOf(*entry));
  ++entry->users;
  const bool hit = entry->state == UnitState::kResident;
  if (hit) {
    ++counters_.hits;
  } else {
    ++waiters_;
    const absl::Time start = absl::Now();
    const absl::Status status = MakeResident(entry);
    stall_time_ += absl::Now() - start;
    --waiters_;
    if (!status.ok()) {
      EndUse(*entry);
      return status;
    }
    MoveTo(IndexOf(*entry));  // others may have moved it meanwhile
  }
  AdaptDistance(*entry, /*stalled=*/!hit);
  MoveTo(position_ + 1);
  if (streaming_) FillQueue();
  const auto end = [store = weak_from_this(), entry](const UnitWeights*) {
    if (const auto impl = store.lock()) impl->EndLease(*entry);
  };
  return UnitLease(std::shared_ptr<const UnitWeights>(entry->weights.get(), end));
}

absl::Status LayerStore::Impl::MakeResident(const EntryPtr& entry) {
  const auto settled = [&entry] { return entry->cancelled || !entry->under_way(); };
  while (true) {
    if (entry->cancelled) return NoLongerWanted(entry->unit);
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
  entry->state = UnitState::kQueued;  // for room, so that others join
  entry->prefetched = false;
  if (!AwaitRoom(*entry)) {
    entry->state = UnitState::kAbsent;
    return NoLongerWanted(entry->unit);
  }
  Load(entry, /*prefetched=*/false);
  if (entry->cancelled) return NoLongerWanted(entry->unit);
  return entry->state == UnitState::kResident ? absl::OkStatus() : entry->error;
}

void LayerStore::Impl::Load(const EntryPtr& entry, bool prefetched) {
  entry->state = UnitState::kReading;
  entry->prefetched = prefetched;
  entry->load_cycle = cycle_;
  const absl::Time start = absl::Now();
  if (loads_++ == 0) loading_since_ = start;
  mu_.Unlock();
  absl::StatusOr<std::unique_ptr<UnitWeights>> weights =
      loader_.Load(entry->unit, entry->cancelled, [this, &entry](UnitState state) {
        absl::MutexLock lock(&mu_);
        entry->state = state;
      });
  if (entry->cancelled) weights = NoLongerWanted(entry->unit);
  mu_.Lock();
  entry->loaded_at = absl::Now();
  entry->load_time = entry->loaded_at - start;
  if (--loads_ == 0) load_time_ += entry->loaded_at - loading_since_;
  used_ -= entry->load_bytes();
  if (weights.ok()) {
    entry->weights = *std::move(weights);
    entry->state = UnitState::kResident;
    Charge(entry->weights->bytes());
    // Cancelled just now: EndUse frees it if somebody is waiting for it.
    if (entry->cancelled && entry->users == 0) Free(*entry);
  } else if (entry->cancelled) {
    entry->state = UnitState::kAbsent;
  } else {
    entry->error = weights.status();
    entry->state = UnitState::kFailed;
    if (prefetched) ++counters_.failed_prefetches;
  }
  if (streaming_) FillQueue();
  const auto to_load = [](const EntryPtr& e) { return e->state != UnitState::kResident; };
  if (loads_ == 0 && std::none_of(entries_.begin(), entries_.end(), to_load)) loader_.FreeBuffers();
}

void LayerStore::Impl::Prefetch(Prefetcher::Ticket ticket) {
  absl::MutexLock lock(&mu_);
  const auto it = std::find_if(entries_.begin(), entries_.end(),
                               [ticket](const auto& entry) { return entry->ticket == ticket; });
  if (it == entries_.end() || (*it)->cancelled) return;
  const EntryPtr entry = *it;
  if (entry->state != UnitState::kQueued) return;
  FillQueue();
  // One at a time, lest what comes later takes the room made for this.
  const auto my_turn = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return !making_room_; };
  mu_.Await(absl::Condition(&my_turn));
  making_room_ = true;
  const bool granted = room_waiters_ == 0 && MakeRoom(*entry, /*urgent=*/false);
  making_room_ = false;
  if (!granted) {  // absent until a lease, a load or a step of the cycle ends
    entry->state = UnitState::kAbsent;
    return;
  }
  Load(entry, /*prefetched=*/true);
}

void LayerStore::Impl::FillQueue() {
  if (!prefetcher_ || shutdown_ || !room_status_.ok()) return;
  if (streaming_) {  // position_ may have moved: rank the queued ones anew
    for (const EntryPtr& entry : entries_) {
      if (prefetcher_->Cancel(entry->ticket)) entry->state = UnitState::kAbsent;
    }
  }
  const size_t first = streaming_ ? position_ : 0;
  int ahead = 0;
  for (size_t i = 0; i < entries_.size(); ++i) {
    const EntryPtr& entry = entries_[(first + i) % entries_.size()];
    if (!entry->fixed && ++ahead > distance_) continue;
    if (entry->state != UnitState::kAbsent) continue;
    // What comes later must not take the room that this one waits for.
    if (!CanMakeRoom(*entry, /*urgent=*/false) || !prefetcher_->Push(entry->ticket)) return;
    entry->state = UnitState::kQueued;
    entry->prefetched = true;
  }
}

LayerStore::Impl::EntryPtr LayerStore::Impl::Find(const Unit& unit) const {
  const auto it = std::find_if(entries_.begin(), entries_.end(),
                               [&unit](const auto& entry) { return entry->unit == unit; });
  return it == entries_.end() ? nullptr : *it;
}

absl::StatusOr<uint64_t> LayerStore::Impl::WeightBytes() const {
  absl::MutexLock lock(&mu_);
  if (!room_status_.ok()) return room_status_;
  uint64_t bytes = 0;
  for (const EntryPtr& entry : entries_) bytes += entry->size.resident_bytes;
  return std::min(bytes, limit_);
}

std::vector<UnitState> LayerStore::Impl::States() const {
  absl::MutexLock lock(&mu_);
  std::vector<UnitState> states;
  for (const EntryPtr& entry : entries_) states.push_back(entry->state);
  return states;
}

LayerStoreStats LayerStore::Impl::Stats() const {
  absl::MutexLock lock(&mu_);
  LayerStoreStats stats = counters_;
  for (const EntryPtr& entry : entries_) {
    const uint64_t bytes = model_->UnitBytes(entry->unit);
    stats.slice_bytes += bytes;
    if (entry->state == UnitState::kResident) stats.loaded_bytes += bytes;
    if (entry->state == UnitState::kQueued) ++stats.queued_units;
    if (entry->fixed) ++stats.fixed_units;
    stats.fixed.push_back(entry->fixed);
  }
  const absl::Duration running = loads_ > 0 ? absl::Now() - loading_since_ : absl::ZeroDuration();
  stats.load_seconds = absl::ToDoubleSeconds(load_time_ + running);
  stats.stall_seconds = absl::ToDoubleSeconds(stall_time_);
  stats.streaming = streaming_;
  stats.budget_bytes = limit_ == UINT64_MAX ? 0 : limit_;
  stats.resident_bytes = used_;
  stats.window_units = window_units_;
  stats.distance = distance_;
  const LoadCounters load = loader_.counters();
  stats.read_bytes = load.read_bytes;
  stats.read_seconds = load.read_seconds;
  stats.convert_seconds = load.convert_seconds;
  stats.host_read_bytes = load.host_read_bytes;
  stats.host_seconds = load.host_seconds;
  const HostTierStats host = host_ ? host_->Stats() : HostTierStats();
  stats.host_tier = host_.has_value();
  stats.host_hits = host.hits;
  stats.host_bytes = host.bytes;
  stats.host_raw_bytes = host.raw_bytes;
  if (host.tried_bytes > 0) {
    stats.host_codec_ratio =
        static_cast<double>(host.tried_raw_bytes) / static_cast<double>(host.tried_bytes);
  }
  return stats;
}

LayerStore::Impl::EntryPtr LayerStore::Impl::FindByTensor(const TensorInfo* tensor) const {
  for (const EntryPtr& entry : entries_) {
    for (const UnitTensor& part : model_->UnitTensors(entry->unit)) {
      if (part.tensor == tensor) return entry;
    }
  }
  return nullptr;
}

StorageTrouble LayerStore::Impl::Trouble() const {
  const std::vector<OpenRead> reads = loader_.OpenReads();
  absl::MutexLock lock(&mu_);
  for (const OpenRead& read : reads) {
    const absl::Duration age = absl::Now() - read.since;
    const EntryPtr entry = age < kStallTime ? nullptr : FindByTensor(read.tensor);
    if (entry == nullptr) continue;  // a cancelled load's
    return {.stalled = true,
            .detail = fmt::format("waiting for {}: read of {:.3g} MB under way for {:.0f} s",
                                  UnitName(entry->unit), static_cast<double>(read.bytes) / 1e6,
                                  std::floor(absl::ToDoubleSeconds(age)))};
  }
  for (const EntryPtr& entry : entries_) {
    if (entry->state != UnitState::kFailed) continue;
    return {.detail = fmt::format("{} could not be loaded: {}", UnitName(entry->unit),
                                  std::string(entry->error.message()))};
  }
  return {};
}

void LayerStore::Impl::Shutdown() {
  {
    absl::MutexLock lock(&mu_);
    shutdown_ = true;
    for (const EntryPtr& entry : entries_) entry->cancelled = true;
  }
  if (prefetcher_) prefetcher_->Shutdown();
  absl::MutexLock lock(&mu_);
  const auto left = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return waiters_ == 0; };
  mu_.Await(absl::Condition(&left));
  for (const EntryPtr& entry : entries_) {
    if (entry->state == UnitState::kQueued) entry->state = UnitState::kAbsent;
  }
  loader_.FreeBuffers();
}

LayerStore::LayerStore(Backend* backend, std::shared_ptr<const ModelFile> model,
                       LayerStoreOptions options)
    : impl_(std::make_shared<Impl>(backend, std::move(model), options)) {}
LayerStore::~LayerStore() { impl_->Shutdown(); }
void LayerStore::Assign(const std::vector<Unit>& units) { impl_->Assign(units); }
absl::StatusOr<UnitLease> LayerStore::Acquire(const Unit& unit) { return impl_->Acquire(unit); }
absl::StatusOr<uint64_t> LayerStore::WeightBytes() const { return impl_->WeightBytes(); }
std::vector<UnitState> LayerStore::States() const { return impl_->States(); }
LayerStoreStats LayerStore::Stats() const { return impl_->Stats(); }
StorageTrouble LayerStore::Trouble() const { return impl_->Trouble(); }
void LayerStore::Shutdown() { impl_->Shutdown(); }

}  // namespace stagecoach
