// The best logits of each row, found on the GPU so that only these cross the bus.
#ifndef STAGECOACH_KERNELS_CUDA_TOP_LOGITS_H_
#define STAGECOACH_KERNELS_CUDA_TOP_LOGITS_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kernels/sampling.h"

namespace stagecoach::cuda {

inline constexpr int kMostTopLogits = 64;

// A logit and its token as one integer that is the larger the better the token: the float's bits
// made ordered, then the complement of the id. A logit that is not finite has all ones above.
using TopKey = uint64_t;
TopLogit FromTopKey(TopKey key);

// Keys of scratch that FindTop needs.
size_t TopScratchKeys(int rows, int vocab, int count);

// top[rows][count], best first, of logits[rows][vocab]; 1 <= count <= kMostTopLogits, count <=
// vocab.
cudaError_t FindTop(const float* logits, int rows, int vocab, int count, TopKey* scratch,
                    TopKey* top, cudaStream_t stream);

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_TOP_LOGITS_H_
