// Draws among all tokens (kernels/sampling_units.h) on the GPU, so that only the choices cross the
// bus: with the bits of the host, whatever the number of blocks.
#ifndef STAGECOACH_KERNELS_CUDA_TOKEN_DRAW_H_
#define STAGECOACH_KERNELS_CUDA_TOKEN_DRAW_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/top_logits.h"
#include "kernels/sampling.h"

namespace stagecoach::cuda {

// Sums of scratch that DrawTokens needs.
size_t DrawScratchSums(int rows, int vocab);

// tokens[rows], by draws[rows] from logits[rows][vocab]; -1 for a row of which a logit is not
// finite. best[rows]: FindTop with a count of 1. All on the device.
cudaError_t DrawTokens(const float* logits, int rows, int vocab, const TopKey* best,
                       const TokenDraw* draws, uint64_t* scratch, int32_t* tokens,
                       cudaStream_t stream);

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_TOKEN_DRAW_H_
