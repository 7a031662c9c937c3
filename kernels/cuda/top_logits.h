// The best logits of each row, found on the GPU so that only these cross the bus.
#ifndef STAGECOACH_KERNELS_CUDA_TOP_LOGITS_H_
#define STAGECOACH_KERNELS_CUDA_TOP_LOGITS_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kernels/sampling.h"
#include "model/half.h"

namespace stagecoach::cuda {

inline constexpr int kMostTopLogits = 1024;

// A logit and its token as one integer that is the larger the better the token: the float's bits
// made ordered, then the complement of the id. A logit that is not finite has all ones above.
using TopKey = uint64_t;
inline constexpr uint32_t kTopKeySign = 0x80000000u;
STAGECOACH_HOST_DEVICE inline TopLogit FromTopKey(TopKey key) {
  const uint32_t ordered = static_cast<uint32_t>(key >> 32);
  const auto id = static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key));
  if (ordered == 0xffffffffu) return {FloatFromBits(0x7fc00000u), id};  // NaN
  return {FloatFromBits(ordered & kTopKeySign ? ordered & ~kTopKeySign : ~ordered), id};
}

// Keys of scratch that FindTop needs.
size_t TopScratchKeys(int rows, int vocab, int count);

// top[rows][count], best first, of logits[rows][vocab]; 1 <= count <= kMostTopLogits, count <=
// vocab.
cudaError_t FindTop(const float* logits, int rows, int vocab, int count, TopKey* scratch,
                    TopKey* top, cudaStream_t stream);

// The best keys of runs of each row's logits, of which the best is FindTop's first:
// keys[rows][runs]. The rows are some of all_rows, which say how long the runs are.
// TopScratchKeys(rows, vocab, count) keys hold those of count / 2 times as many rows.
cudaError_t FindLargest(const float* logits, int rows, int all_rows, int vocab, TopKey* keys,
                        cudaStream_t stream);
int LargestRuns(int vocab, int all_rows);

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_TOP_LOGITS_H_
