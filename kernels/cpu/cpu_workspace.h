// Residual stream and scratch memory of one stage on the CPU backend.
#ifndef STAGECOACH_KERNELS_CPU_CPU_WORKSPACE_H_
#define STAGECOACH_KERNELS_CPU_CPU_WORKSPACE_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/cpu/aligned_buffer.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cpu/rope.h"

namespace stagecoach::cpu {

// Memory for quantised activation rows.
struct QuantBuffer {
  AlignedBuffer<int8_t> quants;
  AlignedBuffer<ActivationScale> scales;

  static absl::StatusOr<QuantBuffer> Create(int rows, int columns);
  // `values` may be null if all weights that read the view are quantised.
  ActivationView View(const float* values, int rows, int columns) const {
    return {values, quants.data(), scales.data(), rows, columns};
  }
};

// A run of rows of one sequence that attention handles at once.
struct RowChunk {
  int sequence;
  int first_row;  // of the step
  int rows;
};

struct CpuWorkspace : Workspace {
  // Errors: INVALID_ARGUMENT, RESOURCE_EXHAUSTED.
  static absl::StatusOr<std::unique_ptr<CpuWorkspace>> Create(const ModelParams& params,
                                                              int max_rows);
  explicit CpuWorkspace(const ModelParams& model) : params(model), rope(model) {}

  ModelParams params;
  int max_rows = 0;
  int rows = 0;  // of the step under way
  RopeTable rope;
  AlignedBuffer<float> residual;  // [rows][d_model]
  AlignedBuffer<float> normed;    // [rows][d_model]
  AlignedBuffer<float> q;         // [rows][heads][key_length]
  AlignedBuffer<float> k;         // [rows][kv_heads][key_length]
  AlignedBuffer<float> v;         // [rows][kv_heads][value_length]
  AlignedBuffer<float> attended;  // [rows][heads][value_length]
  AlignedBuffer<float> gate;      // [rows][ffn_length]
  AlignedBuffer<float> up;        // [rows][ffn_length]
  QuantBuffer input;              // of `normed` or `attended`
  QuantBuffer rest;               // of the head's input: what its quants leave over
  QuantBuffer hidden;             // of `gate` after the activation function
  std::vector<RowChunk> chunks;
};

}  // namespace stagecoach::cpu

#endif  // STAGECOACH_KERNELS_CPU_CPU_WORKSPACE_H_
