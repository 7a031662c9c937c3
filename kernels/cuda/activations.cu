// Activations in the forms that matmuls read: int8 with scales, or float32, straight from what
// computes them (norm, SwiGLU), so that the values themselves never go through memory.
#include <cuda_runtime.h>

#include <cfloat>

#include "kernels/cuda/device_ops.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/quant_matmul.h"

namespace stagecoach::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kNormWarps = 16;
constexpr int kNormThreads = kNormWarps * 32;
constexpr int kLaneColumns = 8;  // of a superblock, neighbours
constexpr float kTiny = 1e-30f;  // blocks below this are zero; their scale could not be inverted

size_t AlignUp(size_t bytes) { return (bytes + 15) / 16 * 16; }

// The largest of the values in the lanes that share a scale.
template <bool kPer256>
__device__ float LargestOfBlock(float value) {
#pragma unroll
  for (int mask = kPer256 ? 16 : 2; mask > 0; mask /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffff, value, mask));
  }
  return value;
}

// Quantises a lane's 8 columns of a superblock into quant row `row` and leaves in `v` what the
// quants left over.
template <bool kPer256>
__device__ void QuantizeColumns(float (&v)[kLaneColumns], const Activations& out, int row,
                                int superblock, int lane) {
  float largest = 0;
#pragma unroll
  for (float value : v) {
    const float magnitude = fabsf(value);
    largest =
        fmaxf(largest, magnitude <= FLT_MAX ? magnitude : INFINITY);  // NaN counts as infinite
  }
  largest = LargestOfBlock<kPer256>(largest);
  const bool finite = largest <= FLT_MAX;
  const bool usable = finite && largest > kTiny;
  const float inverse = usable ? __fdiv_rn(127.0f, largest) : 0.0f;
  const float scale = usable ? __fdiv_rn(largest, 127.0f) : finite ? 0.0f : NAN;
  uint32_t words[2] = {};
  int sum = 0;
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) {
    const int quant = usable ? __float2int_rn(__fmul_rn(v[i], inverse)) : 0;
    words[i / 4] |= static_cast<uint32_t>(quant & 0xff) << (i % 4 * 8);
    sum += quant;
    v[i] = __fmaf_rn(-scale, static_cast<float>(quant), v[i]);
  }
  const int columns = out.PaddedColumns();
  const int group = lane / 4;
  int8_t* quants =
      out.quants + static_cast<size_t>(row) * columns + superblock * kSuperblock + group * 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int quad = lane % 4 * 2 + i;  // 4 columns of the group's 32
    *reinterpret_cast<uint32_t*>(quants + quad % 4 * 8 + quad / 4 * 4) = words[i];
  }
  sum += __shfl_xor_sync(0xffffffff, sum, 1);
  sum += __shfl_xor_sync(0xffffffff, sum, 2);
  if (lane % 4 == 0) {
    out.sums[static_cast<size_t>(row) * (columns / 32) + superblock * 8 + group] =
        static_cast<int16_t>(sum);
  }
  if (kPer256 ? lane == 0 : lane % 4 == 0) {
    const int block = kPer256 ? superblock : superblock * 8 + group;
    out.scales[static_cast<size_t>(block) * out.ScaleStride() + row] = scale;
  }
}

// Writes a lane's 8 columns of row `row` in the form of `out`. Columns beyond out.k are zero.
__device__ void StoreColumns(float (&v)[kLaneColumns], const Activations& out, int row,
                             int superblock, int lane) {
  if (out.form == ActivationForm::kFloat) {
    const int column = superblock * kSuperblock + lane * kLaneColumns;
    float* values = out.values + static_cast<size_t>(row) * out.k;
    for (int i = 0; i < kLaneColumns; ++i) {
      if (column + i < out.k) values[column + i] = v[i];
    }
    return;
  }
  const int passes = out.precise ? 2 : 1;
  for (int pass = 0; pass < passes; ++pass) {
    if (out.form == ActivationForm::kQuant256) {
      QuantizeColumns<true>(v, out, row * passes + pass, superblock, lane);
    } else {
      QuantizeColumns<false>(v, out, row * passes + pass, superblock, lane);
    }
  }
}

// A lane's 8 columns of a row of k floats, zero beyond it. Past the first-level cache: the kernel
// that wrote them may have overlapped this one.
__device__ void LoadColumns(const float* row, int k, int superblock, int lane,
                            float (&v)[kLaneColumns]) {
  const int column = superblock * kSuperblock + lane * kLaneColumns;
#pragma unroll
  for (int i = 0; i < kLaneColumns; i += 4) {
    if (column + i + 4 <= k && reinterpret_cast<uintptr_t>(row + column + i) % 16 == 0) {
      const float4 quad = __ldcg(reinterpret_cast<const float4*>(row + column + i));
      v[i] = quad.x, v[i + 1] = quad.y, v[i + 2] = quad.z, v[i + 3] = quad.w;
    } else {
      for (int j = i; j < i + 4; ++j) v[j] = column + j < k ? __ldcg(row + column + j) : 0.0f;
    }
  }
}

// Grid: x = groups of kWarps superblocks, y = rows. One superblock per warp.
__global__ void __launch_bounds__(kThreads)
    QuantizeKernel(const float* x, const __grid_constant__ Activations out) {
  LetNextKernelStart();
  WaitForPreviousKernel();
  const int lane = threadIdx.x % 32;
  const int superblock = blockIdx.x * kWarps + threadIdx.x / 32, row = blockIdx.y;
  if (superblock * kSuperblock >= out.k) return;
  float v[kLaneColumns];
  LoadColumns(x + static_cast<size_t>(row) * out.k, out.k, superblock, lane, v);
  StoreColumns(v, out, row, superblock, lane);
}

__global__ void __launch_bounds__(kThreads)
    SwiGluQuantizeKernel(const float* gate, const float* up, int stride,
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
  for (int i = 0; i < kLaneColumns; ++i) {
    v[i] = __fmul_rn(__fdiv_rn(v[i], 1.0f + expf(-v[i])), u[i]);
  }
  StoreColumns(v, out, row, superblock, lane);
}

// The sum of every thread's `value`, in an order that depends on nothing.
__device__ float SumOfBlock(float value) {
  __shared__ float sums[kNormWarps];
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    value = __fadd_rn(value, __shfl_xor_sync(0xffffffff, value, mask));
  }
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0;
  for (float sum : sums) total = __fadd_rn(total, sum);
  return total;
}

// Grid: one block per row.
__global__ void __launch_bounds__(kNormThreads)
    RmsNormQuantizeKernel(const float* x, const float* weight, float epsilon,
                          const __grid_constant__ Activations out) {
  LetNextKernelStart();
  WaitForPreviousKernel();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = blockIdx.x;
  const int superblocks = out.PaddedColumns() / kSuperblock;
  const float* x_row = x + static_cast<size_t>(row) * out.k;
  float v[kLaneColumns];
  float squares = 0;
  for (int s = warp; s < superblocks; s += kNormWarps) {
    LoadColumns(x_row, out.k, s, lane, v);
#pragma unroll
    for (float value : v) squares = __fmaf_rn(value, value, squares);
  }
  const float mean = __fdiv_rn(SumOfBlock(squares), static_cast<float>(out.k));
  const float factor = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, epsilon)));
  for (int s = warp; s < superblocks; s += kNormWarps) {
    float w[kLaneColumns];
    LoadColumns(x_row, out.k, s, lane, v);
    LoadColumns(weight, out.k, s, lane, w);
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) v[i] = __fmul_rn(__fmul_rn(v[i], factor), w[i]);
    StoreColumns(v, out, row, s, lane);
  }
}

LaunchShape ShapeBySuperblock(const Activations& out) {
  const int superblocks = out.PaddedColumns() / kSuperblock;
  LaunchShape shape;
  shape.grid = dim3((superblocks + kWarps - 1) / kWarps, out.rows);
  shape.threads = kThreads;
  return shape;
}

}  // namespace

ActivationForm FormFor(TensorType type) {
  switch (type) {
    case TensorType::kF32:
    case TensorType::kF16:
    case TensorType::kBF16:
      return ActivationForm::kFloat;
    case TensorType::kQ4_0:
    case TensorType::kQ4_1:
    case TensorType::kQ5_0:
    case TensorType::kQ5_1:
    case TensorType::kQ8_0:
      return ActivationForm::kQuant32;
    default:
      return ActivationForm::kQuant256;
  }
}

size_t ActivationBytes(int rows, int k, bool precise) {
  Activations shape;
  shape.rows = rows, shape.k = k, shape.precise = precise;
  const size_t columns = shape.PaddedColumns(), quant_rows = shape.QuantRows();
  const size_t quantised = quant_rows * columns + AlignUp(quant_rows * (columns / 32) * 2) +
                           columns / 32 * shape.ScaleStride() * 4;
  const size_t floats = static_cast<size_t>(rows) * k * 4;
  return AlignUp(quantised > floats ? quantised : floats);
}

Activations LayOutActivations(void* memory, ActivationForm form, int rows, int k, bool precise) {
  Activations result;
  result.form = form;
  result.precise = precise && form != ActivationForm::kFloat;
  result.rows = rows;
  result.k = k;
  if (form == ActivationForm::kFloat) {
    result.values = static_cast<float*>(memory);
    return result;
  }
  const size_t columns = result.PaddedColumns(), quant_rows = result.QuantRows();
  auto* bytes = static_cast<uint8_t*>(memory);
  result.quants = reinterpret_cast<int8_t*>(bytes);
  bytes += quant_rows * columns;
  result.sums = reinterpret_cast<int16_t*>(bytes);
  bytes += AlignUp(quant_rows * (columns / 32) * 2);
  result.scales = reinterpret_cast<float*>(bytes);
  return result;
}

cudaError_t LaunchQuantize(const float* x, const Activations& out, cudaStream_t stream) {
  return LaunchKernel(QuantizeKernel, ShapeBySuperblock(out), stream, x, out);
}

cudaError_t LaunchRmsNormQuantize(const float* x, const float* weight, float epsilon,
                                  const Activations& out, cudaStream_t stream) {
  LaunchShape shape;
  shape.grid = dim3(out.rows);
  shape.threads = kNormThreads;
  return LaunchKernel(RmsNormQuantizeKernel, shape, stream, x, weight, epsilon, out);
}

cudaError_t LaunchSwiGluQuantize(const float* gate, const float* up, int stride,
                                 const Activations& out, cudaStream_t stream) {
  return LaunchKernel(SwiGluQuantizeKernel, ShapeBySuperblock(out), stream, gate, up, stride, out);
}

}  // namespace stagecoach::cuda
