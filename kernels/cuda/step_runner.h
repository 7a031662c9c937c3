// Runs the steps of one workspace: operation by operation, or as a CUDA graph once a step has come
// twice in the same shape.
//
// An operation is launched at once unless a graph for this shape begins with the operations seen so
// far. Then it waits, holding its weights, until either all of the graph's operations have come
// (the graph is launched) or another one comes (those that wait are launched one by one). So
// weights are held beyond their lease only if they were the same ones at the same place when the
// graph was made, that is, if they had stayed; weights that stream through are never held, and
// never in a graph.
#ifndef STAGECOACH_KERNELS_CUDA_STEP_RUNNER_H_
#define STAGECOACH_KERNELS_CUDA_STEP_RUNNER_H_

#include <cuda_runtime.h>

#include <map>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/cuda_weights.h"
#include "kernels/cuda/cuda_workspace.h"

namespace stagecoach::cuda {

// Not thread-safe, as the workspace.
class StepRunner {
 public:
  // Both must outlive the runner.
  StepRunner(const CudaDevice& device, CudaWorkspace& workspace, bool graphs)
      : device_(device), workspace_(workspace), graphs_(graphs) {}
  ~StepRunner();
  StepRunner(const StepRunner&) = delete;
  StepRunner& operator=(const StepRunner&) = delete;

  // As Backend's calls of the same names.
  absl::Status Embed(std::shared_ptr<const UnitStorage> embedding,
                     std::span<const int32_t> token_ids);
  absl::Status SetResidual(std::span<const float> residual);
  void TakeResidual(int rows);
  absl::Status RunLayer(std::shared_ptr<const UnitStorage> layer, const KvLayout& kv,
                        const StepBatch& batch);
  // Everything so far is in the compute stream when this returns.
  absl::Status Flush();

  int64_t graph_launches() const { return graph_launches_; }

 private:
  template <typename Pointer>
  struct Operation {
    bool residual = false;  // SetResidual: there are no weights
    Pointer weights = {};
    KvLayout kv = {};  // data is null but for layers
  };
  using Pending = Operation<std::shared_ptr<const UnitStorage>>;
  // A weak pointer keeps the address from being used again, so addresses identify weights.
  using Recorded = Operation<std::weak_ptr<const UnitStorage>>;

  // What else the launches of a step depend on.
  struct Shape {
    int rows;
    int tiles;
    int chunks;
    AttentionPlan::Merge merge;
    bool stores;
    friend auto operator<=>(const Shape&, const Shape&) = default;
  };
  struct Entry {
    std::vector<Recorded> operations;  // of the latest step of this shape
    cudaGraphExec_t graph = nullptr;   // of these operations, or none
  };

  void Begin();
  void BeginWith(Pending first);
  absl::Status SetBatch(const StepBatch& batch, const KvLayout& kv);
  absl::Status Add(Pending operation);
  bool FollowsGraph(const Pending& operation, size_t index) const;
  absl::Status Enqueue(const UnitStorage* weights, const KvLayout& kv, cudaStream_t stream);
  absl::Status Launch(const Pending& operation);
  absl::Status LaunchWaiting();
  // After a step of operations_: makes its graph if it came the second time.
  absl::Status Remember(Entry& entry);
  absl::Status MakeGraph(Entry& entry);
  absl::Status Capture(std::span<const std::shared_ptr<const UnitStorage>> weights,
                       cudaStream_t stream, Entry& entry);
  void DropGraphs();

  const CudaDevice& device_;
  CudaWorkspace& workspace_;
  const bool graphs_;
  std::map<Shape, Entry> entries_;

  // The step under way.
  bool batch_set_ = false;
  bool takes_residual_ = false;   // TakeResidual
  Entry* entry_ = nullptr;        // of its shape; null before the first layer, or without graphs
  bool following_ = false;        // operations wait for entry_'s graph
  std::vector<Pending> waiting_;  // not launched yet
  std::vector<Recorded> operations_;  // all of them

  int64_t graph_launches_ = 0;
};

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_STEP_RUNNER_H_
