// Loads by parts, through memory that the backend reads by itself.
#include "worker/unit_loader.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/model_error.h"
#include "worker/layer_store_fixture.h"
#include "worker/residency.h"

namespace stagecoach {
namespace {

using ::testing::HasSubstr;

// Matrices of demo-Q4_K_M have up to a few hundred rows: parts of kPartRows.
constexpr LoadOptions kSmallParts{.threads = 3, .part_bytes = 1};

class UnitLoaderTest : public LayerStoreTest {
 protected:
  void SetUp() override { OpenModel("demo-Q4_K_M.gguf"); }

  absl::StatusOr<uint64_t> Load(UnitLoader& loader, const Unit& unit) {
    const auto weights = loader.Load(unit, cancelled_, [](UnitState) {});
    if (!weights.ok()) return weights.status();
    return static_cast<const FakeWeights&>(**weights).hash;
  }
  // Of all units' tensors.
  void WantAll(HostTier& tier) {
    std::vector<const TensorInfo*> tensors;
    for (const Unit& unit : units_) {
      for (const UnitTensor& entry : model_->UnitTensors(unit)) tensors.push_back(entry.tensor);
    }
    tier.SetWanted(tensors);
  }
  HostTier MakeTier() {
    return {64 << 20, HostCodec::kNone, [this](size_t bytes) { return allocator_.New(bytes); }};
  }

  HostAllocator allocator_{&backend_};
  std::atomic<bool> cancelled_ = false;
};

TEST_F(UnitLoaderTest, PartsAreWholeRowsInOrder) {
  size_t most = 0;
  for (const Unit& unit : units_) {
    const std::vector<UnitPart> parts = CutUnit(model_->UnitTensors(unit), kSmallParts);
    size_t i = 0;
    for (const UnitTensor& entry : model_->UnitTensors(unit)) {
      const uint64_t row_bytes = entry.tensor->bytes / entry.tensor->rows();
      uint64_t offset = 0;
      for (int index = 0; offset < entry.tensor->bytes; ++index, ++i) {
        ASSERT_LT(i, parts.size());
        EXPECT_EQ(parts[i].tensor, entry.tensor);
        EXPECT_EQ(parts[i].index, index);
        EXPECT_EQ(parts[i].offset, offset);
        EXPECT_EQ(parts[i].first_row * row_bytes, offset);
        EXPECT_EQ(parts[i].first_row % kPartRows, 0u);
        offset += parts[i].bytes;
        EXPECT_EQ(parts[i].last, offset == entry.tensor->bytes);
        most = std::max<size_t>(most, index + 1);
      }
    }
    EXPECT_EQ(i, parts.size());
    EXPECT_EQ(CutUnit(model_->UnitTensors(unit), {}).size(), model_->UnitTensors(unit).size());
  }
  EXPECT_GE(most, 3u) << "the model is too small for this test";
}

// The fake backend takes bytes as late as it may: they must still be there.
TEST_F(UnitLoaderTest, ManyThreadsAndHeldPartsGiveTheSameBytes) {
  for (const bool own_memory : {false, true}) {
    backend_.own_memory = own_memory;
    for (const int threads : {1, 2, 7}) {
      UnitLoader loader(&backend_, model_, &allocator_, {.threads = threads, .part_bytes = 5000});
      for (int pass = 0; pass < 3; ++pass) {
        for (const Unit& unit : units_) EXPECT_EQ(*Load(loader, unit), ExpectedHash(unit));
      }
    }
  }
}

TEST_F(UnitLoaderTest, LoadsOfSeveralUnitsAtOnceShareTheBuffers) {
  backend_.own_memory = true;
  {
    UnitLoader loader(&backend_, model_, &allocator_, kSmallParts);
    std::vector<std::thread> threads;
    for (int t = 0; t < 3; ++t) {
      threads.emplace_back([&, t] {
        for (size_t i = 0; i < units_.size(); ++i) {
          const Unit& unit = units_[(i + t * 3) % units_.size()];
          EXPECT_EQ(*Load(loader, unit), ExpectedHash(unit));
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    loader.FreeBuffers();  // such memory is kept
    EXPECT_GT(backend_.direct().now, 0u);
  }
  EXPECT_EQ(backend_.direct().now, 0u);
}

TEST_F(UnitLoaderTest, PreparedBuffersAreAllThatLoadsUse) {
  backend_.own_memory = true;
  const LoadOptions options{.threads = 2, .part_bytes = 1 << 20};
  UnitLoader loader(&backend_, model_, &allocator_, options);
  loader.Prepare(2);
  const uint64_t prepared = backend_.direct().peak;
  EXPECT_GE(prepared, 2 * LoadSlots(backend_.info(), options) * options.part_bytes);
  std::thread other([&] {
    for (const Unit& unit : units_) EXPECT_TRUE(Load(loader, unit).ok());
  });
  for (const Unit& unit : units_) EXPECT_TRUE(Load(loader, unit).ok());
  other.join();
  EXPECT_EQ(backend_.direct().peak, prepared);
}

TEST_F(UnitLoaderTest, PartsComeInDirectMemoryOrInPagesWhenThereIsNone) {
  backend_.own_memory = true;
  for (const bool direct : {true, false}) {
    backend_.direct_limit = direct ? UINT64_MAX : 0;
    backend_.on_part = [&](const TensorInfo&, const TensorPart& part) {
      ASSERT_NE(part.memory, nullptr);
      EXPECT_EQ(part.memory->direct(), direct);
      EXPECT_GE(part.raw.data(), part.memory->data());
      EXPECT_LE(part.raw.data() + part.raw.size(), part.memory->data() + part.memory->size());
    };
    HostAllocator allocator(&backend_);
    UnitLoader loader(&backend_, model_, &allocator, kSmallParts);
    EXPECT_EQ(*Load(loader, Layer(1)), ExpectedHash(Layer(1)));
    EXPECT_EQ(allocator.fell_back(), !direct);
  }
}

TEST_F(UnitLoaderTest, AHitIsTheTiersOwnMemoryCheckedBefore) {
  for (const bool own_memory : {false, true}) {
    backend_.own_memory = own_memory;
    HostTier tier = MakeTier();
    WantAll(tier);
    UnitLoader loader(&backend_, model_, &allocator_, kSmallParts, &tier);
    backend_.on_part = nullptr;
    std::vector<uint64_t> hashes;
    for (const Unit& unit : units_) {
      hashes.push_back(ExpectedHash(unit));
      ASSERT_EQ(*Load(loader, unit), hashes.back());
    }
    const LoadCounters before = loader.counters();
    hook_->Set(
        [](const RandomAccessFile&, uint64_t, std::span<std::byte>) -> absl::StatusOr<size_t> {
          return absl::InternalError("no read expected");
        });
    size_t parts = 0;
    backend_.on_part = [&](const TensorInfo& tensor, const TensorPart& part) {
      ++parts;
      const auto held = tier.Find(tensor);
      ASSERT_NE(held, nullptr);
      EXPECT_EQ(part.memory, held->whole());
      EXPECT_EQ(part.raw.data(), held->whole()->data());
      EXPECT_EQ(part.raw.size(), tensor.bytes);
      EXPECT_TRUE(part.checked);
      EXPECT_EQ(part.memory->direct(), own_memory);
    };
    size_t tensors = 0;
    for (size_t i = 0; i < units_.size(); ++i) {
      EXPECT_EQ(*Load(loader, units_[i]), hashes[i]);
      tensors += model_->UnitTensors(units_[i]).size();
    }
    EXPECT_EQ(parts, tensors);
    EXPECT_EQ(loader.counters().read_bytes, before.read_bytes);
    hook_->Set(nullptr);
  }
}

TEST_F(UnitLoaderTest, TheTierMayDropWhatABackendStillReads) {
  backend_.own_memory = true;
  HostTier tier = MakeTier();
  WantAll(tier);
  UnitLoader loader(&backend_, model_, &allocator_, kSmallParts, &tier);
  ASSERT_TRUE(Load(loader, Layer(0)).ok());
  backend_.on_part = [&](const TensorInfo&, const TensorPart&) { tier.SetWanted({}); };
  EXPECT_EQ(*Load(loader, Layer(0)), ExpectedHash(Layer(0)));
  EXPECT_EQ(tier.Stats().bytes, 0u);
}

// Of a tensor in several parts: one in the middle changes between loads, or has a scale that is not
// finite from the first.
TEST_F(UnitLoaderTest, WhatIsReadAgainIsCheckedAgainPartByPart) {
  const std::vector<UnitPart> parts = CutUnit(model_->UnitTensors(Layer(0)), kSmallParts);
  const auto it = std::find_if(parts.begin(), parts.end(),
                               [](const UnitPart& part) { return part.index == 1 && !part.last; });
  ASSERT_NE(it, parts.end());
  const uint64_t begin = it->tensor->offset + it->offset, end = begin + it->bytes;
  const auto spoil = [begin, end](size_t first, size_t count, std::byte value) {
    return [=](const RandomAccessFile& file, uint64_t offset, std::span<std::byte> out) {
      const auto read = file.ReadSome(offset, out);
      for (uint64_t at = begin + first; at < std::min(end, begin + first + count); ++at) {
        if (read.ok() && at >= offset && at < offset + *read) out[at - offset] = value;
      }
      return read;
    };
  };
  UnitLoader loader(&backend_, model_, &allocator_, kSmallParts);
  ASSERT_TRUE(Load(loader, Layer(0)).ok());
  hook_->Set(spoil(40, 4, std::byte{0x5a}));
  const absl::Status changed = Load(loader, Layer(0)).status();
  EXPECT_EQ(GetModelError(changed), ModelError::kChanged) << changed;
  EXPECT_THAT(std::string(changed.message()), HasSubstr(it->tensor->name));

  UnitLoader fresh(&backend_, model_, &allocator_, kSmallParts);
  hook_->Set(spoil(0, it->bytes, std::byte{0xff}));  // NaN, whatever is a scale
  const absl::Status corrupt = Load(fresh, Layer(0)).status();
  EXPECT_EQ(GetModelError(corrupt), ModelError::kCorrupt) << corrupt;
  EXPECT_THAT(std::string(corrupt.message()), HasSubstr(it->tensor->name));
  hook_->Set(nullptr);
  EXPECT_TRUE(Load(fresh, Layer(0)).ok()) << "what was refused is not remembered";
}

TEST_F(UnitLoaderTest, WeightsThatTheBackendCannotHoldAreRefusedWhileTheyAreRead) {
  backend_.bounds = {.weight = 1e-3f};
  UnitLoader loader(&backend_, model_, &allocator_, kSmallParts);
  const absl::Status refused = Load(loader, Layer(0)).status();
  EXPECT_EQ(GetModelError(refused), ModelError::kUnsupported) << refused;
  EXPECT_THAT(std::string(refused.message()), HasSubstr("tensor blk.0."));
  backend_.bounds = {.weight = 100};
  UnitLoader other(&backend_, model_, &allocator_, kSmallParts);
  EXPECT_TRUE(Load(other, Layer(0)).ok());
}

// Parts read and not wanted any more must not keep each other alive.
TEST_F(UnitLoaderTest, ACancelledLoadLeavesNothing) {
  backend_.own_memory = true;
  for (int round = 0; round < 50; ++round) {
    UnitLoader loader(&backend_, model_, &allocator_, kSmallParts);
    int taken = 0;
    backend_.on_part = [&](const TensorInfo&, const TensorPart&) {
      cancelled_ = ++taken == round % 7;
    };
    const absl::Status status = Load(loader, Layer(0)).status();
    EXPECT_TRUE(status.ok() || absl::IsCancelled(status)) << status;
    cancelled_ = false;
  }
  EXPECT_EQ(backend_.direct().now, 0u);
  EXPECT_EQ(backend_.live().now, 0u);
}

TEST_F(UnitLoaderTest, BuffersOfTheHostCountOnlyWhereTheyShareTheWeightsMemory) {
  const LoadOptions options{.threads = 2, .part_bytes = 10000};
  const UnitSize shared = MeasureUnit(backend_, *model_, Layer(0), options);
  EXPECT_GE(shared.buffer_bytes, 3 * options.part_bytes);
  EXPECT_LE(shared.buffer_bytes, MeasureUnit(backend_, *model_, Layer(0)).buffer_bytes * 3);
  backend_.own_memory = true;
  EXPECT_EQ(MeasureUnit(backend_, *model_, Layer(0), options).buffer_bytes, 0u);
}

// The whole store over a backend with its own memory, whose builders let go late.
TEST_F(UnitLoaderTest, AStoreStreamsThroughDirectMemory) {
  backend_.own_memory = true;
  std::vector<UnitSize> sizes;
  std::vector<uint64_t> hashes;
  for (const Unit& unit : units_) {
    sizes.push_back(MeasureUnit(backend_, *model_, unit));
    hashes.push_back(ExpectedHash(unit));
  }
  for (const uint64_t cache : {uint64_t{0}, uint64_t{64} << 20}) {
    LayerStore store = MakeStore({.load_threads = 2,
                                  .weight_budget_bytes = SmallestBudget(sizes) * 3 / 2,
                                  .host_cache_bytes = cache,
                                  .part_bytes = 4096});
    store.Assign(units_);
    for (int pass = 0; pass < 6; ++pass) {
      for (size_t i = 0; i < units_.size(); ++i) {
        const auto lease = store.Acquire(units_[i]);
        ASSERT_TRUE(lease.ok()) << lease.status();
        EXPECT_EQ(Hash(*lease), hashes[i]);
      }
    }
    EXPECT_TRUE(store.Stats().streaming);
    EXPECT_EQ(store.Stats().host_hits > 0, cache > 0);
    EXPECT_LE(store.Stats().peak_resident_bytes, store.Stats().budget_bytes);
  }
  EXPECT_EQ(backend_.direct().now, 0u);
}

}  // namespace
}  // namespace stagecoach
