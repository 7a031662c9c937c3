// The launches of one step. They name fixed addresses and shapes only, never values, so a stream
// capture of them is good for every later step of the same shape.
#ifndef STAGECOACH_KERNELS_CUDA_LAYER_OPS_H_
#define STAGECOACH_KERNELS_CUDA_LAYER_OPS_H_

#include <cuda_runtime.h>

#include <span>

#include "absl/status/status.h"
#include "kernels/cuda/cuda_weights.h"
#include "kernels/cuda/cuda_workspace.h"
#include "kernels/cuda/quant_matmul.h"

namespace stagecoach::cuda {

// Weights must be uploaded, or the stream must already wait for them. workspace.rows and .plan say
// the shape.
absl::Status EnqueueEmbed(CudaWorkspace& workspace, const UnitStorage& embedding,
                          cudaStream_t stream);
absl::Status EnqueueSetResidual(CudaWorkspace& workspace, cudaStream_t stream);
absl::Status EnqueueLayer(CudaWorkspace& workspace, const UnitStorage& layer, const KvLayout& kv,
                          cudaStream_t stream);
// `count` (<= kHeadRows) rows of the residual stream, those named in workspace.inputs.head_rows()
// from `first` on, to workspace.head_input.
absl::Status EnqueueGather(CudaWorkspace& workspace, int first, int count, cudaStream_t stream);
// Logits of x [count][d_model], count <= kHeadRows, to workspace.logits.
absl::Status EnqueueHead(CudaWorkspace& workspace, const UnitStorage& head, const float* x,
                         int count, cudaStream_t stream);

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_LAYER_OPS_H_
