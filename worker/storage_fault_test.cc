// Storage that fails while a worker loads: short reads, errors, stalls, files that change. What
// comes out is a typed error or exactly the right weights.
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/direct_file.h"
#include "model/faulty_file.h"
#include "model/model_error.h"
#include "model/test_paths.h"
#include "worker/host_buffers.h"
#include "worker/layer_store_fixture.h"
#include "worker/load_rate.h"
#include "worker/unit_loader.h"

namespace stagecoach {
namespace {

using ::testing::HasSubstr;

// Loads units of the hooked model straight through the loader.
class StorageFaultTest : public LayerStoreTest {
 protected:
  struct Loaded {
    absl::Status status;
    uint64_t hash = 0;
  };
  Loaded Load(UnitLoader& loader, const Unit& unit) {
    const auto weights = loader.Load(unit, cancelled_, [](UnitState) {});
    if (!weights.ok()) return {weights.status()};
    return {absl::OkStatus(), static_cast<const FakeWeights&>(**weights).hash};
  }
  Loaded Load(const Unit& unit) {
    UnitLoader loader(&backend_, model_, &allocator_);
    return Load(loader, unit);
  }
  // Counts the reads of one load.
  int CountReads(const Unit& unit) {
    const auto reads = std::make_shared<std::atomic<int>>(0);
    hook_->Set([reads](const RandomAccessFile& file, uint64_t offset, std::span<std::byte> out) {
      ++*reads;
      return file.ReadSome(offset, out);
    });
    EXPECT_TRUE(Load(unit).status.ok());
    hook_->Set(nullptr);
    return *reads;
  }
  // Read number `first` and the `count` - 1 after it fail.
  void FailReads(int first, int count) {
    const auto reads = std::make_shared<std::atomic<int>>(0);
    hook_->Set([=](const RandomAccessFile& file, uint64_t offset,
                   std::span<std::byte> out) -> absl::StatusOr<size_t> {
      const int read = (*reads)++;
      if (read >= first && read - first < count) {
        return MakeModelError(ModelError::kIo, "injected failure");
      }
      return file.ReadSome(offset, out);
    });
  }

  HostAllocator allocator_{&backend_};
  std::atomic<bool> cancelled_ = false;
};

constexpr int kForever = 1 << 30;

TEST_F(StorageFaultTest, EveryReadMayBeShort) {
  const uint64_t expected = ExpectedHash(Layer(1));
  const int count = CountReads(Layer(1));
  for (int nth = 0; nth < count; ++nth) {
    const auto reads = std::make_shared<std::atomic<int>>(0);
    hook_->Set([=](const RandomAccessFile& file, uint64_t offset, std::span<std::byte> out) {
      const bool is_short = (*reads)++ == nth;
      return file.ReadSome(offset, is_short ? out.first((out.size() + 1) / 2) : out);
    });
    const Loaded loaded = Load(Layer(1));
    ASSERT_TRUE(loaded.status.ok()) << loaded.status;
    EXPECT_EQ(loaded.hash, expected);
  }
}

TEST_F(StorageFaultTest, SevenByteReadsGiveTheSameWeights) {
  OpenModel("demo2-Q4_0.gguf");
  const uint64_t expected = ExpectedHash(Layer(0));
  hook_->Set([](const RandomAccessFile& file, uint64_t offset, std::span<std::byte> out) {
    return file.ReadSome(offset, out.first(std::min<size_t>(out.size(), 7)));
  });
  const Loaded loaded = Load(Layer(0));
  ASSERT_TRUE(loaded.status.ok()) << loaded.status;
  EXPECT_EQ(loaded.hash, expected);
}

// For every k: the k-th read fails three times and is overcome; fails for good and is typed.
TEST_F(StorageFaultTest, EveryReadMayFail) {
  const uint64_t expected = ExpectedHash(Layer(1));
  const int count = CountReads(Layer(1));
  ASSERT_GE(count, 9);  // one per tensor
  for (int k = 0; k < count; ++k) {
    FailReads(k, kReadRetries);
    const Loaded recovered = Load(Layer(1));
    ASSERT_TRUE(recovered.status.ok()) << recovered.status;
    EXPECT_EQ(recovered.hash, expected);
    FailReads(k, kForever);
    const absl::Status status = Load(Layer(1)).status;
    EXPECT_EQ(GetModelError(status), ModelError::kIo) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(TensorName(Layer(1), k)));
  }
}

// Allocations of the backend, one after the other.
TEST_F(StorageFaultTest, EveryConversionMayFail) {
  const int count = static_cast<int>(model_->UnitTensors(Layer(1)).size());
  for (int k = 0; k < count; ++k) {
    int added = 0;
    backend_.on_add = [&](const Unit&, const TensorInfo&) {
      return added++ == k ? absl::ResourceExhaustedError("no memory") : absl::OkStatus();
    };
    const absl::Status status = Load(Layer(1)).status;
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(TensorName(Layer(1), k)));
  }
}

// For every k: after k reads the file turns out to end.
TEST_F(StorageFaultTest, TruncationAtEveryReadIsTyped) {
  const int count = CountReads(Layer(1));
  for (int k = 0; k < count; ++k) {
    const auto reads = std::make_shared<std::atomic<int>>(0);
    hook_->Set([=](const RandomAccessFile& file, uint64_t offset,
                   std::span<std::byte> out) -> absl::StatusOr<size_t> {
      if ((*reads)++ >= k) return size_t{0};
      return file.ReadSome(offset, out);
    });
    const absl::Status status = Load(Layer(1)).status;
    EXPECT_EQ(GetModelError(status), ModelError::kTruncated) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(TensorName(Layer(1), k)));
  }
}

// For every k: a bit of the k-th tensor flips between the first and the second load.
TEST_F(StorageFaultTest, ABitFlippedAnywhereIsNoticed) {
  const int count = static_cast<int>(model_->UnitTensors(Layer(1)).size());
  for (int k = 0; k < count; ++k) {
    UnitLoader loader(&backend_, model_, &allocator_);
    hook_->Set(nullptr);
    ASSERT_TRUE(Load(loader, Layer(1)).status.ok());
    hook_->Set([this, k](const RandomAccessFile& file, uint64_t offset, std::span<std::byte> out) {
      const auto count = file.ReadSome(offset, out);
      if (Hits(Layer(1), k, offset) && count.ok()) out[*count / 2] ^= std::byte{0x01};
      return count;
    });
    const absl::Status status = Load(loader, Layer(1)).status;
    EXPECT_EQ(GetModelError(status), ModelError::kChanged) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(TensorName(Layer(1), k)));
  }
}

TEST(HostBufferPoolTest, ALoadGetsNoLargerBuffersThanItsOwn) {
  HostBufferPool pool;
  const std::shared_ptr<HostMemory> small = NewPageMemory(5000);
  pool.Give(small);
  EXPECT_EQ(pool.Take(5000, 5000), small);
  pool.Give(NewPageMemory(1 << 20));
  EXPECT_EQ(pool.Take(5000, 5000), nullptr);
  EXPECT_EQ(pool.Take(1 << 20, 1 << 20), nullptr);  // the large one was freed
}

TEST_F(StorageFaultTest, TheLoadRateIsThatOfTheFile) {
  EXPECT_EQ(MeasureLoadRate(*model_), 0);  // too small a file
  EXPECT_GT(MeasureLoadRate(*model_, 4096), 0);
  hook_->Set([](const RandomAccessFile& file, uint64_t offset, std::span<std::byte> out) {
    absl::SleepFor(absl::Milliseconds(20));
    return file.ReadSome(offset, out);
  });
  const double rate = MeasureLoadRate(*model_, 4096);
  EXPECT_GT(rate, 0);
  EXPECT_LE(rate, 4096 / 0.02);
  FailReads(0, kForever);
  EXPECT_EQ(MeasureLoadRate(*model_, 4096), 0);
}

// A disk that answers nothing: what is waited for can be told, and then that it is over.
TEST_F(StorageFaultTest, AStalledReadIsNamed) {
  const auto gate = std::make_shared<Gate>();
  gate->Close();
  hook_->Set([this, gate](const RandomAccessFile& file, uint64_t offset, std::span<std::byte> out) {
    if (Hits(Layer(1), 0, offset)) gate->Pass();
    return file.ReadSome(offset, out);
  });
  LayerStore store = MakeStore();
  store.Assign(units_);
  gate->AwaitWaiting(1);
  EXPECT_EQ(store.Trouble().detail, "");  // it may still come
  const absl::Time start = absl::Now();
  while (!store.Trouble().stalled) {
    ASSERT_LT(absl::Now() - start, absl::Seconds(2));
    absl::SleepFor(absl::Milliseconds(10));
  }
  EXPECT_THAT(
      store.Trouble().detail,
      testing::MatchesRegex("waiting for layer 1: read of [0-9.e+-]+ MB under way for 1 s"));
  gate->Open();
  AwaitSettled(store);
  EXPECT_FALSE(store.Trouble().stalled);
  EXPECT_EQ(store.Trouble().detail, "");
}

TEST_F(StorageFaultTest, AFailedPrefetchIsNamedUntilItSucceeds) {
  hook_->Set([this](const RandomAccessFile& file, uint64_t offset,
                    std::span<std::byte> out) -> absl::StatusOr<size_t> {
    if (Hits(Layer(1), 2, offset)) return MakeModelError(ModelError::kIo, "injected failure");
    return file.ReadSome(offset, out);
  });
  LayerStore store = MakeStore();
  store.Assign(units_);
  AwaitSettled(store);
  const StorageTrouble trouble = store.Trouble();
  EXPECT_FALSE(trouble.stalled);
  EXPECT_THAT(trouble.detail,
              testing::AllOf(HasSubstr("layer 1 could not be loaded"),
                             HasSubstr(TensorName(Layer(1), 2)), HasSubstr("injected failure")));
  hook_->Set(nullptr);
  EXPECT_TRUE(store.Acquire(Layer(1)).ok());
  EXPECT_EQ(store.Trouble().detail, "");
}

// A disk that answers nothing: the load ends within a second of its cancellation, and what the
// hanging read uses outlives it.
TEST_F(StorageFaultTest, AStalledReadDoesNotHoldUpCancellation) {
  const auto gate = std::make_shared<Gate>();
  gate->Close();
  hook_->Set([gate](const RandomAccessFile& file, uint64_t offset, std::span<std::byte> out) {
    gate->Pass();
    return file.ReadSome(offset, out);
  });
  auto loader = std::make_unique<UnitLoader>(&backend_, model_, &allocator_);
  absl::Status status;
  std::thread load([&] { status = Load(*loader, Layer(0)).status; });
  gate->AwaitWaiting(1);
  const absl::Time start = absl::Now();
  cancelled_ = true;
  load.join();
  EXPECT_LT(absl::Now() - start, absl::Seconds(1));
  EXPECT_TRUE(absl::IsCancelled(status)) << status;
  const std::weak_ptr<const ModelFile> model = model_;
  loader.reset();
  model_.reset();
  EXPECT_FALSE(model.expired()) << "the hanging read still uses it";
  gate->Open();
  while (!model.expired()) absl::SleepFor(absl::Milliseconds(1));
}

TEST_F(StorageFaultTest, AStalledReadDoesNotHoldUpShutdown) {
  const auto gate = std::make_shared<Gate>();
  gate->Close();
  hook_->Set([gate](const RandomAccessFile& file, uint64_t offset, std::span<std::byte> out) {
    gate->Pass();
    return file.ReadSome(offset, out);
  });
  LayerStore store = MakeStore();
  store.Assign(units_);
  gate->AwaitWaiting(1);
  const absl::Time start = absl::Now();
  store.Shutdown();
  EXPECT_LT(absl::Now() - start, absl::Seconds(1));
  gate->Open();
}

// Real files, read past the page cache where the file system allows.
class ChangingFileTest : public ::testing::TestWithParam<ReadMode> {
 protected:
  ChangingFileTest() {
    std::filesystem::create_directories(folder_);
    std::filesystem::copy_file(kSource, path_);
    model_ = ModelFile::Open(path_, {.read_mode = GetParam()}).value();
  }
  ~ChangingFileTest() override { std::filesystem::remove_all(folder_); }

  static inline const std::string kSource = TestDataPath("demo2-Q8_0.gguf");
  const std::filesystem::path folder_ =
      ::testing::TempDir() + "storage_fault_test." + std::to_string(::getpid());
  const std::string path_ = folder_ / "model.gguf";
  FakeBackend backend_;
  std::shared_ptr<const ModelFile> model_;
};

TEST_P(ChangingFileTest, ReplacedByRename) {
  LayerStore store(&backend_, model_, {.prefetch = false});
  store.Assign({Layer(0), Layer(1)});
  EXPECT_TRUE(store.Acquire(Layer(0)).ok());
  std::filesystem::copy_file(kSource, folder_ / "new.gguf");
  std::filesystem::rename(folder_ / "new.gguf", path_);
  EXPECT_EQ(GetModelError(store.Acquire(Layer(1)).status()), ModelError::kChanged);
  EXPECT_TRUE(store.Acquire(Layer(0)).ok()) << "residents serve on";
}

TEST_P(ChangingFileTest, Truncated) {
  LayerStore store(&backend_, model_, {.prefetch = false});
  store.Assign({Layer(0), Layer(1)});
  EXPECT_TRUE(store.Acquire(Layer(0)).ok());
  std::filesystem::resize_file(path_, model_->UnitTensors(Layer(1))[1].tensor->offset);
  EXPECT_EQ(GetModelError(store.Acquire(Layer(1)).status()), ModelError::kChanged);
  EXPECT_TRUE(store.Acquire(Layer(0)).ok());
}

TEST_P(ChangingFileTest, RewrittenInPlace) {
  LayerStore store(&backend_, model_, {.prefetch = false});
  store.Assign({Layer(0), Layer(1)});
  EXPECT_TRUE(store.Acquire(Layer(0)).ok());
  absl::SleepFor(absl::Milliseconds(20));  // a new time stamp
  std::fstream file(path_, std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(static_cast<std::streamoff>(model_->UnitTensors(Layer(1))[1].tensor->offset));
  file << "other bytes" << std::flush;
  EXPECT_EQ(GetModelError(store.Acquire(Layer(1)).status()), ModelError::kChanged);
}

TEST_P(ChangingFileTest, ABitThatTheManifestDoesNotKnowNamesItsTensor) {
  const std::string manifest_path = folder_ / "manifest";
  std::ofstream(manifest_path) << Manifest::OfModel(*model_)->ToText();
  const TensorInfo tensor = *model_->UnitTensors(Layer(1))[2].tensor;
  std::fstream file(path_, std::ios::in | std::ios::out | std::ios::binary);
  const auto at = static_cast<std::streamoff>(tensor.offset + tensor.bytes - 1);
  file.seekg(at);
  const int byte = file.get();
  file.seekp(at);
  file.put(static_cast<char>(byte ^ 0x10)).flush();
  model_ = ModelFile::Open(path_, {.read_mode = GetParam(), .manifest = manifest_path}).value();
  LayerStore store(&backend_, model_, {.prefetch = false});
  store.Assign({Layer(0), Layer(1)});
  EXPECT_TRUE(store.Acquire(Layer(0)).ok());
  const absl::Status status = store.Acquire(Layer(1)).status();
  EXPECT_EQ(GetModelError(status), ModelError::kCorrupt) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(tensor.name));
}

INSTANTIATE_TEST_SUITE_P(, ChangingFileTest,
                         ::testing::Values(ReadMode::kBuffered, ReadMode::kDirect),
                         [](const auto& info) {
                           return info.param == ReadMode::kDirect ? "Direct" : "Buffered";
                         });

}  // namespace
}  // namespace stagecoach
