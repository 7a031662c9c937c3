#include "kernels/cuda/float_matmul.cuh"

#include "kernels/cuda/device_ops.cuh"
#include "kernels/cuda/launch.cuh"

namespace stagecoach::cuda {
namespace {

constexpr int kOutputWarps = 8;  // of a block, one output row each
constexpr int kRows = 8;         // of activations at a time

// Grid: x = groups of kOutputWarps output rows, y = groups of kRows rows. A lane sums the columns
// lane, lane + 32, ... in order; the lanes' sums are joined by a tree.
__global__ void __launch_bounds__(kOutputWarps * 32)
    FloatMatmulKernel(const __grid_constant__ MatmulTerm term, const float* x, int rows) {
  LetNextKernelStart();
  WaitForPreviousKernel();
  const int lane = threadIdx.x % 32;
  const int n = blockIdx.x * kOutputWarps + threadIdx.x / 32, first_row = blockIdx.y * kRows;
  if (n >= term.weights.n) return;
  const int k = term.weights.k;
  const float* weights = static_cast<const float*>(term.weights.data) + static_cast<size_t>(n) * k;
  const float* x_rows[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    x_rows[r] = x + static_cast<size_t>(min(first_row + r, rows - 1)) * k;
  }
  float sums[kRows] = {};
  for (int column = lane; column < k; column += 32) {
    const float weight = weights[column];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      sums[r] = __fmaf_rn(weight, __ldcg(x_rows[r] + column), sums[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
      sums[r] = __fadd_rn(sums[r], __shfl_xor_sync(0xffffffff, sums[r], mask));
    }
    if (lane != 0 || first_row + r >= rows) continue;
    float value = sums[r];
    if (term.bias != nullptr) value = __fadd_rn(value, __ldcg(term.bias + n));
    float* y = term.y + static_cast<size_t>(first_row + r) * term.y_stride + n;
    if (term.accumulate) value = __fadd_rn(__ldcg(y), value);
    *y = value;
  }
}

}  // namespace

cudaError_t LaunchFloatMatmul(const MatmulTerm& term, const Activations& x, cudaStream_t stream) {
  LaunchShape shape;
  shape.grid =
      dim3((term.weights.n + kOutputWarps - 1) / kOutputWarps, (x.rows + kRows - 1) / kRows);
  shape.threads = kOutputWarps * 32;
  return LaunchKernel(FloatMatmulKernel, shape, stream, term, x.values, x.rows);
}

}  // namespace stagecoach::cuda
