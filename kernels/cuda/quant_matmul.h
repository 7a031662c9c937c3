// y = x * w^T on the device for weights in any of the file's types, packed once at load.
//
// These are launchers: they check nothing that their caller must have checked (shapes, types,
// device memory), allocate nothing, never synchronise, and may be captured into a CUDA graph. All
// pointers are device memory, all arrays row-major, "[rows][k]" with k contiguous. The result is
// cudaSuccess or what the launch said. They need compute capability 8.0.
//
// Bits: a row of y depends on that row of x and on the weights alone, never on the number of rows.
// Of all types but F32 both factors are halves, their products are summed in float32 by matrix
// products over 16 columns at a time, in one order, whichever kernel runs. With S = ceil(k / 256)
// superblocks:
//
//   partial[j] = superblocks [j * S / 16, (j + 1) * S / 16) in order, 16 columns after 16 columns
//   quarter[i] = ((partial[4i] + partial[4i + 1]) + partial[4i + 2]) + partial[4i + 3]
//   y          = ((quarter[0] + quarter[1]) + quarter[2]) + quarter[3]
//
// and then + bias, + y_old, or + (bias + y_old). Weights are decoded to halves (tile_decode.cuh), x
// is taken times kActivationScale, and y is divided by it. Both are rounded to 11 bits (weights of
// 4 bits below 2^-7 to multiples of 2^-17), much less than int8 activations would lose. Where
// weights are halves to begin with, x has a second row for the rest, and y is the sum of both rows'
// (the rest's times kRestScale).
//
// Overlap: kernels of the plain set (kernel_set.h) run in turn. Of the bulk set every kernel is
// launched with programmatic stream serialisation. It may start, and read weights, packed ones and
// those of norms, while the kernel before it in the stream still runs; it reads anything else (but
// the row table of a step, rope.h, and attention the keys and values of steps before), and writes
// anything at all, only after that kernel is complete; but products of several types in one
// LaunchMatmul run side by side, once what precedes the first is complete. So weights must be
// complete before the work that precedes the launch in its stream has begun (an event wait well
// ahead of it).
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
  bool paired = false;         // by LaunchPairRows
};

// Bytes of a packed matrix: what it adds to the device's memory. k: a multiple of the type's block.
size_t PackedBytes(TensorType type, int n, int k);

// raw: the tensor's bytes as in the file, 4-byte aligned, [n][k / block_elements] blocks, their
// scales finite (kernels/tensor_check.h). packed: [PackedBytes], 16-byte aligned, not overlapping.
// Ordered like an ordinary kernel, on both sides; of the other launchers only LaunchPairRows is.
cudaError_t LaunchRepack(TensorType type, int n, int k, const void* raw, void* packed,
                         cudaStream_t stream);

// Gate and up, so that one product makes SwiGLU of them (Fusion::gated), and only with that: of
// each 16 rows of both, in place, gate's memory gets the first eight and up's the others, gate's
// before up's. Their results are then with one thread, and the smallest share of a block is eight
// of both. CanPairRows: of one quantised type and shape, a multiple of kSuperblock rows.
// LaunchPairRows wants two such, packed [n][k], not overlapping; it is ordered like LaunchRepack,
// and the caller notes `paired`.
bool CanPairRows(const PackedMatrix& gate, const PackedMatrix& up);
cudaError_t LaunchPairRows(TensorType type, int n, int k, void* gate, void* up,
                           cudaStream_t stream);

// --- Activations

// What a type's kernels read.
enum class ActivationForm {
  kFloat,      // float32: for F32
  kHalf,       // halves of x * kActivationScale: for quantised types
  kHalfPairs,  // and another row of halves for what those miss: for F16, BF16
};
ActivationForm FormFor(TensorType type);

// So that values of a million can be told from infinity; small ones keep 11 bits down to 1e-3, and
// an error of 5e-7 below.
inline constexpr float kActivationScale = 1.0f / 16;

// Rows of halves up to which products are made by the kernel for few rows, whose lanes read 8
// columns at once. For more, halves lie as warpgroups read them: HalfPlace.
inline constexpr int kMostStreamRows = 16;

// What a second half says is this much smaller. Together they have 22 bits.
inline constexpr float kRestScale = 1.0f / 2048;

// x[rows][k] in the form that matmuls read. Does not own its array.
struct Activations {
  ActivationForm form = ActivationForm::kFloat;
  int rows = 0;
  int k = 0;
  float* values = nullptr;  // kFloat: [rows][k]
  // Up to kMostStreamRows [PaddedColumns() / 32][HalfRows()][32]. For more, blocks of RowBlock()
  // rows, [PaddedColumns() / 256][row blocks][8][4][RowBlock()][8]: of four times 8 columns each
  // time the next two. Zero beyond k; of kHalfPairs each row, then its rest.
  uint16_t* halves = nullptr;

  STAGECOACH_HOST_DEVICE int PaddedColumns() const {
    return (k + kSuperblock - 1) / kSuperblock * kSuperblock;
  }
  STAGECOACH_HOST_DEVICE int HalfRows() const {
    return form == ActivationForm::kHalfPairs ? 2 * rows : rows;
  }
  STAGECOACH_HOST_DEVICE bool IsWide() const { return HalfRows() > kMostStreamRows; }
  STAGECOACH_HOST_DEVICE int RowBlock() const { return HalfRows() <= 32 ? 32 : 64; }
  // HalfPlace, if not IsWide().
  STAGECOACH_HOST_DEVICE size_t NarrowPlace(int row, int column) const {
    return (size_t(column / 32) * HalfRows() + row) * 32 + column % 32;
  }
  // Where in `halves` a value is; row: of HalfRows(). An even column and the next are neighbours.
  STAGECOACH_HOST_DEVICE size_t HalfPlace(int row, int column) const {
    if (!IsWide()) return NarrowPlace(row, column);
    // Shifts: divisions by what a compiler does not know take long.
    const int block = RowBlock(), shift = block == 32 ? 5 : 6;
    const int blocks = (HalfRows() + block - 1) >> shift;
    const size_t place = size_t(column / kSuperblock) * blocks + (row >> shift);
    return ((place * 32 + column % kSuperblock / 32 * 4 + column % 8 / 2) * block +
            (row & (block - 1))) *
               8 +
           column % 32 / 8 * 2 + column % 2;
  }
};

// Bytes for any form of activations of up to rows x k; some more than they fill, for kernels read
// whole tiles of rows.
size_t ActivationBytes(int rows, int k);

// Lays activations out in `memory` [ActivationBytes(rows, k)], 16-byte aligned. The same memory may
// be laid out again for fewer rows, another k or another form.
Activations LayOutActivations(void* memory, ActivationForm form, int rows, int k);

// Row by row, into out.form; rows and k are those of `out`. A row with a value that is not finite
// (or of more than a million, as halves) makes that row's results not finite, and no other's.
// x[rows][k].
cudaError_t LaunchConvert(const float* x, const Activations& out, cudaStream_t stream);
// x / sqrt(mean(x^2) + epsilon) * weight[k].
cudaError_t LaunchRmsNorm(const float* x, const float* weight, float epsilon,
                          const Activations& out, cudaStream_t stream);
// silu(gate) * up; rows of both are `stride` floats apart.
cudaError_t LaunchSwiGlu(const float* gate, const float* up, int stride, const Activations& out,
                         cudaStream_t stream);

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

// For few rows every kernel in a chain costs about as much as its weights, and for many what it
// reads and writes counts, so a product can do its neighbours' work along with its own, with the
// same bits.
struct Fusion {
  // x of the product is LaunchRmsNorm(norm_input, norm_weight, norm_epsilon), made by each block
  // for itself; its own memory is not used. Where CanFuseNorm.
  const float* norm_input = nullptr;   // [rows][k], 16-byte aligned
  const float* norm_weight = nullptr;  // [k], 16-byte aligned
  float norm_epsilon = 0;
  // The two terms are gate and up, paired; all that is stored of them is LaunchSwiGlu(gate, up), in
  // form kHalf, not in the memory of x.
  Activations gated;
};
// A row or two, of whole superblocks that fit; of the plain set of kernels (kernel_set.h) none.
bool CanFuseNorm(const Activations& x);

// Device memory, not owned, in which products of some dozens of rows add up what blocks have of k:
// zero before its first use, 16-byte aligned, for products that follow each other in one stream.
struct MatmulScratch {
  void* memory = nullptr;  // [kMatmulScratchBytes]; null: these products take longer
};
inline constexpr size_t kMatmulScratchBytes = size_t{9} << 20;

// Matrices that read the same activations (q, k, v; gate, up), in one kernel where their types are
// the same (or, of few rows that fit, Q4_K and Q6_K). All have x.k columns and a type whose form is
// x.form; outputs do not overlap; 1 to kMaxMatmulTerms terms, x.rows >= 1. Weights that are paired,
// without fusion.gated, or the reverse, or norm_input where it cannot be fused:
// cudaErrorInvalidValue.
cudaError_t LaunchMatmul(std::span<const MatmulTerm> terms, const Activations& x,
                         cudaStream_t stream, const MatmulScratch& scratch,
                         const Fusion& fusion = {});

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_QUANT_MATMUL_H_
