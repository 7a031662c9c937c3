#include "kernels/cuda/head_choices.h"

#include <algorithm>
#include <numeric>

#include "kernels/cuda/cuda_status.h"
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

}  // namespace stagecoach::cuda
