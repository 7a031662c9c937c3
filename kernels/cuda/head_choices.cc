#include "kernels/cuda/head_choices.h"

#include <algorithm>

#include "kernels/cuda/cuda_status.h"

namespace stagecoach::cuda {

absl::Status TakeTop(CudaWorkspace& workspace, int count, std::span<TopLogit> top,
                     cudaStream_t stream) {
  STAGECOACH_RETURN_IF_CUDA_ERROR(FindTop(
      workspace.logits.data(), static_cast<int>(top.size()) / count, workspace.params.vocab_size,
      count, workspace.top_scratch.data(), workspace.top.data(), stream));
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(workspace.top_out.data(), workspace.top.data(),
                                                  top.size() * sizeof(TopKey),
                                                  cudaMemcpyDeviceToHost, stream));
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream));
  const TopKey* const keys = workspace.top_out.data();
  std::transform(keys, keys + top.size(), top.begin(), FromTopKey);
  return absl::OkStatus();
}

absl::Status TakeDraws(CudaWorkspace& workspace, std::span<const TokenDraw> draws,
                       std::span<int32_t> tokens, cudaStream_t stream) {
  const int rows = static_cast<int>(draws.size()), vocab = workspace.params.vocab_size;
  std::ranges::copy(draws, workspace.draws_in.data());
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(workspace.draws.data(), workspace.draws_in.data(),
                                                  draws.size_bytes(), cudaMemcpyHostToDevice,
                                                  stream));
  STAGECOACH_RETURN_IF_CUDA_ERROR(FindTop(workspace.logits.data(), rows, vocab, /*count=*/1,
                                          workspace.top_scratch.data(), workspace.top.data(),
                                          stream));
  STAGECOACH_RETURN_IF_CUDA_ERROR(
      DrawTokens(workspace.logits.data(), rows, vocab, workspace.top.data(), workspace.draws.data(),
                 workspace.draw_scratch.data(), workspace.drawn.data(), stream));
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(workspace.drawn_out.data(),
                                                  workspace.drawn.data(), tokens.size_bytes(),
                                                  cudaMemcpyDeviceToHost, stream));
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream));
  std::copy_n(workspace.drawn_out.data(), tokens.size(), tokens.begin());
  return absl::OkStatus();
}

}  // namespace stagecoach::cuda
