// What is taken to the host of logits that lie in a workspace: the best of each row, or what its
// draw chooses.
#ifndef STAGECOACH_KERNELS_CUDA_HEAD_CHOICES_H_
#define STAGECOACH_KERNELS_CUDA_HEAD_CHOICES_H_

#include <span>

#include "absl/status/status.h"
#include "kernels/cuda/cuda_workspace.h"

namespace stagecoach::cuda {

// Both wait for the stream. top: [rows][count], totals: [rows] or empty; see Backend::HeadTop.
absl::Status TakeTop(CudaWorkspace& workspace, int count, std::span<TopLogit> top,
                     std::span<uint64_t> totals, cudaStream_t stream);
// See Backend::HeadDraw; a draw and a token for each row.
absl::Status TakeDraws(CudaWorkspace& workspace, std::span<const TokenDraw> draws,
                       std::span<int32_t> tokens, cudaStream_t stream);

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_HEAD_CHOICES_H_
