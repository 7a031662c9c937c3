// y = x * w^T on the device for weights in any of the file's types, packed once at load.
//
// These are launchers: they check nothing that their caller must have checked (shapes, types,
// device memory), allocate nothing, never synchronise, and may be captured into a CUDA graph. All
// pointers are device memory, all arrays row-major, "[rows][k]" with k contiguous. The result is
// cudaSuccess or what the launch said. They need compute capability 9.0.
//
// Bits: a row of y depends on that row of x and on the weights alone, never on the number of rows.
// Quantised activations make the dot product of a block exact in any order; the float sums over
// blocks have one order, whichever kernel runs. With S = ceil(k / 256) superblocks:
//
//   partial[j] = blocks of the superblocks [j * S / 8, (j + 1) * S / 8), in order, one fma each
//   y          = (((0 + partial[0]) + partial[1]) + ...) + partial[7] (+ bias) (then y_old + that)
//
// Overlap: every kernel is launched with programmatic stream serialisation. It may start, and read
// packed weights, while the kernel before it in the stream still runs; it reads anything else, and
// writes anything at all, only after that kernel is complete. So weights must be complete before
// the work that precedes the launch in its stream has begun (an event wait well ahead of it).
#ifndef STAGECOACH_KERNELS_CUDA_QUANT_MATMUL_H_
#define STAGECOACH_KERNELS_CUDA_QUANT_MATMUL_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "model/half.h"  // STAGECOACH_HOST_DEVICE
#include "model/tensor_type.h"

namespace stagecoach::cuda {

inline constexpr int kSuperblock = 256;  // columns; k is padded to whole superblocks with zeros

// --- Weights

// One packed matrix w[n][k]. Does not own `data`.
struct PackedMatrix {
  TensorType type = TensorType::kF32;
  int n = 0;
  int k = 0;                   // a multiple of the type's block
  const void* data = nullptr;  // [PackedBytes], 16-byte aligned
};

// Bytes of a packed matrix: what it adds to the device's memory. k: a multiple of the type's block.
size_t PackedBytes(TensorType type, int n, int k);

// raw: the tensor's bytes as in the file, 4-byte aligned, [n][k / block_elements] blocks, their
// scales finite (kernels/tensor_check.h). packed: [PackedBytes], 16-byte aligned, not overlapping.
// The one launcher that is ordered like an ordinary kernel, on both sides.
cudaError_t LaunchRepack(TensorType type, int n, int k, const void* raw, void* packed,
                         cudaStream_t stream);

// --- Activations

// What a type's kernels read.
enum class ActivationForm {
  kFloat,     // float32: for F32, F16, BF16
  kQuant32,   // int8 with a scale for every 32 columns: for Q4_0 .. Q8_0
  kQuant256,  // int8 with a scale for every 256 columns: for Q2_K .. Q6_K
};
ActivationForm FormFor(TensorType type);

// x[rows][k] in the form that matmuls read. Does not own its arrays. With `precise`, a quantised
// row r is kept as two, 2r and 2r + 1: its quants and those of what they left over (some 15 bits in
// all), at the cost of twice the rows: for the output head, whose errors nothing after it evens
// out. Each of the two is summed as above, then they are added.
struct Activations {
  ActivationForm form = ActivationForm::kFloat;
  bool precise = false;
  int rows = 0;
  int k = 0;
  float* values = nullptr;   // kFloat: [rows][k]
  int8_t* quants = nullptr;  // [QuantRows()][PaddedColumns()], in each 32 columns: 0-3, 16-19, 4-7,
                             // 20-23, 8-11, 24-27, 12-15, 28-31 (what a lane of an mma reads)
  int16_t* sums = nullptr;   // [QuantRows()][PaddedColumns() / 32]: sums of quants
  float* scales = nullptr;   // [PaddedColumns() / 32 or / 256][ScaleStride()]; x ~ scale * quant

  STAGECOACH_HOST_DEVICE int QuantRows() const { return precise ? 2 * rows : rows; }
  STAGECOACH_HOST_DEVICE int ScaleStride() const { return (QuantRows() + 3) / 4 * 4; }
  STAGECOACH_HOST_DEVICE int PaddedColumns() const {
    return (k + kSuperblock - 1) / kSuperblock * kSuperblock;
  }
};

// Bytes for any form of activations of up to rows x k; `precise` counts twice the rows.
size_t ActivationBytes(int rows, int k, bool precise);

// Lays activations out in `memory` [ActivationBytes(rows, k, precise)], 16-byte aligned. The same
// memory may be laid out again for fewer rows, another k or another form.
Activations LayOutActivations(void* memory, ActivationForm form, int rows, int k, bool precise);

// Row by row, into out.form; rows and k are those of `out`. A row with a value that is not finite
// makes that row's results NaN, and no other's.
// x[rows][k].
cudaError_t LaunchQuantize(const float* x, const Activations& out, cudaStream_t stream);
// x / sqrt(mean(x^2) + epsilon) * weight[k].
cudaError_t LaunchRmsNormQuantize(const float* x, const float* weight, float epsilon,
                                  const Activations& out, cudaStream_t stream);
// silu(gate) * up; rows of both are `stride` floats apart.
cudaError_t LaunchSwiGluQuantize(const float* gate, const float* up, int stride,
                                 const Activations& out, cudaStream_t stream);

// --- Products

// y[rows][n], rows y_stride apart, = x * weights^T (+ bias), or += that.
struct MatmulTerm {
  PackedMatrix weights;
  float* y = nullptr;
  int y_stride = 0;
  const float* bias = nullptr;  // [n] or null
  bool accumulate = false;
};

inline constexpr int kMaxMatmulTerms = 4;

// Matrices that read the same activations (q, k, v; gate, up), fused where their types are the
// same. All have x.k columns and a type whose form is x.form; outputs do not overlap; 1 to
// kMaxMatmulTerms terms, x.rows >= 1.
cudaError_t LaunchMatmul(std::span<const MatmulTerm> terms, const Activations& x,
                         cudaStream_t stream);

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_QUANT_MATMUL_H_
