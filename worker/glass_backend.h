// For tests of stages: a backend whose KV can be looked into. A layer stores each row's residual as
// its key and adds one to it; the head chooses the token that the residual has become.
#ifndef STAGECOACH_WORKER_GLASS_BACKEND_H_
#define STAGECOACH_WORKER_GLASS_BACKEND_H_

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "worker/fake_backend.h"

namespace stagecoach {

struct GlassKv : KvCache {
  // The first value of each position's key, [layers][blocks * kKvBlockPositions].
  std::vector<std::vector<float>> keys;
};

struct GlassWorkspace : Workspace {
  int d_model = 0;
  std::vector<float> residual;  // [max_rows][d_model]
};

class GlassBackend : public FakeBackend {
 public:
  int poison_layer = -1;         // whose output for the token `poison_token` is NaN
  int32_t poison_token = -1;     // seen as the residual's value
  std::vector<GlassKv*> caches;  // in order of creation, alive as long as their stage

  absl::StatusOr<std::unique_ptr<KvCache>> NewKvCache(const KvShape& shape) override {
    auto kv = std::make_unique<GlassKv>();
    kv->keys.assign(shape.layers, std::vector<float>(shape.blocks * kKvBlockPositions));
    caches.push_back(kv.get());
    return kv;
  }
  absl::StatusOr<std::unique_ptr<Workspace>> NewWorkspace(const ModelParams& params,
                                                          int max_rows) override {
    return MakeWorkspace<GlassWorkspace>(params, max_rows);
  }
  absl::Status Embed(Workspace& workspace, const UnitWeights&,
                     std::span<const int32_t> ids) override {
    auto& glass = static_cast<GlassWorkspace&>(workspace);
    std::fill_n(glass.residual.begin(), ids.size() * glass.d_model, 0.0f);
    for (size_t i = 0; i < ids.size(); ++i) glass.residual[i * glass.d_model] = ids[i];
    return absl::OkStatus();
  }
  absl::Status SetResidual(Workspace& workspace, std::span<const float> residual) override {
    std::ranges::copy(residual, static_cast<GlassWorkspace&>(workspace).residual.begin());
    return absl::OkStatus();
  }
  ResidualMemory residual_memory(Workspace& workspace) override {
    return {.data = static_cast<GlassWorkspace&>(workspace).residual.data()};
  }
  absl::Status TakeResidual(Workspace&, int) override { return absl::OkStatus(); }
  absl::Status LeaveResidual(Workspace& workspace, std::span<uint8_t> finite) override {
    const auto& glass = static_cast<GlassWorkspace&>(workspace);
    for (size_t row = 0; row < finite.size(); ++row) {
      finite[row] = std::isfinite(glass.residual[row * glass.d_model]);
    }
    return absl::OkStatus();
  }
  absl::Status RunLayer(Workspace& workspace, const UnitWeights& layer, KvCache& kv, int kv_layer,
                        const StepBatch& batch) override {
    auto& glass = static_cast<GlassWorkspace&>(workspace);
    const int number = static_cast<const FakeWeights&>(layer).unit.layer;
    ForEachRow(batch, [&](int row, size_t position) {
      float& value = glass.residual[static_cast<size_t>(row) * glass.d_model];
      static_cast<GlassKv&>(kv).keys[kv_layer][position] = value;
      const bool poisoned = number == poison_layer && value == poison_token + number;
      value = poisoned ? std::numeric_limits<float>::quiet_NaN() : value + 1;
    });
    return absl::OkStatus();
  }
  absl::Status GetResidual(Workspace& workspace, std::span<float> residual) override {
    const auto& glass = static_cast<GlassWorkspace&>(workspace);
    std::memcpy(residual.data(), glass.residual.data(), residual.size_bytes());
    return absl::OkStatus();
  }
  // The token chosen is the residual's value.
  absl::Status Head(Workspace& workspace, const UnitWeights&, std::span<const int32_t> rows,
                    std::span<float> logits) override {
    const auto& glass = static_cast<GlassWorkspace&>(workspace);
    const size_t vocab = logits.size() / rows.size();
    std::fill(logits.begin(), logits.end(), 0.0f);
    for (size_t i = 0; i < rows.size(); ++i) {
      const size_t row = rows[i];
      logits[i * vocab + static_cast<size_t>(glass.residual[row * glass.d_model])] = 1.0f;
    }
    return absl::OkStatus();
  }
  absl::Status CopyKvBlocks(KvCache& kv, std::span<const KvBlockCopy> copies) override {
    for (auto& keys : static_cast<GlassKv&>(kv).keys) {
      for (const KvBlockCopy& copy : copies) {
        std::copy_n(&keys[copy.from * kKvBlockPositions], kKvBlockPositions,
                    &keys[copy.to * kKvBlockPositions]);
      }
    }
    return absl::OkStatus();
  }
  absl::Status ClearKvBlocks(KvCache& kv, std::span<const int32_t> blocks) override {
    for (auto& keys : static_cast<GlassKv&>(kv).keys) {
      for (const int32_t block : blocks) {
        std::fill_n(&keys[block * kKvBlockPositions], kKvBlockPositions, 0.0f);
      }
    }
    return absl::OkStatus();
  }

  // Whether all keys of all caches are finite.
  bool KvIsFinite() const {
    return std::ranges::all_of(
        caches, [](const GlassKv* cache) { return std::ranges::all_of(cache->keys, AllFinite); });
  }

 protected:
  // A GlassWorkspace, or what is made of it.
  template <typename T>
  static std::unique_ptr<T> MakeWorkspace(const ModelParams& params, int max_rows) {
    auto workspace = std::make_unique<T>();
    workspace->d_model = params.d_model;
    workspace->residual.resize(static_cast<size_t>(max_rows) * params.d_model);
    return workspace;
  }

 private:
  template <typename Function>
  static void ForEachRow(const StepBatch& batch, const Function& function) {
    for (const BatchSequence& sequence : batch.sequences) {
      for (int i = 0; i < sequence.row_count; ++i) {
        const int position = sequence.start_position + i;
        const size_t block = sequence.blocks[position / kKvBlockPositions];
        function(sequence.first_row + i, block * kKvBlockPositions + position % kKvBlockPositions);
      }
    }
  }
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_GLASS_BACKEND_H_
