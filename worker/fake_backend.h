// For tests of what lies between file and kernels: a backend that only takes weights, notes in
// which order units came, and can be made to wait or to fail. It computes nothing.
#ifndef STAGECOACH_WORKER_FAKE_BACKEND_H_
#define STAGECOACH_WORKER_FAKE_BACKEND_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
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

// Remembers a hash of all bytes it was made of.
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

  // Names of the units whose loading was begun, in that order.
  std::vector<std::string> loads() const {
    absl::MutexLock lock(&mu_);
    return loads_;
  }

  const LiveBytes& live() const { return *live_; }

  BackendInfo info() const override { return {.kind = "fake", .kernel_revision = "1"}; }
  absl::Status CheckTensor(TensorRole, const TensorInfo&) const override {
    return absl::OkStatus();
  }
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
    absl::Status Add(TensorRole, const TensorInfo& tensor,
                     std::span<const std::byte> raw) override {
      if (backend_->on_add) {
        if (auto status = backend_->on_add(weights_->unit, tensor); !status.ok()) return status;
      }
      weights_->byte_count += raw.size();
      weights_->live->Add(raw.size());
      weights_->hash = XXH3_64bits_withSeed(raw.data(), raw.size(), weights_->hash);
      return absl::OkStatus();
    }
    absl::StatusOr<std::unique_ptr<UnitWeights>> Finish() override { return std::move(weights_); }

   private:
    FakeBackend* const backend_;
    std::unique_ptr<FakeWeights> weights_;
  };

  static absl::Status No() { return absl::UnimplementedError("the fake backend computes nothing"); }

  const std::shared_ptr<LiveBytes> live_ = std::make_shared<LiveBytes>();
  mutable absl::Mutex mu_;
  std::vector<std::string> loads_ ABSL_GUARDED_BY(mu_);
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_FAKE_BACKEND_H_
