// The computing kernels of the CPU backend, as a table of plain functions: one table per
// instruction set, chosen at run time. Every table gives the same bits. Internal to the CPU
// backend.
//
// Matmuls: a weight matrix is cut into panels of kPanelRows rows, interleaved (pack.h). Activations
// are quantised once per row to int8 with a float scale per 32 columns; a panel and a row are
// reduced block by block in column order, whatever the number of rows.
#ifndef STAGECOACH_KERNELS_CPU_CPU_KERNELS_H_
#define STAGECOACH_KERNELS_CPU_CPU_KERNELS_H_

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "model/tensor_type.h"

namespace stagecoach::cpu {

inline constexpr int kPanelRows = 8;
inline constexpr int kActivationBlock = 32;  // columns that share an activation scale
inline constexpr int kTilePositions = 32;    // KV positions per attention tile

// A packed weight matrix [rows][columns]; the bytes belong to someone else.
struct MatrixView {
  TensorType type = TensorType::kF32;
  int rows = 0;
  int columns = 0;
  const uint8_t* data = nullptr;  // [panels][panel_bytes]
  size_t panel_bytes = 0;

  int panels() const { return (rows + kPanelRows - 1) / kPanelRows; }
};

// Scale of one activation block, and its sums as the kernels need them.
struct ActivationScale {
  float scale;         // value = scale * quant
  float sum;           // scale * sum of the 32 quants
  float half_sums[2];  // the same over columns 0..15 and 16..31
};

// Activation rows [rows][columns] in the forms that matmuls read; a form that no consumer needs may
// be null.
struct ActivationView {
  const float* values = nullptr;            // [rows][columns]; for F32, F16 and BF16 weights
  const int8_t* quants = nullptr;           // [rows][columns]; for quantised weights
  const ActivationScale* scales = nullptr;  // [rows][columns / 32]
  int rows = 0;
  int columns = 0;
};

// How the keys and values of one block and KV head lie in memory, D = key_length and V =
// value_length rounded up to 8:
//   kHalf, kFloat  keys [D][32], values [32][V]
//   kQuant         keys int8 [D][32] and their half scales [D / 32 rounded up][32], values int8
//                  [32][V] and their half scales [V / 32 rounded up][32]
enum class KvFormat { kHalf, kFloat, kQuant };

// Queries of one sequence against one KV head: rows x heads of the group.
struct AttentionTask {
  const float* q = nullptr;  // head h of row r: q + r * q_stride + h * key_length
  ptrdiff_t q_stride = 0;
  float* out = nullptr;  // head h of row r: out + r * out_stride + h * value_length
  ptrdiff_t out_stride = 0;
  int rows = 0;
  int group = 0;           // query heads that share the KV head
  int first_position = 0;  // of row 0; row r attends to positions 0 .. first_position + r
  int key_length = 0;
  int value_length = 0;
  float scale = 0;
  const std::byte* kv = nullptr;  // tile t lies at kv + blocks[t] * block_stride
  size_t block_stride = 0;
  const int32_t* blocks = nullptr;
  const std::byte* next = nullptr;  // tile 0 of the task after this one: fetched; or null
  KvFormat format = KvFormat::kHalf;
};
// Most queries (rows * group) of one AttentionTask.
inline constexpr int kMaxTaskQueries = 256;

struct CpuKernels {
  const char* name;

  // y[r * y_stride + n] (or += if accumulate) = x[r] . w[n] for the rows n of panels
  // [first_panel, last_panel) and all rows r of x. y points at column 0.
  void (*matmul)(const MatrixView& w, int first_panel, int last_panel, const ActivationView& x,
                 bool accumulate, float* y, ptrdiff_t y_stride);
  // Quantises `columns` (a multiple of 32) values. A block that holds NaN or Inf gets the scale
  // NaN.
  void (*quantize)(const float* x, int columns, int8_t* quants, ActivationScale* scales);
  // Quantises what quantising left over: x - scale * quant.
  void (*quantize_rest)(const float* x, const int8_t* quants, const ActivationScale* scales,
                        int columns, int8_t* rest_quants, ActivationScale* rest_scales);
  // y = x / sqrt(mean(x^2) + epsilon) * weight.
  void (*rms_norm)(const float* x, int columns, const float* weight, float epsilon, float* y);
  // out = gate / (1 + exp(-gate)) * up. out may be gate.
  void (*swiglu)(const float* gate, const float* up, int count, float* out);
  // Turns pair i of the first `columns` values of each head by the cosine and sine at turns + 2 *
  // i.
  void (*rotate)(const float* turns, int columns, int heads, int head_dim, float* x);
  void (*attention)(const AttentionTask& task);
  // Rounds to nearest even, as F16C does.
  void (*to_half)(const float* x, int count, uint16_t* out);
};

const CpuKernels& PortableKernels();
// nullptr if this machine or build cannot run them.
const CpuKernels* Avx2Kernels();
const CpuKernels* Avx512Kernels();
// isa: portable, avx2 or avx512; if the machine lacks it, or for anything else, the best it has.
const CpuKernels& KernelsFor(std::string_view isa);

}  // namespace stagecoach::cpu

#endif  // STAGECOACH_KERNELS_CPU_CPU_KERNELS_H_
