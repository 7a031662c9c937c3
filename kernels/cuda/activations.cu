// Activations in the forms that matmuls read, halves or float32, straight from what computes them
// (norm, SwiGLU), so that the values themselves never go through memory.
#include <cuda_runtime.h>

#include "kernels/cuda/activation_ops.cuh"
#include "kernels/cuda/device_ops.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/norm_ops.cuh"
#include "kernels/cuda/quant_matmul.h"
#include "kernels/cuda/warp.cuh"

namespace stagecoach::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kNormThreads = kNormWarps * 32;

size_t AlignUp(size_t bytes) { return (bytes + 15) / 16 * 16; }

// Writes a lane's 8 columns of row `row` in kForm, that of `out`: a template parameter, so that a
// kernel has the code of its own form only. Columns beyond out.k are zero.
template <ActivationForm kForm>
__device__ void StoreColumns(const float (&v)[kLaneColumns], const Activations& out, int row,
                             int superblock, int lane) {
  const int column = superblock * kSuperblock + lane * kLaneColumns;
  if constexpr (kForm == ActivationForm::kFloat) {
    float* values = out.values + static_cast<size_t>(row) * out.k;
    for (int i = 0; i < kLaneColumns; ++i) {
      if (column + i < out.k) values[column + i] = v[i];
    }
  } else if constexpr (kForm == ActivationForm::kHalf) {
    StoreHalves(out, row, column, ToHalfActivations(v));
  } else {
    float rest[kLaneColumns];
    StoreHalves(out, 2 * row, column, ToHalfActivations(v, rest));
    StoreHalves(out, 2 * row + 1, column, ToHalfActivations(rest));
  }
}

// Grid: x = groups of kWarps superblocks, y = rows. One superblock per warp.
template <ActivationForm kForm>
__global__ void __launch_bounds__(kThreads)
    ConvertKernel(const float* x, const __grid_constant__ Activations out) {
  LetNextKernelStart();
  WaitForPreviousKernel();
  const int lane = threadIdx.x % 32;
  const int superblock = blockIdx.x * kWarps + threadIdx.x / 32, row = blockIdx.y;
  if (superblock * kSuperblock >= out.k) return;
  float v[kLaneColumns];
  LoadColumns(x + static_cast<size_t>(row) * out.k, out.k, superblock, lane, v);
  StoreColumns<kForm>(v, out, row, superblock, lane);
}

template <ActivationForm kForm>
__global__ void __launch_bounds__(kThreads)
    SwiGluKernel(const float* gate, const float* up, int stride,
                 const __grid_constant__ Activations out) {
  LetNextKernelStart();
  WaitForPreviousKernel();
  const int lane = threadIdx.x % 32;
  const int superblock = blockIdx.x * kWarps + threadIdx.x / 32, row = blockIdx.y;
  if (superblock * kSuperblock >= out.k) return;
  float v[kLaneColumns], u[kLaneColumns];
  LoadColumns(gate + static_cast<size_t>(row) * stride, out.k, superblock, lane, v);
  LoadColumns(up + static_cast<size_t>(row) * stride, out.k, superblock, lane, u);
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) v[i] = SiluTimes(v[i], u[i]);
  StoreColumns<kForm>(v, out, row, superblock, lane);
}

// Grid: one block per row.
template <ActivationForm kForm>
__global__ void __launch_bounds__(kNormThreads)
    RmsNormKernel(const float* x, const float* weight, float epsilon,
                  const __grid_constant__ Activations out) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = blockIdx.x;
  const int superblocks = out.PaddedColumns() / kSuperblock;
  const float* x_row = x + static_cast<size_t>(row) * out.k;
  alignas(16) __shared__ float squares[kNormWarps];
  float v[kLaneColumns], w[kLaneColumns], sum = 0;
  LetNextKernelStart();
  const int column = warp * kSuperblock + lane * kLaneColumns;
  if (column < out.k) PrefetchLine(weight + column);
  WaitForPreviousKernel();
  const bool once = superblocks <= kNormWarps;  // then a warp keeps what it has read
  if (once && warp < superblocks) LoadColumns(weight, out.k, warp, lane, w);
  for (int s = warp; s < superblocks; s += kNormWarps) {
    LoadColumns(x_row, out.k, s, lane, v);
    AddSquares(v, sum);
  }
  sum = WarpSum(sum);
  if (lane == 0) squares[warp] = sum;
  __syncthreads();
  const float factor = NormFactor(squares, NormShare(out.k), epsilon);
  for (int s = warp; s < superblocks; s += kNormWarps) {
    if (!once) {
      LoadColumns(x_row, out.k, s, lane, v);
      LoadColumns(weight, out.k, s, lane, w);
    }
    Normalise(factor, w, v);
    StoreColumns<kForm>(v, out, row, s, lane);
  }
}

LaunchShape ShapeBySuperblock(const Activations& out) {
  const int superblocks = out.PaddedColumns() / kSuperblock;
  LaunchShape shape;
  shape.grid = dim3((superblocks + kWarps - 1) / kWarps, out.rows);
  shape.threads = kThreads;
  return shape;
}

// Calls launch.template operator()<form>().
template <typename Launch>
cudaError_t WithForm(ActivationForm form, const Launch& launch) {
  switch (form) {
    case ActivationForm::kFloat:
      return launch.template operator()<ActivationForm::kFloat>();
    case ActivationForm::kHalf:
      return launch.template operator()<ActivationForm::kHalf>();
    case ActivationForm::kHalfPairs:
      return launch.template operator()<ActivationForm::kHalfPairs>();
  }
  return cudaErrorInvalidValue;
}

}  // namespace

ActivationForm FormFor(TensorType type) {
  switch (type) {
    case TensorType::kF32:
      return ActivationForm::kFloat;
    case TensorType::kF16:
    case TensorType::kBF16:
      return ActivationForm::kHalfPairs;
    default:
      return ActivationForm::kHalf;
  }
}

size_t ActivationBytes(int rows, int k) {
  Activations shape;
  shape.k = k;
  const size_t half_rows = (size_t{2} * rows + 63) / 64 * 64;  // in pairs
  const size_t halves = 2 * half_rows * shape.PaddedColumns();
  const size_t floats = size_t{4} * rows * k;
  return AlignUp(halves > floats ? halves : floats);
}

Activations LayOutActivations(void* memory, ActivationForm form, int rows, int k) {
  Activations result;
  result.form = form;
  result.rows = rows;
  result.k = k;
  if (form == ActivationForm::kFloat) {
    result.values = static_cast<float*>(memory);
  } else {
    result.halves = static_cast<uint16_t*>(memory);
  }
  return result;
}

cudaError_t LaunchConvert(const float* x, const Activations& out, cudaStream_t stream) {
  return WithForm(out.form, [&]<ActivationForm kForm>() {
    return LaunchKernel(ConvertKernel<kForm>, ShapeBySuperblock(out), stream, x, out);
  });
}

cudaError_t LaunchRmsNorm(const float* x, const float* weight, float epsilon,
                          const Activations& out, cudaStream_t stream) {
  LaunchShape shape;
  shape.grid = dim3(out.rows);
  shape.threads = kNormThreads;
  return WithForm(out.form, [&]<ActivationForm kForm>() {
    return LaunchKernel(RmsNormKernel<kForm>, shape, stream, x, weight, epsilon, out);
  });
}

cudaError_t LaunchSwiGlu(const float* gate, const float* up, int stride, const Activations& out,
                         cudaStream_t stream) {
  return WithForm(out.form, [&]<ActivationForm kForm>() {
    return LaunchKernel(SwiGluKernel<kForm>, ShapeBySuperblock(out), stream, gate, up, stride, out);
  });
}

}  // namespace stagecoach::cuda
