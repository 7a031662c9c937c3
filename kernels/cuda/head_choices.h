// What is taken to the host of logits that lie in a workspace: the best of each row, or what its
// draw chooses.
#ifndef STAGECOACH_KERNELS_CUDA_HEAD_CHOICES_H_
#define STAGECOACH_KERNELS_CUDA_HEAD_CHOICES_H_

#include <span>

#include "absl/status/status.h"
#include "kernels/cuda/cuda_weights.h"
#include "kernels/cuda/cuda_workspace.h"

namespace stagecoach::cuda {

// Both wait for the stream. top: [rows][count], totals: [rows] or empty; see Backend::HeadTop.
absl::Status TakeTop(CudaWorkspace& workspace, int count, std::span<TopLogit> top,
                     std::span<uint64_t> totals, cudaStream_t stream);
// See Backend::HeadDraw; a draw and a token for each row.
absl::Status TakeDraws(CudaWorkspace& workspace, std::span<const TokenDraw> draws,
                       std::span<int32_t> tokens, cudaStream_t stream);

// The end of a step that is not waited for. First, before the launches of its layers if possible:
// what the device needs of `draws` of the residual rows `rows` (there may be none); all but one of
// workspace.ends may be in use.
absl::Status BeginStepEnd(CudaWorkspace& workspace, std::span<const int32_t> rows,
                          std::span<const TokenDraw> draws);
// Then, behind the layers, if there are draws: the head, whose weights the stream waits for, and
// what these pick.
absl::Status EnqueuePicking(CudaWorkspace& workspace, const UnitStorage& head, cudaStream_t stream);
// And what the host is told.
absl::Status EnqueueStepEnd(CudaWorkspace& workspace, cudaStream_t stream);
// Of the earliest that is in use, and has not been taken by AwaitStepEnd.
bool StepEndReady(const CudaWorkspace& workspace);
absl::Status AwaitStepEnd(CudaWorkspace& workspace, std::span<int32_t> tokens,
                          std::span<uint8_t> finite);

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_HEAD_CHOICES_H_
