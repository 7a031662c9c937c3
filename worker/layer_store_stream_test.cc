// The layer store under a weight budget smaller than the slice.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/model_error.h"
#include "worker/layer_store.h"
#include "worker/layer_store_fixture.h"
#include "worker/residency.h"

namespace stagecoach {
namespace {

using ::testing::HasSubstr;

class LayerStoreStreamTest : public LayerStoreTest {
 protected:
  void SetUp() override { Open("demo-Q4_K_M.gguf"); }
  void Open(const std::string& name) {
    OpenModel(name);
    hashes_.clear();
    for (const Unit& unit : units_) hashes_.push_back(ExpectedHash(unit));
  }
  uint64_t SmallestForAll() const {
    std::vector<UnitSize> sizes;
    for (const Unit& unit : units_) sizes.push_back(MeasureUnit(backend_, *model_, unit));
    return SmallestBudget(sizes);
  }
  // Visits all units, computing with each for a while.
  void RunPass(LayerStore& store, absl::Duration compute) {
    for (size_t i = 0; i < units_.size(); ++i) {
      const auto lease = store.Acquire(units_[i]);
      ASSERT_TRUE(lease.ok()) << lease.status();
      absl::SleepFor(compute);
      ASSERT_EQ(Hash(*lease), hashes_[i]);
    }
  }
  void ExpectWithinBudget(const LayerStore& store) const {
    const LayerStoreStats stats = store.Stats();
    EXPECT_LE(backend_.live().peak, stats.budget_bytes);
    EXPECT_LE(stats.peak_resident_bytes, stats.budget_bytes);
  }
  // Until nothing is queued or under way.
  static void AwaitIdle(const LayerStore& store) {
    const auto busy = [&store] {
      const std::vector<UnitState> states = store.States();
      return std::any_of(states.begin(), states.end(), [](UnitState state) {
        return state != UnitState::kResident && state != UnitState::kAbsent;
      });
    };
    while (busy()) absl::SleepFor(absl::Milliseconds(1));
  }

  std::vector<uint64_t> hashes_;
};

TEST_F(LayerStoreStreamTest, OnceWarmNothingIsLoadedSynchronously) {
  LayerStore store = MakeStore({.weight_budget_percent = 25});
  store.Assign(units_);
  RunPass(store, absl::Milliseconds(2));
  const LayerStoreStats warm = store.Stats();
  for (int pass = 0; pass < 4; ++pass) RunPass(store, absl::Milliseconds(2));
  const LayerStoreStats stats = store.Stats();
  EXPECT_TRUE(stats.streaming);
  EXPECT_EQ(stats.misses, warm.misses);
  // Every one was prefetched; how many in time is a matter of speed, measured by the benchmark.
  EXPECT_EQ(stats.hits + stats.late_hits - warm.hits - warm.late_hits, 4 * units_.size());
  EXPECT_GT(stats.evictions, warm.evictions);
  EXPECT_GE(stats.window_units, 2);
  EXPECT_GE(stats.fixed_units, 2);
  EXPECT_LT(stats.loaded_bytes, stats.slice_bytes);
  ExpectWithinBudget(store);
}

TEST_F(LayerStoreStreamTest, TheFirstUnitsAreThereAgainAfterAnIdleTime) {
  LayerStore store = MakeStore({.weight_budget_bytes = SmallestForAll()});
  store.Assign(units_);
  RunPass(store, absl::ZeroDuration());
  AwaitIdle(store);
  const LayerStoreStats before = store.Stats();
  EXPECT_EQ(before.window_units, 2);
  for (size_t i = 0; i < 2; ++i) ASSERT_TRUE(store.Acquire(units_[i]).ok());
  EXPECT_EQ(store.Stats().hits, before.hits + 2);
  ExpectWithinBudget(store);
}

TEST_F(LayerStoreStreamTest, WithoutPrefetchTheSameRulesHold) {
  LayerStore store = MakeStore({.prefetch = false, .weight_budget_percent = 25});
  store.Assign(units_);
  for (int pass = 0; pass < 3; ++pass) RunPass(store, absl::ZeroDuration());
  const LayerStoreStats stats = store.Stats();
  EXPECT_GT(stats.misses, 2 * (units_.size() - stats.fixed_units - stats.window_units));
  EXPECT_EQ(stats.late_hits, 0);
  EXPECT_GT(stats.evictions, 0);
  ExpectWithinBudget(store);
}

TEST_F(LayerStoreStreamTest, AThirdLoadIntoTheBackendsMemoryCostsNoFixedUnit) {
  const auto fixed_units = [&](int loads) {
    LayerStore store = MakeStore({.reader_threads = loads, .weight_budget_percent = 60});
    store.Assign(units_);
    return store.Stats().fixed_units;
  };
  EXPECT_LT(fixed_units(3), fixed_units(2));
  backend_.own_memory = true;
  EXPECT_EQ(fixed_units(3), fixed_units(2));
  EXPECT_LT(fixed_units(2), fixed_units(1));
}

TEST_F(LayerStoreStreamTest, TheDistanceGrowsWithStallsAndShrinksWhenUnitsWait) {
  hook_->Set([](const RandomAccessFile& file, uint64_t offset, std::span<std::byte> out) {
    absl::SleepFor(absl::Milliseconds(1));  // each unit is read in about ten
    return file.ReadSome(offset, out);
  });
  LayerStore store = MakeStore({.reader_threads = 4, .weight_budget_percent = 40});
  store.Assign(units_);
  ASSERT_GE(store.Stats().window_units, 4);
  RunPass(store, absl::ZeroDuration());
  RunPass(store, absl::ZeroDuration());
  EXPECT_EQ(store.Stats().distance, store.Stats().window_units);
  hook_->Set(nullptr);
  for (int pass = 0; pass < 20 && store.Stats().distance > 2; ++pass) {
    RunPass(store, absl::Milliseconds(8));
  }
  EXPECT_LE(store.Stats().distance, 2);
  ExpectWithinBudget(store);
}

TEST_F(LayerStoreStreamTest, ATooSmallBudgetIsRefusedNamingTheSmallestThatWorks) {
  const uint64_t smallest = SmallestForAll();
  LayerStore store = MakeStore({.weight_budget_bytes = smallest - 1});
  store.Assign(units_);
  for (const absl::Status& status :
       {store.WeightBytes().status(), store.Acquire(Layer(0)).status()}) {
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_THAT(std::string(status.message()), HasSubstr(std::to_string(smallest)));
    EXPECT_THAT(std::string(status.message()), HasSubstr(std::to_string(smallest - 1)));
  }
  store.Assign({Layer(0)});  // less is enough for it
  EXPECT_TRUE(store.Acquire(Layer(0)).ok());

  LayerStore larger = MakeStore({.weight_budget_bytes = smallest});
  larger.Assign(units_);
  EXPECT_EQ(*larger.WeightBytes(), smallest);
  RunPass(larger, absl::ZeroDuration());

  EXPECT_TRUE(CheckWeightBudget(backend_, *model_, {.weight_budget_bytes = smallest}).ok());
  EXPECT_TRUE(CheckWeightBudget(backend_, *model_, {}).ok());
  const absl::Status status = CheckWeightBudget(backend_, *model_, {.weight_budget_bytes = 1000});
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_FALSE(CheckWeightBudget(backend_, *model_, {.weight_budget_percent = 0.1}).ok());
}

TEST_F(LayerStoreStreamTest, ALeasedUnitStaysWhileOthersStreamPastIt) {
  LayerStore store = MakeStore({.reader_threads = 2, .weight_budget_percent = 40});
  store.Assign(units_);
  const auto lease = store.Acquire(Layer(3));
  ASSERT_TRUE(lease.ok()) << lease.status();
  const UnitWeights* const place = lease->get();
  for (int pass = 0; pass < 2; ++pass) RunPass(store, absl::ZeroDuration());
  const auto again = store.Acquire(Layer(3));
  ASSERT_TRUE(again.ok());
  EXPECT_EQ(again->get(), place);
  EXPECT_EQ(Hash(*lease), ExpectedHash(Layer(3)));
  EXPECT_GT(store.Stats().evictions, 0);
  ExpectWithinBudget(store);
}

TEST_F(LayerStoreStreamTest, FailedReadsFallBackToASynchronousLoadAndThenToATypedError) {
  std::atomic<int> failures = 0;
  LayerStore store = MakeStore({.weight_budget_percent = 25});
  hook_->Set([&](const RandomAccessFile& file, uint64_t offset,
                 std::span<std::byte> out) -> absl::StatusOr<size_t> {
    if (Hits(Layer(5), 1, offset) && failures > 0) {
      --failures;
      return MakeModelError(ModelError::kIo, "the disk is on fire");
    }
    return file.ReadSome(offset, out);
  });
  failures = kReadRetries + 1;  // the prefetch fails, the load after it does not
  store.Assign(units_);
  RunPass(store, absl::Milliseconds(1));
  EXPECT_EQ(store.Stats().failed_prefetches, 1);
  EXPECT_GE(store.Stats().misses, 1);

  std::vector<Unit> others = units_;
  std::erase(others, Layer(5));
  store.Assign(others);  // drops it
  failures = 1 << 20;
  store.Assign(units_);
  const absl::Status status = store.Acquire(Layer(5)).status();
  EXPECT_EQ(GetModelError(status), ModelError::kIo) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(TensorName(Layer(5), 1)));
  failures = 0;
  RunPass(store, absl::ZeroDuration());
  ExpectWithinBudget(store);
}

TEST_F(LayerStoreStreamTest, TheHostTierServesWhatWasEvicted) {
  for (const std::string model : {"demo-Q4_K_M.gguf", "demo2-f16.gguf", "demo2-BF16.gguf"}) {
    Open(model);
    for (const HostCodec codec : {HostCodec::kNone, HostCodec::kLz4, HostCodec::kZstd}) {
      LayerStore store = MakeStore({.weight_budget_bytes = SmallestForAll(),
                                    .host_cache_bytes = 64 << 20,
                                    .host_cache_codec = codec});
      store.Assign(units_);
      for (int pass = 0; pass < 2; ++pass) RunPass(store, absl::ZeroDuration());
      AwaitIdle(store);
      const LayerStoreStats before = store.Stats();
      for (int pass = 0; pass < 2; ++pass) RunPass(store, absl::ZeroDuration());
      const LayerStoreStats stats = store.Stats();
      EXPECT_EQ(stats.read_bytes, before.read_bytes) << model;  // all from the tier
      EXPECT_GT(stats.host_hits, before.host_hits);
      EXPECT_GT(stats.host_read_bytes, before.host_read_bytes);
      EXPECT_GT(stats.host_bytes, 0);
      EXPECT_LE(stats.host_bytes, stats.host_raw_bytes);
      EXPECT_TRUE(codec != HostCodec::kNone || stats.host_bytes == stats.host_raw_bytes);
      RecordProperty(model + std::to_string(static_cast<int>(codec)),
                     std::to_string(1.0 * stats.host_raw_bytes / stats.host_bytes));
    }
  }
}

// 2 s, or as many as the environment variable STAGECOACH_STRESS_SECONDS says.
TEST_F(LayerStoreStreamTest, RapidRandomAccessFromEightThreads) {
  const char* const wanted = std::getenv("STAGECOACH_STRESS_SECONDS");
  const absl::Time end = absl::Now() + absl::Seconds(wanted != nullptr ? std::atoi(wanted) : 2);
  LayerStore store = MakeStore({.reader_threads = 3,
                                .weight_budget_bytes = SmallestForAll() * 5 / 4,
                                .host_cache_bytes = 2 << 20,
                                .host_cache_codec = HostCodec::kLz4});
  store.Assign(units_);
  std::atomic<uint64_t> leases = 0;
  std::vector<std::thread> threads;
  for (uint32_t seed = 0; seed < 8; ++seed) {
    threads.emplace_back([&, seed] {
      std::mt19937 random(seed);
      while (absl::Now() < end) {
        const size_t i = random() % units_.size();
        const auto lease = store.Acquire(units_[i]);
        ASSERT_TRUE(lease.ok()) << lease.status();
        if (random() % 4 == 0) absl::SleepFor(absl::Microseconds(random() % 300));
        ASSERT_EQ(Hash(*lease), hashes_[i]);
        ++leases;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_GT(leases, 100);
  EXPECT_GT(store.Stats().evictions, 10);
  ExpectWithinBudget(store);
  store.Shutdown();
}

TEST_F(LayerStoreStreamTest, StartsReassignmentsAndStopsAtRandomPoints) {
  std::mt19937 random(3);
  std::atomic<int> leases = 0;
  for (int round = 0; round < 1000; ++round) {
    std::optional<LayerStore> store;
    store.emplace(&backend_, model_,
                  LayerStoreOptions{.prefetch = round % 8 != 0,
                                    .reader_threads = 1 + round % 3,
                                    .weight_budget_bytes = SmallestForAll() + random() % 500'000,
                                    .host_cache_bytes = round % 2 * 1'000'000u});
    store->Assign(units_);
    std::thread stage([&] {
      for (size_t i = 0; i < units_.size(); ++i) {
        const auto lease = store->Acquire(units_[i]);
        if (!lease.ok()) continue;
        EXPECT_EQ(Hash(*lease), hashes_[i]);
        ++leases;
      }
    });
    absl::SleepFor(absl::Microseconds(random() % 1000));
    if (round % 3 == 0) {
      const size_t first = random() % units_.size();
      store->Assign({units_.begin() + first, units_.end()});
      absl::SleepFor(absl::Microseconds(random() % 1000));
    }
    store->Shutdown();
    stage.join();
    EXPECT_LE(store->Stats().peak_resident_bytes, store->Stats().budget_bytes);
    store.reset();
    ASSERT_EQ(backend_.live().now, 0) << round;  // no leak
  }
  EXPECT_GT(leases, 0);
}

}  // namespace
}  // namespace stagecoach
