#include "kernels/cuda/step_runner.h"

#include <algorithm>
#include <cassert>
#include <utility>

#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/layer_ops.h"
#include "model/status_macros.h"

namespace stagecoach::cuda {
namespace {

// Steps of more rows last long enough for their launches to hide behind them.
constexpr int kMaxGraphRows = 64;
// Shapes remembered; more start anew.
constexpr size_t kMaxShapes = 256;

bool SameKv(const KvLayout& a, const KvLayout& b) {
  return a.data == b.data && a.half == b.half && a.kv_heads == b.kv_heads &&
         a.key_length == b.key_length && a.value_length == b.value_length;
}

template <typename A, typename B>
bool SameOwner(const A& a, const B& b) {
  return !a.owner_before(b) && !b.owner_before(a);
}

}  // namespace

StepRunner::~StepRunner() { DropGraphs(); }

void StepRunner::DropGraphs() {
  cudaStreamSynchronize(device_.compute());
  for (auto& [shape, entry] : entries_) {
    if (entry.graph != nullptr) cudaGraphExecDestroy(entry.graph);
  }
  entries_.clear();
}

absl::Status StepRunner::Embed(std::shared_ptr<const UnitStorage> embedding,
                               std::span<const int32_t> token_ids) {
  workspace_.rows = static_cast<int>(token_ids.size());
  STAGECOACH_RETURN_IF_ERROR(workspace_.inputs.SetTokens(token_ids));
  BeginWith({.weights = std::move(embedding)});
  return absl::OkStatus();
}

absl::Status StepRunner::SetResidual(std::span<const float> residual) {
  workspace_.rows = static_cast<int>(residual.size()) / workspace_.params.d_model;
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaEventSynchronize(workspace_.residual_sent.get()));
  std::ranges::copy(residual, workspace_.residual_in.data());
  BeginWith({.residual = true});
  return absl::OkStatus();
}

// Nothing to launch: a step of these begins with its first layer.
void StepRunner::TakeResidual(int rows) {
  workspace_.rows = rows;
  Begin();
  takes_residual_ = true;
}

// What waits still is of a step that was given up.
void StepRunner::Begin() {
  waiting_.clear();
  batch_set_ = false;
  takes_residual_ = false;
  entry_ = nullptr;
  following_ = false;
  operations_.clear();
}

// The first operation waits in any case: the first layer tells whether there is a graph.
void StepRunner::BeginWith(Pending first) {
  Begin();
  operations_.push_back({.residual = first.residual, .weights = first.weights});
  waiting_.push_back(std::move(first));
}

absl::Status StepRunner::RunLayer(std::shared_ptr<const UnitStorage> layer, const KvLayout& kv,
                                  const StepBatch& batch) {
  if (!batch_set_) STAGECOACH_RETURN_IF_ERROR(SetBatch(batch, kv));
  assert(batch.rows == workspace_.rows);
  return Add({.weights = std::move(layer), .kv = kv});
}

absl::Status StepRunner::SetBatch(const StepBatch& batch, const KvLayout& kv) {
  bool moved = false;
  const TakenRows taken = takes_residual_ ? workspace_.Taken() : TakenRows();
  STAGECOACH_RETURN_IF_ERROR(workspace_.inputs.SetBatch(batch, workspace_.Turns(), taken, &moved));
  if (moved) DropGraphs();
  batch_set_ = true;
  int last_position = 0;
  for (const BatchSequence& sequence : batch.sequences) {
    last_position = std::max(last_position, sequence.start_position + sequence.row_count - 1);
  }
  workspace_.plan =
      PlanAttention({.rows = batch.rows,
                     .sequences = static_cast<int>(batch.sequences.size()),
                     .tiles = workspace_.inputs.tiles(),
                     .last_position = last_position},
                    workspace_.params.heads, kv, device_.traits(), workspace_.partials.size());
  if (!graphs_ || batch.rows > kMaxGraphRows) return LaunchWaiting();
  if (entries_.size() >= kMaxShapes) DropGraphs();
  const AttentionPlan& plan = workspace_.plan;
  entry_ = &entries_[{plan.rows, plan.tiles, plan.chunks, plan.merge, plan.stores}];
  following_ = entry_->graph != nullptr;
  for (size_t i = 0; i < waiting_.size() && following_; ++i) {
    following_ = FollowsGraph(waiting_[i], i);
  }
  return following_ ? absl::OkStatus() : LaunchWaiting();
}

absl::Status StepRunner::Add(Pending operation) {
  const size_t index = operations_.size();
  operations_.push_back({.weights = operation.weights, .kv = operation.kv});
  if (following_ && FollowsGraph(operation, index)) {
    waiting_.push_back(std::move(operation));
    return absl::OkStatus();
  }
  following_ = false;
  STAGECOACH_RETURN_IF_ERROR(LaunchWaiting());
  return Launch(operation);
}

bool StepRunner::FollowsGraph(const Pending& operation, size_t index) const {
  if (index >= entry_->operations.size()) return false;
  const Recorded& recorded = entry_->operations[index];
  return SameOwner(operation.weights, recorded.weights) && SameKv(operation.kv, recorded.kv);
}

// Only what a stream capture can hold.
absl::Status StepRunner::Enqueue(const UnitStorage* weights, const KvLayout& kv,
                                 cudaStream_t stream) {
  if (weights == nullptr) return EnqueueSetResidual(workspace_, stream);
  if (kv.data == nullptr) return EnqueueEmbed(workspace_, *weights, stream);
  return EnqueueLayer(workspace_, *weights, kv, stream);
}

absl::Status StepRunner::Launch(const Pending& operation) {
  if (!operation.residual) STAGECOACH_RETURN_IF_ERROR(operation.weights->AwaitUpload());
  const absl::Status enqueued = Enqueue(operation.weights.get(), operation.kv, device_.compute());
  if (!operation.residual) operation.weights->NoteUse();
  STAGECOACH_RETURN_IF_ERROR(enqueued);
  if (operation.residual) {
    STAGECOACH_RETURN_IF_CUDA_ERROR(
        cudaEventRecord(workspace_.residual_sent.get(), device_.compute()));
  }
  return absl::OkStatus();
}

absl::Status StepRunner::LaunchWaiting() {
  if (!batch_set_ && !waiting_.empty() && !waiting_.front().residual) {
    STAGECOACH_RETURN_IF_ERROR(workspace_.inputs.SendTokens());
  }
  const std::vector<Pending> waiting = std::exchange(waiting_, {});
  for (const Pending& operation : waiting) STAGECOACH_RETURN_IF_ERROR(Launch(operation));
  return absl::OkStatus();
}

absl::Status StepRunner::Flush() {
  Entry* const entry = std::exchange(entry_, nullptr);
  if (std::exchange(following_, false) && operations_.size() == entry->operations.size()) {
    const std::vector<Pending> held = std::exchange(waiting_, {});  // until it is launched
    STAGECOACH_RETURN_IF_CUDA_ERROR(cudaGraphLaunch(entry->graph, device_.compute()));
    if (held.front().residual) {
      STAGECOACH_RETURN_IF_CUDA_ERROR(
          cudaEventRecord(workspace_.residual_sent.get(), device_.compute()));
    }
    ++graph_launches_;
    return absl::OkStatus();
  }
  STAGECOACH_RETURN_IF_ERROR(LaunchWaiting());
  return entry == nullptr ? absl::OkStatus() : Remember(*entry);
}

absl::Status StepRunner::Remember(Entry& entry) {
  const bool same =
      std::ranges::equal(entry.operations, operations_, [](const Recorded& a, const Recorded& b) {
        return SameOwner(a.weights, b.weights) && SameKv(a.kv, b.kv);
      });
  if (same && entry.graph == nullptr) return MakeGraph(entry);
  if (!same) {
    if (entry.graph != nullptr) {
      STAGECOACH_RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(device_.compute()));
      STAGECOACH_RETURN_IF_CUDA_ERROR(cudaGraphExecDestroy(std::exchange(entry.graph, nullptr)));
    }
    entry.operations = operations_;
  }
  return absl::OkStatus();
}

absl::Status StepRunner::MakeGraph(Entry& entry) {
  std::vector<std::shared_ptr<const UnitStorage>> weights;
  for (size_t i = 0; i < operations_.size(); ++i) {
    weights.push_back(operations_[i].weights.lock());
    if (!operations_[i].residual && (weights.back() == nullptr || !weights.back()->Uploaded())) {
      return absl::OkStatus();  // streaming, or still loading: perhaps next time
    }
  }
  cudaStream_t stream = nullptr;
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  for (const auto& unit : weights) {
    if (unit != nullptr) unit->NoteGraph();
  }
  const absl::Status captured = Capture(weights, stream, entry);
  cudaStreamDestroy(stream);
  return captured;
}

absl::Status StepRunner::Capture(std::span<const std::shared_ptr<const UnitStorage>> weights,
                                 cudaStream_t stream, Entry& entry) {
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  absl::Status status;
  for (size_t i = 0; i < operations_.size() && status.ok(); ++i) {
    status = Enqueue(weights[i].get(), operations_[i].kv, stream);
  }
  cudaGraph_t graph = nullptr;
  const cudaError_t ended = cudaStreamEndCapture(stream, &graph);
  STAGECOACH_RETURN_IF_ERROR(status);
  STAGECOACH_RETURN_IF_CUDA_ERROR(ended);
  const cudaError_t made = cudaGraphInstantiate(&entry.graph, graph, /*flags=*/0);
  cudaGraphDestroy(graph);
  STAGECOACH_RETURN_IF_CUDA_ERROR(made);
  return absl::OkStatus();
}

}  // namespace stagecoach::cuda
