// What a step begins with: its inputs, and with them what all layers need to turn queries and keys.
#ifndef STAGECOACH_KERNELS_CUDA_STEP_BEGIN_H_
#define STAGECOACH_KERNELS_CUDA_STEP_BEGIN_H_

#include <cuda_runtime.h>

#include <cstdint>

namespace stagecoach::cuda {

// turns[rows][pairs]: cosine and sine of positions[row] * frequencies[pair], computed in double.
struct TurnsOfRows {
  const double* frequencies = nullptr;  // [pairs]
  int pairs = 0;
  float2* turns = nullptr;
};

// Copies from[words], and makes the turns of positions[rows]. The next kernel starts when all of it
// is done, whether it overlaps others or not.
cudaError_t BeginStep(const int32_t* from, int words, int32_t* to, const int32_t* positions,
                      int rows, const TurnsOfRows& turns, cudaStream_t stream);

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_STEP_BEGIN_H_
