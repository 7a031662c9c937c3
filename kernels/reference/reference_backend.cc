#include "kernels/reference/reference_backend.h"

#include <unistd.h>

#include <algorithm>
#include <cassert>
#include <map>
#include <new>
#include <utility>

#include "fmt/format.h"
#include "kernels/reference/reference_ops.h"
#include "kernels/tensor_check.h"
#include "model/dequantize.h"
#include "model/status_macros.h"

namespace stagecoach {
namespace {

using reference::Kv;
using reference::Matrix;

uint64_t PhysicalMemoryBytes() {
  return static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) *
         static_cast<uint64_t>(sysconf(_SC_PAGE_SIZE));
}

std::vector<double> ToDouble(std::span<const float> values) {
  return {values.begin(), values.end()};
}

void RoundTo(std::span<const double> values, std::span<float> out) {
  assert(values.size() == out.size());
  std::ranges::transform(values, out.begin(), [](double v) { return static_cast<float>(v); });
}

// The part's rows of `matrix`, which is allocated with the first.
absl::Status DecodePart(const TensorInfo& tensor, const TensorPart& part, Matrix& matrix) {
  STAGECOACH_RETURN_IF_ERROR(CheckTensorPart(tensor, part));
  if (part.first_row == 0) {
    matrix = {static_cast<int>(tensor.rows()), static_cast<int>(tensor.columns()), {}};
    try {
      matrix.values.resize(tensor.rows() * tensor.columns());
    } catch (const std::bad_alloc&) {
      return absl::ResourceExhaustedError(
          fmt::format("no memory to decode tensor {} to float32", tensor.name));
    }
  }
  return DequantizeRow(
      tensor.type, part.raw,
      std::span(matrix.values)
          .subspan(part.first_row * tensor.columns(), PartRows(tensor, part) * tensor.columns()));
}

absl::StatusOr<Matrix> DecodeTensor(const TensorInfo& tensor, std::span<const std::byte> raw) {
  STAGECOACH_RETURN_IF_ERROR(CheckTensorData(tensor, raw));
  Matrix matrix;
  STAGECOACH_RETURN_IF_ERROR(DecodePart(tensor, {.raw = raw, .checked = true}, matrix));
  return matrix;
}

class Weights final : public UnitWeights {
 public:
  explicit Weights(std::map<TensorRole, Matrix> tensors) : tensors_(std::move(tensors)) {}

  uint64_t bytes() const override {
    uint64_t sum = 0;
    for (const auto& [role, matrix] : tensors_) sum += matrix.values.size() * sizeof(float);
    return sum;
  }
  // ModelFile has checked that every unit is complete.
  const Matrix& matrix(TensorRole role) const {
    const auto it = tensors_.find(role);
    assert(it != tensors_.end());
    return it->second;
  }
  std::span<const float> vector(TensorRole role) const { return matrix(role).values; }

  // x * w^T, plus the bias if the unit has one.
  std::vector<double> Project(TensorRole role, TensorRole bias, std::span<const double> x) const {
    std::vector<double> y = reference::MatMul(matrix(role), x);
    if (const auto it = tensors_.find(bias); it != tensors_.end()) {
      const std::vector<float>& values = it->second.values;
      for (size_t i = 0; i < y.size(); ++i) y[i] += values[i % values.size()];
    }
    return y;
  }

 private:
  const std::map<TensorRole, Matrix> tensors_;
};

class Builder final : public UnitBuilder {
 public:
  absl::Status AddPart(TensorRole role, const TensorInfo& tensor, const TensorPart& part) override {
    STAGECOACH_RETURN_IF_ERROR(CheckTensorShape(role, tensor));
    return DecodePart(tensor, part, tensors_[role]);
  }
  absl::StatusOr<std::unique_ptr<UnitWeights>> Finish() override {
    return std::make_unique<Weights>(std::move(tensors_));
  }

 private:
  std::map<TensorRole, Matrix> tensors_;
};

// The objects that this backend made itself.
const Weights& Own(const UnitWeights& weights) { return static_cast<const Weights&>(weights); }
Kv& Own(KvCache& kv) { return static_cast<Kv&>(kv); }

struct ReferenceWorkspace final : Workspace {
  ModelParams params;
  int max_rows = 0;
  std::vector<float> residual;  // [rows of this step][d_model]
};

ReferenceWorkspace& Own(Workspace& workspace) {
  return static_cast<ReferenceWorkspace&>(workspace);
}

class ReferenceBackend final : public Backend {
 public:
  BackendInfo info() const override {
    return {.kind = "reference",
            .kernel_revision = "reference-1",
            .description = "float64, 1 thread",
            .memory_bytes = PhysicalMemoryBytes()};
  }

  absl::Status CheckTensor(TensorRole role, const TensorInfo& tensor) const override {
    return CheckTensorShape(role, tensor);
  }

  std::unique_ptr<UnitBuilder> NewUnitBuilder(const ModelParams&, const Unit&) override {
    return std::make_unique<Builder>();
  }

  absl::StatusOr<std::unique_ptr<KvCache>> NewKvCache(const KvShape& shape) override {
    // float64 takes twice the bytes of the widest KvType.
    KvShape widest = shape;
    widest.type = KvType::kF32;
    const uint64_t float_bytes = KvBytes(widest);
    if (float_bytes <= PhysicalMemoryBytes() / 2) {
      try {
        return std::make_unique<Kv>(shape);
      } catch (const std::bad_alloc&) {
      }
    }
    return absl::ResourceExhaustedError(fmt::format(
        "no memory for a float64 KV cache of {} blocks in {} layers", shape.blocks, shape.layers));
  }

  absl::StatusOr<std::unique_ptr<Workspace>> NewWorkspace(const ModelParams& params,
                                                          int max_rows) override {
    auto workspace = std::make_unique<ReferenceWorkspace>();
    workspace->params = params;
    workspace->max_rows = max_rows;
    return workspace;
  }

  absl::Status Embed(Workspace& workspace, const UnitWeights& embedding,
                     std::span<const int32_t> token_ids) override {
    ReferenceWorkspace& space = Own(workspace);
    assert(token_ids.size() <= static_cast<size_t>(space.max_rows));
    const Matrix& matrix = Own(embedding).matrix(TensorRole::kTokenEmbedding);
    space.residual.clear();
    for (const int32_t id : token_ids) {
      assert(id >= 0 && id < matrix.rows);
      const std::span<const float> row = matrix.row(id);
      space.residual.insert(space.residual.end(), row.begin(), row.end());
    }
    return absl::OkStatus();
  }

  absl::Status SetResidual(Workspace& workspace, std::span<const float> residual) override {
    Own(workspace).residual.assign(residual.begin(), residual.end());
    return absl::OkStatus();
  }

  absl::Status RunLayer(Workspace& workspace, const UnitWeights& layer, KvCache& kv, int kv_layer,
                        const StepBatch& batch) override {
    ReferenceWorkspace& space = Own(workspace);
    const ModelParams& params = space.params;
    const Weights& w = Own(layer);
    std::vector<double> residual = ToDouble(space.residual);
    const auto add = [&](std::span<const double> delta) {
      assert(delta.size() == residual.size());
      for (size_t i = 0; i < residual.size(); ++i) residual[i] += delta[i];
    };

    std::vector<double> x =
        reference::RmsNorm(residual, w.vector(TensorRole::kAttnNorm), params.norm_epsilon);
    std::vector<double> q = w.Project(TensorRole::kAttnQ, TensorRole::kAttnQBias, x);
    std::vector<double> k = w.Project(TensorRole::kAttnK, TensorRole::kAttnKBias, x);
    const std::vector<double> v = w.Project(TensorRole::kAttnV, TensorRole::kAttnVBias, x);
    const std::vector<int32_t> positions = reference::RowPositions(batch);
    reference::Rope(params, q, params.heads, params.key_length, positions);
    reference::Rope(params, k, params.kv_heads, params.key_length, positions);
    const std::vector<double> attended =
        reference::Attention(params, q, k, v, Own(kv), kv_layer, batch);
    add(w.Project(TensorRole::kAttnOutput, TensorRole::kAttnOutputBias, attended));

    x = reference::RmsNorm(residual, w.vector(TensorRole::kFfnNorm), params.norm_epsilon);
    const std::vector<double> hidden =
        reference::SwiGlu(reference::MatMul(w.matrix(TensorRole::kFfnGate), x),
                          reference::MatMul(w.matrix(TensorRole::kFfnUp), x));
    add(reference::MatMul(w.matrix(TensorRole::kFfnDown), hidden));
    RoundTo(residual, space.residual);
    return absl::OkStatus();
  }

  absl::Status GetResidual(Workspace& workspace, std::span<float> residual) override {
    assert(residual.size() == Own(workspace).residual.size());
    std::ranges::copy(Own(workspace).residual, residual.begin());
    return absl::OkStatus();
  }

  absl::Status Head(Workspace& workspace, const UnitWeights& head, std::span<const int32_t> rows,
                    std::span<float> logits) override {
    const ReferenceWorkspace& space = Own(workspace);
    const Weights& w = Own(head);
    const std::span<const float> norm = w.vector(TensorRole::kOutputNorm);
    std::vector<double> x;
    for (const int32_t row : rows) {
      const auto values = std::span(space.residual).subspan(row * norm.size(), norm.size());
      x.insert(x.end(), values.begin(), values.end());
    }
    x = reference::RmsNorm(x, norm, space.params.norm_epsilon);
    RoundTo(reference::MatMul(w.matrix(TensorRole::kOutput), x), logits);
    return absl::OkStatus();
  }

  absl::Status CopyKvBlocks(KvCache& kv, std::span<const KvBlockCopy> copies) override {
    Kv& cache = Own(kv);
    for (const KvBlockCopy& copy : copies) {
      for (int layer = 0; layer < cache.shape().layers; ++layer) {
        std::ranges::copy(cache.block_keys(layer, copy.from),
                          cache.block_keys(layer, copy.to).begin());
        std::ranges::copy(cache.block_values(layer, copy.from),
                          cache.block_values(layer, copy.to).begin());
      }
    }
    return absl::OkStatus();
  }

  absl::Status ClearKvBlocks(KvCache& kv, std::span<const int32_t> blocks) override {
    Kv& cache = Own(kv);
    for (const int32_t block : blocks) {
      for (int layer = 0; layer < cache.shape().layers; ++layer) {
        std::ranges::fill(cache.block_keys(layer, block), 0.0);
        std::ranges::fill(cache.block_values(layer, block), 0.0);
      }
    }
    return absl::OkStatus();
  }

  absl::Status MatMul(const TensorInfo& tensor, std::span<const std::byte> raw,
                      std::span<const float> x, int rows, std::span<float> y) override {
    STAGECOACH_ASSIGN_OR_RETURN(const Matrix w, DecodeTensor(tensor, raw));
    assert(x.size() == static_cast<size_t>(rows) * w.columns);
    RoundTo(reference::MatMul(w, ToDouble(x)), y);
    return absl::OkStatus();
  }

  absl::Status RmsNorm(std::span<const float> x, int rows, std::span<const float> weight,
                       float epsilon, std::span<float> y) override {
    assert(x.size() == rows * weight.size());
    RoundTo(reference::RmsNorm(ToDouble(x), weight, epsilon), y);
    return absl::OkStatus();
  }

  absl::Status Rope(const ModelParams& params, std::span<float> x, int heads, int head_dim,
                    std::span<const int32_t> positions) override {
    std::vector<double> rotated = ToDouble(x);
    reference::Rope(params, rotated, heads, head_dim, positions);
    RoundTo(rotated, x);
    return absl::OkStatus();
  }

  absl::Status SwiGlu(std::span<const float> gate, std::span<const float> up,
                      std::span<float> out) override {
    RoundTo(reference::SwiGlu(ToDouble(gate), ToDouble(up)), out);
    return absl::OkStatus();
  }

  absl::Status Attention(const ModelParams& params, std::span<const float> q,
                         std::span<const float> k, std::span<const float> v, KvCache& kv,
                         int kv_layer, const StepBatch& batch, std::span<float> out) override {
    RoundTo(reference::Attention(params, ToDouble(q), ToDouble(k), ToDouble(v), Own(kv), kv_layer,
                                 batch),
            out);
    return absl::OkStatus();
  }
};

}  // namespace

std::unique_ptr<Backend> MakeReferenceBackend() { return std::make_unique<ReferenceBackend>(); }

}  // namespace stagecoach
