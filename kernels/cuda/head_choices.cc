#include "kernels/cuda/head_choices.h"

#include <algorithm>
#include <numeric>

#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/finite_rows.h"
#include "kernels/cuda/layer_ops.h"
#include "model/status_macros.h"

namespace stagecoach::cuda {

namespace {

// The first `count` of draws_in.
absl::Status SendDraws(CudaWorkspace& workspace, size_t count, cudaStream_t stream) {
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(workspace.draws.data(), workspace.draws_in.data(),
                                                  count * sizeof(TokenDraw), cudaMemcpyHostToDevice,
                                                  stream));
  return absl::OkStatus();
}

// Into unit_sums_out, at temperature 1: draws have been sent, and the best keys of each row found.
absl::Status FetchUnitSums(CudaWorkspace& workspace, int rows, int stride, cudaStream_t stream) {
  const int vocab = workspace.params.vocab_size;
  STAGECOACH_RETURN_IF_CUDA_ERROR(SumUnits(workspace.logits.data(), rows, vocab,
                                           workspace.top.data(), stride, workspace.draws.data(),
                                           workspace.unit_sums.data(), stream));
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(
      workspace.unit_sums_out.data(), workspace.unit_sums.data(),
      size_t(rows) * UnitSums(vocab) * sizeof(uint64_t), cudaMemcpyDeviceToHost, stream));
  return absl::OkStatus();
}

}  // namespace

absl::Status TakeTop(CudaWorkspace& workspace, int count, std::span<TopLogit> top,
                     std::span<uint64_t> totals, cudaStream_t stream) {
  const int rows = static_cast<int>(top.size()) / count, vocab = workspace.params.vocab_size;
  if (!totals.empty()) {
    std::fill_n(workspace.draws_in.data(), rows, TokenDraw{.temperature = 1});
    STAGECOACH_RETURN_IF_ERROR(SendDraws(workspace, rows, stream));
  }
  STAGECOACH_RETURN_IF_CUDA_ERROR(FindTop(workspace.logits.data(), rows, vocab, count,
                                          workspace.top_scratch.data(), workspace.top.data(),
                                          stream));
  if (!totals.empty()) STAGECOACH_RETURN_IF_ERROR(FetchUnitSums(workspace, rows, count, stream));
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(workspace.top_out.data(), workspace.top.data(),
                                                  top.size() * sizeof(TopKey),
                                                  cudaMemcpyDeviceToHost, stream));
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream));
  const TopKey* const keys = workspace.top_out.data();
  std::transform(keys, keys + top.size(), top.begin(), FromTopKey);
  const size_t sums = UnitSums(vocab);
  for (size_t row = 0; row < totals.size(); ++row) {
    const uint64_t* const first = workspace.unit_sums_out.data() + row * sums;
    totals[row] = std::accumulate(first, first + sums, uint64_t{0});
  }
  return absl::OkStatus();
}

absl::Status TakeDraws(CudaWorkspace& workspace, std::span<const TokenDraw> draws,
                       std::span<int32_t> tokens, cudaStream_t stream) {
  const int rows = static_cast<int>(draws.size()), vocab = workspace.params.vocab_size;
  std::ranges::copy(draws, workspace.draws_in.data());
  STAGECOACH_RETURN_IF_ERROR(SendDraws(workspace, draws.size(), stream));
  STAGECOACH_RETURN_IF_CUDA_ERROR(FindTop(workspace.logits.data(), rows, vocab, /*count=*/1,
                                          workspace.top_scratch.data(), workspace.top.data(),
                                          stream));
  STAGECOACH_RETURN_IF_CUDA_ERROR(
      DrawTokens(workspace.logits.data(), rows, vocab, workspace.top.data(), workspace.draws.data(),
                 workspace.unit_sums.data(), workspace.drawn.data(), stream));
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(workspace.drawn_out.data(),
                                                  workspace.drawn.data(), tokens.size_bytes(),
                                                  cudaMemcpyDeviceToHost, stream));
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream));
  std::copy_n(workspace.drawn_out.data(), tokens.size(), tokens.begin());
  return absl::OkStatus();
}

absl::Status BeginStepEnd(CudaWorkspace& workspace, std::span<const int32_t> rows,
                          std::span<const TokenDraw> draws) {
  StepEnd& end = workspace.NextEnd();
  end.rows = workspace.rows;
  end.count = static_cast<int>(draws.size());
  end.all_greedy =
      std::ranges::all_of(draws, [](const TokenDraw& d) { return d.temperature == 0; });
  std::ranges::copy(draws, end.draws.data());
  end.all_rows = end.count == end.rows;
  if (end.all_rows || rows.empty()) return absl::OkStatus();
  return workspace.inputs.SetHeadRows(rows);
}

absl::Status EnqueuePicking(CudaWorkspace& ws, const UnitStorage& head, cudaStream_t stream) {
  const StepEnd& end = ws.NextEnd();
  const int vocab = ws.params.vocab_size, runs = LargestRuns(vocab, end.count);
  for (int first = 0; first < end.count; first += kHeadRows) {
    const int count = std::min(kHeadRows, end.count - first);
    if (!end.all_rows) STAGECOACH_RETURN_IF_ERROR(EnqueueGather(ws, first, count, stream));
    const float* const x = end.all_rows
                               ? ws.residual.data() + static_cast<size_t>(first) * ws.params.d_model
                               : ws.head_input.data();
    STAGECOACH_RETURN_IF_ERROR(EnqueueHead(ws, head, x, count, stream));
    if (end.all_greedy) {
      static_assert(2 * kMaxPicks <= kHeadRows * kMostTopLogits, "keys must fit top_scratch");
      TopKey* const largest = ws.top_scratch.data() + static_cast<size_t>(first) * runs;
      STAGECOACH_RETURN_IF_CUDA_ERROR(
          FindLargest(ws.logits.data(), count, end.count, vocab, largest, stream));
    } else {
      STAGECOACH_RETURN_IF_CUDA_ERROR(FindTop(ws.logits.data(), count, vocab, /*count=*/1,
                                              ws.top_scratch.data(), ws.top.data(), stream));
      STAGECOACH_RETURN_IF_CUDA_ERROR(DrawTokens(ws.logits.data(), count, vocab, ws.top.data(),
                                                 end.draws.data() + first, ws.unit_sums.data(),
                                                 ws.drawn.data() + first, stream));
    }
  }
  return absl::OkStatus();
}

absl::Status EnqueueStepEnd(CudaWorkspace& ws, cudaStream_t stream) {
  StepEnd& end = ws.NextEnd();
  StepPicks picks = {.count = end.count, .drawn = ws.drawn.data()};
  if (end.all_greedy) {
    picks.largest = ws.top_scratch.data();
    picks.runs = LargestRuns(ws.params.vocab_size, end.count);
  }
  STAGECOACH_RETURN_IF_CUDA_ERROR(EndStep(ws.residual.data(), end.rows, ws.params.d_model, picks,
                                          end.finite.data(), end.tokens.data(), stream));
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaEventRecord(end.done.get(), stream));
  ++ws.end_count;
  return absl::OkStatus();
}

bool StepEndReady(const CudaWorkspace& workspace) {
  const cudaError_t done = cudaEventQuery(workspace.ends[workspace.first_end].done.get());
  if (done != cudaErrorNotReady) return true;
  cudaGetLastError();  // it is no error, but remembered like one
  return false;
}

absl::Status AwaitStepEnd(CudaWorkspace& workspace, std::span<int32_t> tokens,
                          std::span<uint8_t> finite) {
  const StepEnd& end = workspace.ends[workspace.first_end];
  workspace.first_end = (workspace.first_end + 1) % kStepsInFlight;
  --workspace.end_count;
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaEventSynchronize(end.done.get()));
  std::copy_n(end.tokens.data(), tokens.size(), tokens.begin());
  std::copy_n(end.finite.data(), finite.size(), finite.begin());
  return absl::OkStatus();
}

}  // namespace stagecoach::cuda
