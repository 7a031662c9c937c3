// The operations of a transformer layer over many rows and threads. What is split between threads:
// rows, panels of output rows, KV heads; never the columns of a sum.
#ifndef STAGECOACH_KERNELS_CPU_LAYER_OPS_H_
#define STAGECOACH_KERNELS_CPU_LAYER_OPS_H_

#include <cstddef>
#include <span>

#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cpu/cpu_kv_cache.h"
#include "kernels/cpu/cpu_weights.h"
#include "kernels/cpu/cpu_workspace.h"
#include "kernels/cpu/thread_pool.h"

namespace stagecoach::cpu {

// y [rows][w.rows], rows y_stride apart, = or += x * w^T + bias.
struct Projection {
  const MatrixView* weights = nullptr;
  const float* bias = nullptr;  // [w.rows] or null
  float* y = nullptr;
  bool accumulate = false;
};

// Which forms of the activations a set of weights reads.
struct ActivationForms {
  bool quants = false;
  bool values = false;
};
ActivationForms FormsFor(std::span<const MatrixView* const> weights);

class LayerOps {
 public:
  // Both must outlive it.
  LayerOps(const CpuKernels* kernels, ThreadPool* pool) : kernels_(*kernels), pool_(*pool) {}

  // y = norm(x) for rows [rows][columns], quantised to `quants` if forms.quants.
  void Norm(const float* x, int rows, int columns, const float* weight, float epsilon,
            ActivationForms forms, float* y, const QuantBuffer* quants) const;
  void Quantize(const float* x, int rows, int columns, const QuantBuffer& quants) const;
  // All projections read the same activations.
  void Project(const ActivationView& x, std::span<const Projection> projections) const;
  // y = x * weights^T with 15 bits of x's precision: both its quants and their rest are multiplied.
  // x must have values and quants, weights quantised; `rest` is scratch.
  void ProjectPrecisely(const ActivationView& x, const MatrixView& weights, const QuantBuffer& rest,
                        float* y) const;
  // gate = silu(x * gate_weights^T) * (x * up_weights^T), quantised to `quants` if forms.quants.
  void GatedProject(const ActivationView& x, const MatrixView& gate_weights,
                    const MatrixView& up_weights, ActivationForms forms, float* gate, float* up,
                    const QuantBuffer& quants) const;
  // Turns q and k to their positions if `rope`, and stores k and v.
  void StoreKv(const RopeTable* rope, int heads, const StepBatch& batch, float* q, float* k,
               const float* v, const CpuKvCache& kv, int kv_layer) const;
  // out [rows][heads][value_length]. chunks: scratch.
  void Attend(int heads, const StepBatch& batch, const float* q, const CpuKvCache& kv, int kv_layer,
              std::vector<RowChunk>* chunks, float* out) const;

  const CpuKernels& kernels() const { return kernels_; }
  ThreadPool& pool() const { return pool_; }

 private:
  const CpuKernels& kernels_;
  ThreadPool& pool_;
};

}  // namespace stagecoach::cpu

#endif  // STAGECOACH_KERNELS_CPU_LAYER_OPS_H_
