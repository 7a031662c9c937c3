#include "kernels/reference/reference_ops.h"

#include <algorithm>
#include <cassert>
#include <cmath>

namespace stagecoach::reference {

Kv::Kv(const KvShape& shape) : shape_(shape) {
  const size_t entries =
      static_cast<size_t>(shape.layers) * shape.blocks * kKvBlockPositions * shape.kv_heads;
  keys_.resize(entries * shape.key_length);
  values_.resize(entries * shape.value_length);
}

size_t Kv::Index(int layer, int block, int offset, int head) const {
  assert(layer >= 0 && layer < shape_.layers && block >= 0 && block < shape_.blocks);
  const size_t position =
      (static_cast<size_t>(layer) * shape_.blocks + block) * kKvBlockPositions + offset;
  return position * shape_.kv_heads + head;
}

std::span<double> Kv::key(int layer, int block, int offset, int head) {
  return std::span(keys_).subspan(Index(layer, block, offset, head) * shape_.key_length,
                                  shape_.key_length);
}

std::span<double> Kv::value(int layer, int block, int offset, int head) {
  return std::span(values_).subspan(Index(layer, block, offset, head) * shape_.value_length,
                                    shape_.value_length);
}

std::span<double> Kv::block_keys(int layer, int block) {
  const size_t size = size_t{kKvBlockPositions} * shape_.kv_heads * shape_.key_length;
  return std::span(keys_).subspan(Index(layer, block, 0, 0) * shape_.key_length, size);
}

std::span<double> Kv::block_values(int layer, int block) {
  const size_t size = size_t{kKvBlockPositions} * shape_.kv_heads * shape_.value_length;
  return std::span(values_).subspan(Index(layer, block, 0, 0) * shape_.value_length, size);
}

std::vector<double> MatMul(const Matrix& w, std::span<const double> x) {
  const size_t rows = x.size() / w.columns;
  std::vector<double> y(rows * w.rows);
  for (int n = 0; n < w.rows; ++n) {
    const std::span<const float> weight = w.row(n);
    for (size_t r = 0; r < rows; ++r) {
      double sum = 0;
      for (int k = 0; k < w.columns; ++k) sum += x[r * w.columns + k] * weight[k];
      y[r * w.rows + n] = sum;
    }
  }
  return y;
}

std::vector<double> RmsNorm(std::span<const double> x, std::span<const float> weight,
                            double epsilon) {
  const size_t columns = weight.size();
  std::vector<double> y(x.size());
  for (size_t start = 0; start < x.size(); start += columns) {
    double square_sum = 0;
    for (size_t i = 0; i < columns; ++i) square_sum += x[start + i] * x[start + i];
    const double rms = std::sqrt(square_sum / static_cast<double>(columns) + epsilon);
    for (size_t i = 0; i < columns; ++i) y[start + i] = x[start + i] / rms * weight[i];
  }
  return y;
}

void Rope(const ModelParams& params, std::span<double> x, int heads, int head_dim,
          std::span<const int32_t> positions) {
  for (size_t row = 0; row < positions.size(); ++row) {
    for (int i = 0; i < params.rope_dims / 2; ++i) {
      const double factor =
          params.rope_freq_factors.empty() ? 1.0 : double{params.rope_freq_factors[i]};
      const double frequency =
          std::pow(double{params.rope_freq_base}, -2.0 * i / params.rope_dims) / factor;
      const double angle = positions[row] * double{params.rope_freq_scale} * frequency;
      const double cosine = std::cos(angle), sine = std::sin(angle);
      for (int head = 0; head < heads; ++head) {
        double* pair = &x[(row * heads + head) * head_dim + 2 * i];
        const double first = pair[0], second = pair[1];
        pair[0] = first * cosine - second * sine;
        pair[1] = first * sine + second * cosine;
      }
    }
  }
}

std::vector<double> SwiGlu(std::span<const double> gate, std::span<const double> up) {
  std::vector<double> out(gate.size());
  for (size_t i = 0; i < gate.size(); ++i) out[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
  return out;
}

namespace {

// One query head at `position`, over positions 0..position of its sequence.
void AttendOne(std::span<const double> query, Kv& kv, int layer, int kv_head, int position,
               std::span<const int32_t> blocks, std::span<double> out) {
  const double scale = 1 / std::sqrt(static_cast<double>(query.size()));
  std::vector<double> weights(position + 1);
  for (int p = 0; p <= position; ++p) {
    const std::span<const double> key =
        kv.key(layer, blocks[p / kKvBlockPositions], p % kKvBlockPositions, kv_head);
    double score = 0;
    for (size_t i = 0; i < query.size(); ++i) score += query[i] * key[i];
    weights[p] = score * scale;
  }
  const double max = *std::max_element(weights.begin(), weights.end());
  double sum = 0;
  for (double& weight : weights) {
    weight = std::exp(weight - max);
    sum += weight;
  }
  std::fill(out.begin(), out.end(), 0.0);
  for (int p = 0; p <= position; ++p) {
    const std::span<const double> value =
        kv.value(layer, blocks[p / kKvBlockPositions], p % kKvBlockPositions, kv_head);
    for (size_t i = 0; i < out.size(); ++i) out[i] += weights[p] / sum * value[i];
  }
}

void StoreKv(std::span<const double> k, std::span<const double> v, Kv& kv, int layer,
             const StepBatch& batch) {
  const KvShape& shape = kv.shape();
  for (const BatchSequence& sequence : batch.sequences) {
    for (int r = 0; r < sequence.row_count; ++r) {
      const int position = sequence.start_position + r;
      const int block = sequence.blocks[position / kKvBlockPositions];
      const int offset = position % kKvBlockPositions;
      for (int head = 0; head < shape.kv_heads; ++head) {
        const size_t index = static_cast<size_t>(sequence.first_row + r) * shape.kv_heads + head;
        std::ranges::copy(k.subspan(index * shape.key_length, shape.key_length),
                          kv.key(layer, block, offset, head).begin());
        std::ranges::copy(v.subspan(index * shape.value_length, shape.value_length),
                          kv.value(layer, block, offset, head).begin());
      }
    }
  }
}

}  // namespace

std::vector<double> Attention(const ModelParams& params, std::span<const double> q,
                              std::span<const double> k, std::span<const double> v, Kv& kv,
                              int kv_layer, const StepBatch& batch) {
  StoreKv(k, v, kv, kv_layer, batch);
  const size_t value_length = params.value_length;
  const int heads_per_kv = params.heads / params.kv_heads;
  std::vector<double> out(static_cast<size_t>(batch.rows) * params.heads * value_length);
  for (const BatchSequence& sequence : batch.sequences) {
    for (int r = 0; r < sequence.row_count; ++r) {
      for (int head = 0; head < params.heads; ++head) {
        const size_t index = static_cast<size_t>(sequence.first_row + r) * params.heads + head;
        AttendOne(q.subspan(index * params.key_length, params.key_length), kv, kv_layer,
                  head / heads_per_kv, sequence.start_position + r, sequence.blocks,
                  std::span(out).subspan(index * value_length, value_length));
      }
    }
  }
  return out;
}

std::vector<int32_t> RowPositions(const StepBatch& batch) {
  std::vector<int32_t> positions(batch.rows);
  for (const BatchSequence& sequence : batch.sequences) {
    for (int r = 0; r < sequence.row_count; ++r) {
      positions[sequence.first_row + r] = sequence.start_position + r;
    }
  }
  return positions;
}

}  // namespace stagecoach::reference
