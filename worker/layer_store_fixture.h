// A layer store over a real model file whose reads a test can watch, hold up and spoil.
#ifndef STAGECOACH_WORKER_LAYER_STORE_FIXTURE_H_
#define STAGECOACH_WORKER_LAYER_STORE_FIXTURE_H_

#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include "model/model_file.h"
#include "worker/fake_backend.h"
#include "worker/hooked_file.h"
#include "worker/layer_store.h"

namespace stagecoach {

// A door that reads wait at. Thread-safe.
class Gate {
 public:
  void Close() { Set(true); }
  void Open() { Set(false); }
  void Pass() {
    absl::MutexLock lock(&mu_);
    ++waiting_;
    const auto open = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return !closed_; };
    mu_.Await(absl::Condition(&open));
    --waiting_;
  }
  void AwaitWaiting(int count) {
    absl::MutexLock lock(&mu_);
    const auto enough = [this, count]()
                            ABSL_SHARED_LOCKS_REQUIRED(mu_) { return waiting_ >= count; };
    mu_.Await(absl::Condition(&enough));
  }

 private:
  void Set(bool closed) {
    absl::MutexLock lock(&mu_);
    closed_ = closed;
  }
  absl::Mutex mu_;
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
  int waiting_ ABSL_GUARDED_BY(mu_) = 0;
};

inline Unit Embedding() { return {.kind = Unit::Kind::kEmbedding}; }
inline Unit Layer(int layer) { return {.kind = Unit::Kind::kLayer, .layer = layer}; }
inline Unit Head() { return {.kind = Unit::Kind::kHead}; }

// Models by the names of their files in tests/data.
class LayerStoreTest : public ::testing::Test {
 protected:
  void OpenModel(const std::string& name) {
    auto model = OpenHookedModel(name, hook_);
    ASSERT_TRUE(model.ok()) << model.status();
    model_ = *std::move(model);
    units_ = StageUnits(model_->params(), 0, model_->params().layers);
  }
  void SetUp() override { OpenModel("demo2-F32.gguf"); }

  LayerStore MakeStore(LayerStoreOptions options = {}) {
    return LayerStore(&backend_, model_, options);
  }
  // Reads inside the file's range of the unit's `index`-th tensor.
  bool Hits(const Unit& unit, int index, uint64_t offset) const {
    const TensorInfo& tensor = *model_->UnitTensors(unit)[index].tensor;
    return offset >= tensor.offset && offset < tensor.offset + tensor.bytes;
  }
  std::string TensorName(const Unit& unit, int index) const {
    return model_->UnitTensors(unit)[index].tensor->name;
  }
  uint64_t ExpectedHash(const Unit& unit) const {
    std::vector<std::byte> bytes;
    for (const UnitTensor& entry : model_->UnitTensors(unit)) {
      const size_t begin = bytes.size();
      bytes.resize(begin + entry.tensor->bytes);
      EXPECT_TRUE(
          ReadFully(model_->file(0), entry.tensor->offset, std::span(bytes).subspan(begin)).ok());
    }
    return XXH3_64bits(bytes.data(), bytes.size());
  }
  static uint64_t Hash(const UnitLease& lease) {
    return static_cast<const FakeWeights&>(*lease).hash;
  }
  // Polls until no load is queued or under way.
  static std::vector<UnitState> AwaitSettled(const LayerStore& store) {
    while (true) {
      std::vector<UnitState> states = store.States();
      bool settled = true;
      for (const UnitState state : states) {
        settled &= state == UnitState::kResident || state == UnitState::kFailed;
      }
      if (settled) return states;
      absl::SleepFor(absl::Milliseconds(1));
    }
  }

  const std::shared_ptr<ReadHook> hook_ = std::make_shared<ReadHook>();
  FakeBackend backend_;
  std::shared_ptr<const ModelFile> model_;
  std::vector<Unit> units_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_LAYER_STORE_FIXTURE_H_
