// For tests: a GlassBackend that picks tokens by itself (Backend::EnqueuePicks), and ends its
// steps when it is told to.
#ifndef STAGECOACH_WORKER_PICKING_BACKEND_H_
#define STAGECOACH_WORKER_PICKING_BACKEND_H_

#include <algorithm>
#include <atomic>
#include <cmath>
#include <deque>
#include <vector>

#include "gtest/gtest.h"
#include "worker/glass_backend.h"

namespace stagecoach {

class PickingBackend : public GlassBackend {
 public:
  std::atomic<bool> ready = true;  // whether steps end; those awaited do at once
  std::atomic<int> enqueued = 0;   // steps so far
  int32_t bad_logits = -1;         // the residual whose logits are not finite

  int MaxPicks() const override { return 3; }
  absl::Status Embed(Workspace& workspace, const UnitWeights& weights,
                     std::span<const int32_t> ids) override {
    std::vector<int32_t> known(ids.begin(), ids.end());
    for (int32_t& id : known) {
      if (id < 0) id = std::max(latest_.at(PickOf(id)), 0);
    }
    rows_ = ids.size();
    return GlassBackend::Embed(workspace, weights, known);
  }
  absl::Status EnqueuePicks(Workspace& workspace, const UnitWeights&, std::span<const int32_t> rows,
                            std::span<const TokenDraw> draws) override {
    EXPECT_EQ(rows.size(), draws.size());
    EXPECT_TRUE(std::ranges::is_sorted(rows));
    const auto& glass = static_cast<GlassWorkspace&>(workspace);
    End end = {.tokens = {}, .finite = std::vector<uint8_t>(rows_)};
    for (const int32_t row : rows) {
      const float value = glass.residual[static_cast<size_t>(row) * glass.d_model];
      const bool picked = std::isfinite(value) && value != static_cast<float>(bad_logits);
      end.tokens.push_back(picked ? static_cast<int32_t>(value) : -1);
    }
    auto status = LeaveResidual(workspace, end.finite);
    latest_ = end.tokens;
    ends_.push_back(std::move(end));
    EXPECT_LE(ends_.size(), size_t{kStepsInFlight});
    ++enqueued;
    return status;
  }
  bool PicksReady(Workspace&) override { return ready; }
  absl::Status AwaitPicks(Workspace&, std::span<int32_t> tokens,
                          std::span<uint8_t> finite) override {
    EXPECT_EQ(tokens.size(), ends_.front().tokens.size());
    EXPECT_EQ(finite.size(), ends_.front().finite.size());
    std::ranges::copy(ends_.front().tokens, tokens.begin());
    std::ranges::copy(ends_.front().finite, finite.begin());
    ends_.pop_front();
    return absl::OkStatus();
  }

 private:
  struct End {
    std::vector<int32_t> tokens;
    std::vector<uint8_t> finite;
  };
  size_t rows_ = 0;
  std::vector<int32_t> latest_;
  std::deque<End> ends_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_PICKING_BACKEND_H_
