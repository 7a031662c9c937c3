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

// Rows [..][columns] that came from elsewhere. They become NaN, the first column of each, unless
// *spoiled, in pinned memory of the host, is 0 by now (ResidualMemory.spoiled).
struct TakenRows {
  const uint32_t* spoiled = nullptr;  // null: the rows are the step's own
  float* rows = nullptr;
  int columns = 0;
};

struct StepBegin {
  // Copied: from[words].
  const int32_t* from = nullptr;
  int32_t* to = nullptr;
  int words = 0;
  const int32_t* positions = nullptr;  // [rows]
  int rows = 0;
  TurnsOfRows turns;
  TakenRows taken;
};

// Kernels behind it may read what it has made without waiting for the kernel before them: it lets
// none start early, and StepInputs records an event behind it.
cudaError_t BeginStep(const StepBegin& begin, cudaStream_t stream);

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_STEP_BEGIN_H_
