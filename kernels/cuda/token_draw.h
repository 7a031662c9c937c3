// Draws among all tokens (kernels/sampling_units.h) on the GPU, so that only the choices cross the
// bus: with the bits of the host, whatever the number of blocks.
#ifndef STAGECOACH_KERNELS_CUDA_TOKEN_DRAW_H_
#define STAGECOACH_KERNELS_CUDA_TOKEN_DRAW_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/top_logits.h"
#include "kernels/sampling.h"

namespace stagecoach::cuda {

// The units of a row are added up in so many sums, for runs of ids.
int UnitSums(int vocab);

// sums[rows][UnitSums], at draws[rows].temperature, of logits[rows][vocab]; meaningless for a row
// of which a logit is not finite. best: the first of [rows][stride] keys of FindTop. All on the
// device.
cudaError_t SumUnits(const float* logits, int rows, int vocab, const TopKey* best, int stride,
                     const TokenDraw* draws, uint64_t* sums, cudaStream_t stream);

// tokens[rows], by draws[rows] from logits[rows][vocab]; -1 for a row of which a logit is not
// finite. best[rows]: FindTop with a count of 1. sums: scratch, as above. All where the device can
// read it.
cudaError_t DrawTokens(const float* logits, int rows, int vocab, const TopKey* best,
                       const TokenDraw* draws, uint64_t* sums, int32_t* tokens,
                       cudaStream_t stream);

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_TOKEN_DRAW_H_
