#include "worker/layer_store.h"

#include <atomic>
#include <optional>
#include <thread>
#include <vector>

#include "absl/synchronization/blocking_counter.h"
#include "absl/synchronization/notification.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "worker/layer_store_fixture.h"

namespace stagecoach {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;

TEST_F(LayerStoreTest, PrefetchesEveryUnitInExecutionOrderWithTheBytesOfTheFile) {
  LayerStore store = MakeStore({.max_queued_units = 1});
  store.Assign(units_);
  EXPECT_THAT(AwaitSettled(store), Each(UnitState::kResident));
  EXPECT_THAT(backend_.loads(), ElementsAre("embedding", "layer 0", "layer 1", "head"));
  for (const Unit& unit : units_) {
    const auto lease = store.Acquire(unit);
    ASSERT_TRUE(lease.ok()) << lease.status();
    EXPECT_EQ(Hash(*lease), ExpectedHash(unit)) << UnitName(unit);
  }
  const LayerStoreStats stats = store.Stats();
  EXPECT_EQ(stats.hits, 4);
  EXPECT_EQ(stats.late_hits, 0);
  EXPECT_EQ(stats.misses, 0);
  EXPECT_GT(stats.slice_bytes, 0);
  EXPECT_EQ(stats.loaded_bytes, stats.slice_bytes);
  EXPECT_EQ(stats.read_bytes, stats.slice_bytes);
  EXPECT_GT(stats.load_seconds, 0);
  EXPECT_EQ(stats.stall_seconds, 0);
}

TEST_F(LayerStoreTest, ReadsOneUnitWhileAnotherIsConverted) {
  // Converting the embedding cannot end before layer 0 has been read and is being converted too.
  absl::Notification layer_converting;
  backend_.on_add = [&](const Unit& unit, const TensorInfo&) {
    if (unit == Embedding()) layer_converting.WaitForNotification();
    if (unit == Layer(0) && !layer_converting.HasBeenNotified()) layer_converting.Notify();
    return absl::OkStatus();
  };
  LayerStore store = MakeStore({.reader_threads = 2});
  store.Assign(units_);
  EXPECT_THAT(AwaitSettled(store), Each(UnitState::kResident));
}

TEST_F(LayerStoreTest, BoundsTheQueueAndLoadsWhatIsBeyondItSynchronously) {
  Gate gate;
  gate.Close();
  hook_->Set([&](const RandomAccessFile& file, uint64_t offset, std::span<std::byte> out) {
    if (Hits(Embedding(), 0, offset)) gate.Pass();
    return file.ReadSome(offset, out);
  });
  LayerStore store = MakeStore({.max_queued_units = 2});
  store.Assign(units_);
  gate.AwaitWaiting(1);
  EXPECT_THAT(store.States(), ElementsAre(UnitState::kReading, UnitState::kQueued,
                                          UnitState::kQueued, UnitState::kAbsent));
  EXPECT_TRUE(store.Acquire(Head()).ok());
  EXPECT_EQ(store.Stats().misses, 1);
  EXPECT_GT(store.Stats().stall_seconds, 0);
  gate.Open();
  EXPECT_THAT(AwaitSettled(store), Each(UnitState::kResident));
  EXPECT_THAT(backend_.loads(), ElementsAre("embedding", "head", "layer 0", "layer 1"));
}

TEST_F(LayerStoreTest, RequestsJoinALoadUnderWay) {
  Gate gate;
  gate.Close();
  hook_->Set([&](const RandomAccessFile& file, uint64_t offset, std::span<std::byte> out) {
    gate.Pass();
    return file.ReadSome(offset, out);
  });
  LayerStore store = MakeStore();
  store.Assign({Layer(0)});
  gate.AwaitWaiting(1);
  std::atomic<int> ok = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] { ok += store.Acquire(Layer(0)).ok(); });
  }
  absl::SleepFor(absl::Milliseconds(20));
  EXPECT_EQ(ok, 0);
  gate.Open();
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(ok, 4);
  EXPECT_THAT(backend_.loads(), ElementsAre("layer 0"));
  EXPECT_EQ(store.Stats().late_hits + store.Stats().hits, 4);
  EXPECT_GE(store.Stats().late_hits, 1);
  EXPECT_EQ(store.Stats().misses, 0);
}

TEST_F(LayerStoreTest, WaitingForAQueuedUnitBringsItForward) {
  Gate gate;
  gate.Close();
  hook_->Set([&](const RandomAccessFile& file, uint64_t offset, std::span<std::byte> out) {
    if (Hits(Embedding(), 0, offset)) gate.Pass();
    return file.ReadSome(offset, out);
  });
  LayerStore store = MakeStore();
  store.Assign(units_);
  gate.AwaitWaiting(1);
  std::thread waiter([&] { EXPECT_TRUE(store.Acquire(Head()).ok()); });
  absl::SleepFor(absl::Milliseconds(50));
  gate.Open();
  waiter.join();
  EXPECT_EQ(store.Stats().late_hits, 1);
  EXPECT_THAT(AwaitSettled(store), Each(UnitState::kResident));
  EXPECT_THAT(backend_.loads(), ElementsAre("embedding", "head", "layer 0", "layer 1"));
}

TEST_F(LayerStoreTest, WithoutPrefetchLoadsOnFirstUseOnly) {
  LayerStore store = MakeStore({.prefetch = false});
  store.Assign(units_);
  EXPECT_THAT(store.States(), Each(UnitState::kAbsent));
  EXPECT_TRUE(store.Acquire(Layer(1)).ok());
  EXPECT_TRUE(store.Acquire(Layer(1)).ok());
  EXPECT_THAT(backend_.loads(), ElementsAre("layer 1"));
  EXPECT_EQ(store.Stats().misses, 1);
  EXPECT_EQ(store.Stats().hits, 1);
}

TEST_F(LayerStoreTest, ReassigningKeepsWhatIsWantedAndCancelsTheRest) {
  Gate gate;
  gate.Close();
  hook_->Set([&](const RandomAccessFile& file, uint64_t offset, std::span<std::byte> out) {
    if (Hits(Layer(0), 0, offset)) gate.Pass();
    return file.ReadSome(offset, out);
  });
  LayerStore store = MakeStore();
  store.Assign(units_);
  gate.AwaitWaiting(1);  // the embedding is resident, layer 0 under way, the others queued
  std::optional<absl::StatusOr<UnitLease>> unwanted;
  std::thread waiter([&] { unwanted = store.Acquire(Head()); });
  absl::SleepFor(absl::Milliseconds(20));
  store.Assign({Layer(1), Layer(0)});
  waiter.join();
  EXPECT_EQ(unwanted->status().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(store.Acquire(Embedding()).status().code(), absl::StatusCode::kCancelled);
  gate.Open();
  EXPECT_THAT(AwaitSettled(store), ElementsAre(UnitState::kResident, UnitState::kResident));
  EXPECT_THAT(backend_.loads(), ElementsAre("embedding", "layer 0", "layer 1"));
}

TEST_F(LayerStoreTest, ReassigningStopsAReadUnderWayAndReadsAgainIfWantedAgain) {
  Gate gate;
  gate.Close();
  hook_->Set([&](const RandomAccessFile& file, uint64_t offset, std::span<std::byte> out) {
    gate.Pass();
    return file.ReadSome(offset, out);
  });
  LayerStore store = MakeStore({.reader_threads = 2});
  store.Assign({Layer(0)});
  gate.AwaitWaiting(1);
  store.Assign({});
  store.Assign({Layer(0)});
  gate.AwaitWaiting(2);
  gate.Open();
  EXPECT_TRUE(store.Acquire(Layer(0)).ok());
  EXPECT_THAT(backend_.loads(), ElementsAre("layer 0", "layer 0"));
}

TEST_F(LayerStoreTest, LeasesOutliveTheAssignmentAndTheStore) {
  UnitLease lease;
  {
    LayerStore store = MakeStore();
    store.Assign(units_);
    auto acquired = store.Acquire(Layer(1));
    ASSERT_TRUE(acquired.ok()) << acquired.status();
    lease = *std::move(acquired);
    store.Assign({});
    EXPECT_THAT(store.States(), ElementsAre());
    EXPECT_EQ(store.Stats().slice_bytes, 0);
  }
  EXPECT_EQ(Hash(lease), ExpectedHash(Layer(1)));
}

TEST_F(LayerStoreTest, ShutdownWhileReadingWakesWaitersAndIsIdempotent) {
  Gate gate;
  gate.Close();
  hook_->Set([&](const RandomAccessFile& file, uint64_t offset, std::span<std::byte> out) {
    gate.Pass();
    return file.ReadSome(offset, out);
  });
  LayerStore store = MakeStore();
  store.Assign(units_);
  gate.AwaitWaiting(1);
  std::thread joined(
      [&] { EXPECT_EQ(store.Acquire(Embedding()).status().code(), absl::StatusCode::kCancelled); });
  std::thread queued(
      [&] { EXPECT_EQ(store.Acquire(Head()).status().code(), absl::StatusCode::kCancelled); });
  absl::SleepFor(absl::Milliseconds(20));
  std::thread other([&] { store.Shutdown(); });
  joined.join();  // without waiting for the read
  queued.join();
  gate.Open();
  store.Shutdown();
  other.join();
  EXPECT_EQ(store.Acquire(Layer(0)).status().code(), absl::StatusCode::kCancelled);
  store.Assign(units_);
  EXPECT_THAT(store.States(), Each(UnitState::kAbsent));
  EXPECT_THAT(backend_.loads(), ElementsAre("embedding"));
  store.Shutdown();
}

TEST_F(LayerStoreTest, DestructorSendsWaitersHome) {
  Gate gate;
  gate.Close();
  hook_->Set([&](const RandomAccessFile& file, uint64_t offset, std::span<std::byte> out) {
    gate.Pass();
    return file.ReadSome(offset, out);
  });
  std::optional<LayerStore> store;
  store.emplace(&backend_, model_, LayerStoreOptions{});
  store->Assign(units_);
  gate.AwaitWaiting(1);
  LayerStore* const raw = &*store;
  std::vector<std::thread> waiters;
  absl::BlockingCounter started(static_cast<int>(units_.size()));
  for (const Unit& unit : units_) {
    waiters.emplace_back([raw, unit, &started] {
      started.DecrementCount();
      EXPECT_EQ(raw->Acquire(unit).status().code(), absl::StatusCode::kCancelled);
    });
  }
  started.Wait();
  absl::SleepFor(absl::Milliseconds(200));  // they are inside Acquire by now
  std::thread opener([&] {
    absl::SleepFor(absl::Milliseconds(20));
    gate.Open();
  });
  store.reset();
  for (std::thread& waiter : waiters) waiter.join();
  opener.join();
}

}  // namespace
}  // namespace stagecoach
