// For tests of what lies between file and kernels: a backend that only takes weights, notes in
// which order units came, and can be made to wait or to fail. It computes nothing.
#ifndef STAGECOACH_WORKER_FAKE_BACKEND_H_
#define STAGECOACH_WORKER_FAKE_BACKEND_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "kernels/backend.h"
#include "xxhash.h"

namespace stagecoach {

// Bytes of weights that exist, those being built included.
struct LiveBytes {
  void Add(uint64_t bytes) {
    const uint64_t sum = now += bytes;
    uint64_t highest = peak;
    while (sum > highest && !peak.compare_exchange_weak(highest, sum)) {
    }
  }
  std::atomic<uint64_t> now = 0;
  std::atomic<uint64_t> peak = 0;
};

// Remembers the xxh3-64 of all bytes it was made of.
struct FakeWeights : UnitWeights {
  explicit FakeWeights(std::shared_ptr<LiveBytes> live) : live(std::move(live)) {}
  ~FakeWeights() override { live->now -= byte_count; }
  uint64_t bytes() const override { return byte_count; }
  const std::shared_ptr<LiveBytes> live;
  Unit unit;
  uint64_t byte_count = 0;
  uint64_t hash = 0;
};

// Thread-safe once on_add is set.
class FakeBackend : public Backend {
 public:
  // Called for every tensor before it is taken; an error fails the load.
  std::function<absl::Status(const Unit&, const TensorInfo&)> on_add;
  // Called for every part that is taken.
  std::function<void(const TensorInfo&, const TensorPart&)> on_part;
  // Has memory of its own, and lends direct memory of at most that many bytes at any moment. Its
  // builders then hold on to parts as long as they may.
  bool own_memory = false;
  uint64_t direct_limit = UINT64_MAX;
  WeightBounds bounds;  // of all types

  // Names of the units whose loading was begun, in that order.
  std::vector<std::string> loads() const {
    absl::MutexLock lock(&mu_);
    return loads_;
  }

  const LiveBytes& live() const { return *live_; }

  const LiveBytes& direct() const { return *direct_; }  // lent now

  BackendInfo info() const override {
    return {.kind = "fake", .kernel_revision = "1", .own_memory = own_memory};
  }
  absl::StatusOr<std::shared_ptr<HostMemory>> NewHostMemory(size_t bytes) override {
    if (!own_memory) return Backend::NewHostMemory(bytes);
    const std::shared_ptr<HostMemory> pages = NewPageMemory(bytes);
    const uint64_t size = pages->size();
    direct_->Add(size);
    auto memory = std::make_shared<HostMemory>(
        pages->data(), size, /*direct=*/true, [pages, size, live = direct_] { live->now -= size; });
    if (direct_->now > direct_limit) return absl::ResourceExhaustedError("no direct memory left");
    return memory;
  }
  absl::Status CheckTensor(TensorRole, const TensorInfo&) const override {
    return absl::OkStatus();
  }
  WeightBounds BoundsOf(TensorType) const override { return bounds; }
  std::unique_ptr<UnitBuilder> NewUnitBuilder(const ModelParams&, const Unit& unit) override {
    absl::MutexLock lock(&mu_);
    loads_.push_back(UnitName(unit));
    return std::make_unique<Builder>(this, unit);
  }

  absl::StatusOr<std::unique_ptr<KvCache>> NewKvCache(const KvShape&) override { return No(); }
  absl::StatusOr<std::unique_ptr<Workspace>> NewWorkspace(const ModelParams&, int) override {
    return No();
  }
  absl::Status Embed(Workspace&, const UnitWeights&, std::span<const int32_t>) override {
    return No();
  }
  absl::Status SetResidual(Workspace&, std::span<const float>) override { return No(); }
  absl::Status RunLayer(Workspace&, const UnitWeights&, KvCache&, int, const StepBatch&) override {
    return No();
  }
  absl::Status GetResidual(Workspace&, std::span<float>) override { return No(); }
  absl::Status Head(Workspace&, const UnitWeights&, std::span<const int32_t>,
                    std::span<float>) override {
    return No();
  }
  absl::Status CopyKvBlocks(KvCache&, std::span<const KvBlockCopy>) override { return No(); }
  absl::Status ClearKvBlocks(KvCache&, std::span<const int32_t>) override { return No(); }
  absl::Status MatMul(const TensorInfo&, std::span<const std::byte>, std::span<const float>, int,
                      std::span<float>) override {
    return No();
  }
  absl::Status RmsNorm(std::span<const float>, int, std::span<const float>, float,
                       std::span<float>) override {
    return No();
  }
  absl::Status Rope(const ModelParams&, std::span<float>, int, int,
                    std::span<const int32_t>) override {
    return No();
  }
  absl::Status SwiGlu(std::span<const float>, std::span<const float>, std::span<float>) override {
    return No();
  }
  absl::Status Attention(const ModelParams&, std::span<const float>, std::span<const float>,
                         std::span<const float>, KvCache&, int, const StepBatch&,
                         std::span<float>) override {
    return No();
  }

 private:
  class Builder : public UnitBuilder {
   public:
    Builder(FakeBackend* backend, const Unit& unit)
        : backend_(backend), weights_(std::make_unique<FakeWeights>(backend->live_)) {
      weights_->unit = unit;
    }
    absl::Status AddPart(TensorRole, const TensorInfo& tensor, const TensorPart& part) override {
      if (backend_->on_add) {
        if (auto status = backend_->on_add(weights_->unit, tensor); !status.ok()) return status;
      }
      if (backend_->on_part) backend_->on_part(tensor, part);
      weights_->byte_count += part.raw.size();
      weights_->live->Add(part.raw.size());
      held_.push_back(part);
      const bool may_hold = backend_->own_memory && part.memory != nullptr;
      TakeHeld(may_hold ? size_t{kHeldParts} : 0);
      return absl::OkStatus();
    }
    absl::StatusOr<std::unique_ptr<UnitWeights>> Finish() override {
      TakeHeld(0);
      weights_->hash = XXH3_64bits(bytes_.data(), bytes_.size());
      return std::move(weights_);
    }

   private:
    // Takes the bytes of all but the latest `rest` parts: late, as a device does that copies by
    // itself.
    void TakeHeld(size_t rest) {
      for (; held_.size() > rest; held_.pop_front()) {
        const std::span<const std::byte> raw = held_.front().raw;
        bytes_.insert(bytes_.end(), raw.begin(), raw.end());
      }
    }

    FakeBackend* const backend_;
    std::unique_ptr<FakeWeights> weights_;
    std::deque<TensorPart> held_;
    std::vector<std::byte> bytes_;
  };

  static absl::Status No() { return absl::UnimplementedError("the fake backend computes nothing"); }

  const std::shared_ptr<LiveBytes> live_ = std::make_shared<LiveBytes>();
  const std::shared_ptr<LiveBytes> direct_ = std::make_shared<LiveBytes>();
  mutable absl::Mutex mu_;
  std::vector<std::string> loads_ ABSL_GUARDED_BY(mu_);
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_FAKE_BACKEND_H_
