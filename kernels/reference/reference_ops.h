// The operations of a transformer in plain float64: every formula once, nothing fused.
#ifndef STAGECOACH_KERNELS_REFERENCE_REFERENCE_OPS_H_
#define STAGECOACH_KERNELS_REFERENCE_REFERENCE_OPS_H_

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/backend.h"

namespace stagecoach::reference {

// A weight after decoding; the decoded float32 values are what the model file means.
struct Matrix {
  int rows = 0;
  int columns = 0;
  std::vector<float> values;  // [rows][columns]
  std::span<const float> row(int r) const {
    return std::span(values).subspan(static_cast<size_t>(r) * columns, columns);
  }
};

// Keys and values of one stage, kept in float64 whatever KvShape::type says.
class Kv final : public KvCache {
 public:
  explicit Kv(const KvShape& shape);
  const KvShape& shape() const { return shape_; }
  std::span<double> key(int layer, int block, int offset, int head);    // [key_length]
  std::span<double> value(int layer, int block, int offset, int head);  // [value_length]
  // In one layer: keys and values of all positions and heads of a block.
  std::span<double> block_keys(int layer, int block);
  std::span<double> block_values(int layer, int block);

 private:
  size_t Index(int layer, int block, int offset, int head) const;
  const KvShape shape_;
  std::vector<double> keys_;    // [layers][blocks][kKvBlockPositions][kv_heads][key_length]
  std::vector<double> values_;  // [layers][blocks][kKvBlockPositions][kv_heads][value_length]
};

// x [rows][w.columns] * w^T -> [rows][w.rows].
std::vector<double> MatMul(const Matrix& w, std::span<const double> x);

// Rows of weight.size(): y = x / sqrt(mean(x^2) + epsilon) * weight.
std::vector<double> RmsNorm(std::span<const double> x, std::span<const float> weight,
                            double epsilon);

// In place on x [positions.size()][heads][head_dim]; see Backend::Rope. Pair i turns by
// position * freq_scale * freq_base^(-2i / rope_dims) / freq_factors[i].
void Rope(const ModelParams& params, std::span<double> x, int heads, int head_dim,
          std::span<const int32_t> positions);

// silu(gate) * up, where silu(z) = z / (1 + exp(-z)).
std::vector<double> SwiGlu(std::span<const double> gate, std::span<const double> up);

// See Backend::Attention. Returns [rows][heads][value_length].
std::vector<double> Attention(const ModelParams& params, std::span<const double> q,
                              std::span<const double> k, std::span<const double> v, Kv& kv,
                              int kv_layer, const StepBatch& batch);

// Position of every row of the batch.
std::vector<int32_t> RowPositions(const StepBatch& batch);

}  // namespace stagecoach::reference

#endif  // STAGECOACH_KERNELS_REFERENCE_REFERENCE_OPS_H_
