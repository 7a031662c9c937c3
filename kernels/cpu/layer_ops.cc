#include "kernels/cpu/layer_ops.h"

#include <algorithm>
#include <cmath>

namespace stagecoach::cpu {
namespace {

// Rows or panels that one thread takes at least; below, waking a thread costs more than it brings.
constexpr int kGrainRows = 4;
constexpr int kGrainPanels = 4;  // 32 outputs: a whole activation block
// Rows of one sequence per attention task.
constexpr int kAttentionRows = 16;

void AddBias(const float* bias, int rows, int first, int last, ptrdiff_t stride, float* y) {
  for (int row = 0; row < rows; ++row, y += stride) {
    for (int i = first; i < last; ++i) y[i] += bias[i];
  }
}

}  // namespace

ActivationForms FormsFor(std::span<const MatrixView* const> weights) {
  ActivationForms forms;
  for (const MatrixView* w : weights) (IsFloatType(w->type) ? forms.values : forms.quants) = true;
  return forms;
}

void LayerOps::Norm(const float* x, int rows, int columns, const float* weight, float epsilon,
                    ActivationForms forms, float* y, const QuantBuffer* quants) const {
  pool_.ParallelFor(rows, kGrainRows, [&](int begin, int end) {
    for (ptrdiff_t row = begin; row < end; ++row) {
      float* normed = y + row * columns;
      kernels_.rms_norm(x + row * columns, columns, weight, epsilon, normed);
      if (!forms.quants) continue;
      kernels_.quantize(normed, columns, quants->quants.data() + row * columns,
                        quants->scales.data() + row * (columns / kActivationBlock));
    }
  });
}

void LayerOps::Quantize(const float* x, int rows, int columns, const QuantBuffer& quants) const {
  pool_.ParallelFor(rows, kGrainRows, [&](int begin, int end) {
    for (ptrdiff_t row = begin; row < end; ++row) {
      kernels_.quantize(x + row * columns, columns, quants.quants.data() + row * columns,
                        quants.scales.data() + row * (columns / kActivationBlock));
    }
  });
}

void LayerOps::Project(const ActivationView& x, std::span<const Projection> projections) const {
  int panels = 0;
  for (const Projection& p : projections) panels += p.weights->panels();
  pool_.ParallelFor(panels, kGrainPanels, [&](int begin, int end) {
    int offset = 0;  // of the projection's first panel
    for (const Projection& p : projections) {
      const MatrixView& w = *p.weights;
      const int first = std::max(begin - offset, 0);
      const int last = std::min(end - offset, w.panels());
      offset += w.panels();
      if (first >= last) continue;
      kernels_.matmul(w, first, last, x, p.accumulate, p.y, w.rows);
      if (p.bias == nullptr) continue;
      AddBias(p.bias, x.rows, first * kPanelRows, std::min(last * kPanelRows, w.rows), w.rows, p.y);
    }
  });
}

void LayerOps::ProjectPrecisely(const ActivationView& x, const MatrixView& weights,
                                const QuantBuffer& rest, float* y) const {
  const ptrdiff_t columns = x.columns;
  for (int row = 0; row < x.rows; ++row) {
    const ptrdiff_t block = row * (columns / kActivationBlock);
    kernels_.quantize_rest(x.values + row * columns, x.quants + row * columns, x.scales + block,
                           x.columns, rest.quants.data() + row * columns,
                           rest.scales.data() + block);
  }
  const ActivationView rest_view = rest.View(nullptr, x.rows, x.columns);
  pool_.ParallelFor(weights.panels(), kGrainPanels, [&](int begin, int end) {
    // In steps of which the second pass finds the weights in the cache.
    for (int first = begin; first < end; first += kGrainPanels) {
      const int last = std::min(first + kGrainPanels, end);
      kernels_.matmul(weights, first, last, x, false, y, weights.rows);
      kernels_.matmul(weights, first, last, rest_view, true, y, weights.rows);
    }
  });
}

void LayerOps::GatedProject(const ActivationView& x, const MatrixView& gate_weights,
                            const MatrixView& up_weights, ActivationForms forms, float* gate,
                            float* up, const QuantBuffer& quants) const {
  const ptrdiff_t columns = gate_weights.rows;
  pool_.ParallelFor(gate_weights.panels(), kGrainPanels, [&](int begin, int end) {
    kernels_.matmul(gate_weights, begin, end, x, false, gate, columns);
    kernels_.matmul(up_weights, begin, end, x, false, up, columns);
    const ptrdiff_t first = static_cast<ptrdiff_t>(begin) * kPanelRows;
    const int count =
        static_cast<int>(std::min(static_cast<ptrdiff_t>(end) * kPanelRows, columns) - first);
    for (int row = 0; row < x.rows; ++row) {
      const ptrdiff_t at = row * columns + first;
      kernels_.swiglu(gate + at, up + at, count, gate + at);
      if (!forms.quants) continue;
      // Ranges start at multiples of 32 columns, and quantised weights have whole blocks of them.
      kernels_.quantize(gate + at, count, quants.quants.data() + at,
                        quants.scales.data() + at / kActivationBlock);
    }
  });
}

void LayerOps::StoreKv(const RopeTable* rope, int heads, const StepBatch& batch, float* q, float* k,
                       const float* v, const CpuKvCache& kv, int kv_layer) const {
  const KvShape& shape = kv.shape();
  const ptrdiff_t q_stride = static_cast<ptrdiff_t>(heads) * shape.key_length;
  const ptrdiff_t k_stride = static_cast<ptrdiff_t>(shape.kv_heads) * shape.key_length;
  const ptrdiff_t v_stride = static_cast<ptrdiff_t>(shape.kv_heads) * shape.value_length;
  for (size_t s = 0; s < batch.sequences.size(); ++s) {
    const BatchSequence& sequence = batch.sequences[s];
    if (s + 1 < batch.sequences.size()) {
      const BatchSequence& next = batch.sequences[s + 1];
      kv.PrefetchKeys(kv_layer, next.blocks[next.start_position / kTilePositions],
                      next.start_position % kTilePositions);
    }
    pool_.ParallelFor(sequence.row_count, kGrainRows, [&](int begin, int end) {
      for (int i = begin; i < end; ++i) {
        const ptrdiff_t row = sequence.first_row + i;
        const int position = sequence.start_position + i;
        if (rope != nullptr) {
          rope->Rotate(kernels_, q + row * q_stride, heads, shape.key_length, position);
          rope->Rotate(kernels_, k + row * k_stride, shape.kv_heads, shape.key_length, position);
        }
        kv.Store(kernels_, kv_layer, sequence.blocks[position / kTilePositions],
                 position % kTilePositions, k + row * k_stride, v + row * v_stride);
      }
    });
  }
}

void LayerOps::Attend(int heads, const StepBatch& batch, const float* q, const CpuKvCache& kv,
                      int kv_layer, std::vector<RowChunk>* chunks, float* out) const {
  const KvShape& shape = kv.shape();
  const int group = heads / shape.kv_heads;
  const int most_rows = std::max(1, std::min(kAttentionRows, kMaxTaskQueries / group));
  chunks->clear();
  for (int s = 0; s < static_cast<int>(batch.sequences.size()); ++s) {
    const BatchSequence& sequence = batch.sequences[s];
    for (int i = 0; i < sequence.row_count; i += most_rows) {
      chunks->push_back({s, sequence.first_row + i, std::min(most_rows, sequence.row_count - i)});
    }
  }
  AttentionTask common;
  common.q_stride = static_cast<ptrdiff_t>(heads) * shape.key_length;
  common.out_stride = static_cast<ptrdiff_t>(heads) * shape.value_length;
  common.group = group;
  common.key_length = shape.key_length;
  common.value_length = shape.value_length;
  common.scale = 1.0f / std::sqrt(static_cast<float>(shape.key_length));
  common.block_stride = kv.block_stride();
  common.format = kv.format();
  const int tasks = static_cast<int>(chunks->size()) * shape.kv_heads;
  const auto tile = [&](int i) {  // tile 0 of task i
    const BatchSequence& sequence = batch.sequences[(*chunks)[i / shape.kv_heads].sequence];
    return kv.head(kv_layer, i % shape.kv_heads) + sequence.blocks[0] * kv.block_stride();
  };
  pool_.ParallelFor(tasks, 1, [&](int begin, int end) {
    for (int i = begin; i < end; ++i) {
      const RowChunk& chunk = (*chunks)[i / shape.kv_heads];
      const ptrdiff_t kv_head = i % shape.kv_heads;
      const BatchSequence& sequence = batch.sequences[chunk.sequence];
      AttentionTask task = common;
      task.q = q + chunk.first_row * common.q_stride + kv_head * group * shape.key_length;
      task.out = out + chunk.first_row * common.out_stride + kv_head * group * shape.value_length;
      task.rows = chunk.rows;
      task.first_position = sequence.start_position + chunk.first_row - sequence.first_row;
      task.kv = kv.head(kv_layer, static_cast<int>(kv_head));
      task.blocks = sequence.blocks.data();
      task.next = i + 1 < end ? tile(i + 1) : nullptr;
      kernels_.attention(task);
    }
  });
}

}  // namespace stagecoach::cpu
