// The layer store over storage that fails, and under starts and stops at any moment.
#include <algorithm>
#include <atomic>
#include <optional>
#include <random>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/model_error.h"
#include "worker/layer_store.h"
#include "worker/layer_store_fixture.h"

namespace stagecoach {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

class LayerStoreFaultTest : public LayerStoreTest {
 protected:
  // Reads of the unit's `index`-th tensor fail while `failing` is set.
  void FailReads(const Unit& unit, int index, const std::atomic<bool>& failing) {
    hook_->Set([this, unit, index, &failing](const RandomAccessFile& file, uint64_t offset,
                                             std::span<std::byte> out) -> absl::StatusOr<size_t> {
      if (failing && Hits(unit, index, offset)) {
        return MakeModelError(ModelError::kIo, "the disk is on fire");
      }
      return file.ReadSome(offset, out);
    });
  }
};

TEST_F(LayerStoreFaultTest, ReadsOfSevenBytesGiveTheSameWeights) {
  std::vector<uint64_t> expected;
  for (const Unit& unit : {Layer(0), Layer(1)}) expected.push_back(ExpectedHash(unit));
  hook_->Set([](const RandomAccessFile& file, uint64_t offset, std::span<std::byte> out) {
    return file.ReadSome(offset, out.first(std::min<size_t>(out.size(), 7)));
  });
  LayerStore store = MakeStore({.reader_threads = 2});
  store.Assign({Layer(0), Layer(1)});
  for (int layer = 0; layer < 2; ++layer) {
    const auto lease = store.Acquire(Layer(layer));
    ASSERT_TRUE(lease.ok()) << lease.status();
    EXPECT_EQ(Hash(*lease), expected[layer]);
  }
}

TEST_F(LayerStoreFaultTest, ASingleFailingReadIsRetried) {
  for (int failing_read = 0; failing_read < 8; ++failing_read) {
    std::atomic<int> reads = 0;
    hook_->Set([&](const RandomAccessFile& file, uint64_t offset,
                   std::span<std::byte> out) -> absl::StatusOr<size_t> {
      if (reads++ == failing_read) return MakeModelError(ModelError::kIo, "a hiccup");
      return file.ReadSome(offset, out);
    });
    LayerStore store = MakeStore();
    store.Assign({Layer(0)});
    EXPECT_TRUE(store.Acquire(Layer(0)).ok());
    EXPECT_EQ(store.Stats().failed_prefetches, 0);
    EXPECT_GT(reads, failing_read);
    store.Shutdown();
  }
}

TEST_F(LayerStoreFaultTest, AFailedPrefetchIsMadeGoodSynchronously) {
  std::atomic<bool> failing = true;
  FailReads(Layer(1), 0, failing);
  LayerStore store = MakeStore();
  store.Assign(units_);
  EXPECT_THAT(AwaitSettled(store), ElementsAre(UnitState::kResident, UnitState::kResident,
                                               UnitState::kFailed, UnitState::kResident));
  EXPECT_EQ(store.Stats().failed_prefetches, 1);
  failing = false;
  const auto lease = store.Acquire(Layer(1));
  ASSERT_TRUE(lease.ok()) << lease.status();
  EXPECT_EQ(Hash(*lease), ExpectedHash(Layer(1)));
  EXPECT_EQ(store.Stats().misses, 1);
  EXPECT_EQ(store.Stats().failed_prefetches, 1);
}

TEST_F(LayerStoreFaultTest, APermanentFailureNamesTensorAndOffsetAndLeavesTheOthers) {
  std::atomic<bool> failing = true;
  FailReads(Layer(0), 1, failing);
  LayerStore store = MakeStore();
  store.Assign(units_);
  const TensorInfo& tensor = *model_->UnitTensors(Layer(0))[1].tensor;
  for (int i = 0; i < 2; ++i) {
    const absl::Status status = store.Acquire(Layer(0)).status();
    EXPECT_EQ(GetModelError(status), ModelError::kIo) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(tensor.name));
    EXPECT_THAT(std::string(status.message()), HasSubstr(std::to_string(tensor.offset)));
    EXPECT_THAT(std::string(status.message()), HasSubstr("on fire"));
  }
  EXPECT_THAT(AwaitSettled(store), ElementsAre(UnitState::kResident, UnitState::kFailed,
                                               UnitState::kResident, UnitState::kResident));
  failing = false;  // a new assignment tries again by itself
  store.Assign(units_);
  EXPECT_THAT(AwaitSettled(store), Each(UnitState::kResident));
}

TEST_F(LayerStoreFaultTest, ATruncatedFileIsTypedAndNamesTheTensor) {
  hook_->Set([&](const RandomAccessFile& file, uint64_t offset,
                 std::span<std::byte> out) -> absl::StatusOr<size_t> {
    if (Hits(Head(), 1, offset)) return 0;
    return file.ReadSome(offset, out);
  });
  LayerStore store = MakeStore({.prefetch = false});
  store.Assign(units_);
  const absl::Status status = store.Acquire(Head()).status();
  EXPECT_EQ(GetModelError(status), ModelError::kTruncated) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(TensorName(Head(), 1)));
}

TEST_F(LayerStoreFaultTest, AChangedFileIsRefusedWhileResidentsServeOn) {
  LayerStore store = MakeStore({.prefetch = false});
  store.Assign(units_);
  EXPECT_TRUE(store.Acquire(Layer(0)).ok());
  hook_->SetIdentityChange(true);
  EXPECT_EQ(GetModelError(store.Acquire(Layer(1)).status()), ModelError::kChanged);
  EXPECT_TRUE(store.Acquire(Layer(0)).ok());
}

TEST_F(LayerStoreFaultTest, ABitFlippedSinceTheFirstLoadIsFound) {
  LayerStore store = MakeStore();
  store.Assign(units_);
  AwaitSettled(store);
  store.Assign({});
  hook_->Set([&](const RandomAccessFile& file, uint64_t offset, std::span<std::byte> out) {
    absl::StatusOr<size_t> count = file.ReadSome(offset, out);
    if (Hits(Layer(1), 2, offset) && count.ok() && *count > 5) out[5] ^= std::byte{0x10};
    return count;
  });
  store.Assign(units_);
  const absl::Status status = store.Acquire(Layer(1)).status();
  EXPECT_EQ(GetModelError(status), ModelError::kChanged) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(TensorName(Layer(1), 2)));
  EXPECT_TRUE(store.Acquire(Layer(0)).ok());
}

TEST_F(LayerStoreFaultTest, WhatTheBackendRefusesNamesTheTensorToo) {
  backend_.on_add = [](const Unit& unit, const TensorInfo&) {
    return unit == Layer(0) ? absl::ResourceExhaustedError("device full") : absl::OkStatus();
  };
  LayerStore store = MakeStore();
  store.Assign(units_);
  const absl::Status status = store.Acquire(Layer(0)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr(TensorName(Layer(0), 0)));
  EXPECT_THAT(std::string(status.message()), HasSubstr("device full"));
}

// Starts, re-assignments and stops at random points, with readers that fail now and then and
// threads that acquire meanwhile. Every lease must hold the right bytes.
TEST_F(LayerStoreFaultTest, SurvivesStartsAndStopsAtRandomPoints) {
  OpenModel("demo-Q4_K_M.gguf");
  std::vector<uint64_t> hashes;
  for (const Unit& unit : units_) hashes.push_back(ExpectedHash(unit));
  std::atomic<uint32_t> reads = 0;
  hook_->Set([&](const RandomAccessFile& file, uint64_t offset,
                 std::span<std::byte> out) -> absl::StatusOr<size_t> {
    if (reads++ % 8192 < 5) return MakeModelError(ModelError::kIo, "now and then");
    return file.ReadSome(offset, out);
  });
  std::mt19937 random(7);
  int leases_held = 0;
  for (int round = 0; round < 250; ++round) {
    std::optional<LayerStore> store;
    store.emplace(&backend_, model_,
                  LayerStoreOptions{.prefetch = round % 8 != 0,
                                    .reader_threads = 1 + round % 3,
                                    .max_queued_units = 1 + static_cast<int>(random() % 9)});
    store->Assign(units_);
    std::atomic<int> leases = 0;
    std::vector<std::thread> threads;
    for (uint32_t seed : {random(), random()}) {
      threads.emplace_back([&, seed] {
        for (size_t i = seed % units_.size(); i < units_.size(); ++i) {
          const auto lease = store->Acquire(units_[i]);
          if (!lease.ok()) continue;
          EXPECT_EQ(Hash(*lease), hashes[i]);
          ++leases;
        }
      });
    }
    for (uint32_t i = random() % 4; i > 0; --i) {
      absl::SleepFor(absl::Microseconds(random() % 1500));
      const size_t first = random() % units_.size();
      const size_t count = random() % (units_.size() - first + 1);
      store->Assign({units_.begin() + first, units_.begin() + first + count});
    }
    absl::SleepFor(absl::Microseconds(random() % 3000));
    if (round % 2 == 0) store->Shutdown();
    for (std::thread& thread : threads) thread.join();
    leases_held += leases;
    store.reset();
  }
  EXPECT_GT(leases_held, 250);
}

}  // namespace
}  // namespace stagecoach
