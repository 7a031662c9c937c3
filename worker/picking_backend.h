// For tests: a GlassBackend whose steps end by themselves (Backend::EnqueuePicks, EnqueueResidual),
// when it is told to.
#ifndef STAGECOACH_WORKER_PICKING_BACKEND_H_
#define STAGECOACH_WORKER_PICKING_BACKEND_H_

#include <algorithm>
#include <atomic>
#include <cmath>
#include <deque>
#include <memory>
#include <span>
#include <utility>
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
  absl::StatusOr<std::unique_ptr<Workspace>> NewWorkspace(const ModelParams& params,
                                                          int max_rows) override {
    return MakeWorkspace<PickingWorkspace>(params, max_rows);
  }
  absl::Status Embed(Workspace& workspace, const UnitWeights& weights,
                     std::span<const int32_t> ids) override {
    PickingWorkspace& own = Own(workspace);
    std::vector<int32_t> known(ids.begin(), ids.end());
    for (int32_t& id : known) {
      if (id < 0) id = std::max(own.latest.at(PickOf(id)), 0);
    }
    own.rows = ids.size();
    return GlassBackend::Embed(workspace, weights, known);
  }
  absl::Status TakeResidual(Workspace& workspace, int rows) override {
    Own(workspace).rows = static_cast<size_t>(rows);
    return absl::OkStatus();
  }
  absl::Status EnqueuePicks(Workspace& workspace, const UnitWeights&, std::span<const int32_t> rows,
                            std::span<const TokenDraw> draws) override {
    EXPECT_EQ(rows.size(), draws.size());
    EXPECT_TRUE(std::ranges::is_sorted(rows));
    PickingWorkspace& own = Own(workspace);
    own.latest.clear();
    for (const int32_t row : rows) {
      const float value = own.residual[static_cast<size_t>(row) * own.d_model];
      const bool picked = std::isfinite(value) && value != static_cast<float>(bad_logits);
      own.latest.push_back(picked ? static_cast<int32_t>(value) : -1);
    }
    return Enqueue(own, own.latest);
  }
  absl::Status EnqueueResidual(Workspace& workspace) override {
    return Enqueue(Own(workspace), /*tokens=*/{});
  }
  bool EndReady(Workspace&) override { return ready; }
  absl::Status AwaitEnd(Workspace& workspace, std::span<int32_t> tokens,
                        std::span<uint8_t> finite) override {
    std::deque<End>& ends = Own(workspace).ends;
    EXPECT_EQ(tokens.size(), ends.front().tokens.size());
    EXPECT_EQ(finite.size(), ends.front().finite.size());
    std::ranges::copy(ends.front().tokens, tokens.begin());
    std::ranges::copy(ends.front().finite, finite.begin());
    ends.pop_front();
    return absl::OkStatus();
  }

 private:
  struct End {
    std::vector<int32_t> tokens;
    std::vector<uint8_t> finite;
  };
  struct PickingWorkspace : GlassWorkspace {
    size_t rows = 0;
    std::vector<int32_t> latest;
    std::deque<End> ends;
  };
  static PickingWorkspace& Own(Workspace& workspace) {
    return static_cast<PickingWorkspace&>(workspace);
  }
  absl::Status Enqueue(PickingWorkspace& own, std::vector<int32_t> tokens) {
    own.ends.push_back({.tokens = std::move(tokens), .finite = std::vector<uint8_t>(own.rows)});
    EXPECT_LE(own.ends.size(), size_t{kStepsInFlight});
    ++enqueued;
    return LeaveResidual(own, own.ends.back().finite);
  }
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_PICKING_BACKEND_H_
