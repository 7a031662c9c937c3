// Rows of a matrix, decoded.
#ifndef STAGECOACH_KERNELS_CUDA_EMBED_H_
#define STAGECOACH_KERNELS_CUDA_EMBED_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "model/tensor_type.h"

namespace stagecoach::cuda {

// out[i][columns] = row ids[i] of `table` [..][columns], i < rows; its bytes are as in the file. An
// id that is PickOf(c) stands for picks[c], and that for 0 if it is negative.
cudaError_t EmbedRows(TensorType type, const void* table, int columns, const int32_t* ids,
                      const int32_t* picks, int rows, float* out, cudaStream_t stream);

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_EMBED_H_
