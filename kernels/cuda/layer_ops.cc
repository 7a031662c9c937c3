#include "kernels/cuda/layer_ops.h"

#include <algorithm>
#include <array>
#include <cassert>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/embed.h"
#include "kernels/cuda/rope.h"
#include "model/status_macros.h"

namespace stagecoach::cuda {
namespace {

// The products of `terms`, which read the same rows x k activations; prepare(Activations) makes
// these, once for each form that the terms' types need.
template <typename Prepare>
absl::Status Project(const CudaWorkspace& workspace, std::span<const MatmulTerm> terms, int rows,
                     cudaStream_t stream, const Prepare& prepare, const Fusion& fusion = {}) {
  for (const ActivationForm form :
       {ActivationForm::kFloat, ActivationForm::kHalf, ActivationForm::kHalfPairs}) {
    std::array<MatmulTerm, kMaxMatmulTerms> same;
    size_t count = 0;
    for (const MatmulTerm& term : terms) {
      if (FormFor(term.weights.type) == form) same[count++] = term;
    }
    if (count == 0) continue;
    const Activations x =
        LayOutActivations(workspace.activations.data(), form, rows, same[0].weights.k);
    STAGECOACH_RETURN_IF_CUDA_ERROR(prepare(x));
    STAGECOACH_RETURN_IF_CUDA_ERROR(
        LaunchMatmul(std::span(same).first(count), x, stream, workspace.MatmulMemory(), fusion));
  }
  return absl::OkStatus();
}

// The products of `terms`, of `unit`, with the normed rows of `input`, and what `fusion` has
// besides. A product that norms for itself reads weights at once, where a norm before it would have
// waited: only if they are known to be there.
absl::Status ProjectNormed(const CudaWorkspace& ws, const UnitStorage& unit,
                           std::span<const MatmulTerm> terms, int rows, const float* input,
                           const float* norm_weight, Fusion fusion, cudaStream_t stream) {
  const bool fits = unit.Uploaded() && std::ranges::all_of(terms, [&](const MatmulTerm& term) {
                      return CanFuseNorm(LayOutActivations(nullptr, FormFor(term.weights.type),
                                                           rows, term.weights.k));
                    });
  if (fits) {
    fusion.norm_input = input;
    fusion.norm_weight = norm_weight;
    fusion.norm_epsilon = ws.params.norm_epsilon;
  }
  return Project(
      ws, terms, rows, stream,
      [&](const Activations& x) {
        return fits ? cudaSuccess
                    : LaunchRmsNorm(input, norm_weight, ws.params.norm_epsilon, x, stream);
      },
      fusion);
}

MatmulTerm Term(const PackedMatrix& weights, float* y, const float* bias = nullptr,
                bool accumulate = false) {
  assert(weights.data != nullptr);
  return {
      .weights = weights, .y = y, .y_stride = weights.n, .bias = bias, .accumulate = accumulate};
}

}  // namespace

absl::Status EnqueueEmbed(CudaWorkspace& ws, const UnitStorage& embedding, cudaStream_t stream) {
  const PackedMatrix& table = embedding.embedding();
  STAGECOACH_RETURN_IF_CUDA_ERROR(EmbedRows(table.type, table.data, table.k, ws.inputs.tokens(),
                                            ws.drawn.data(), ws.rows, ws.residual.data(), stream));
  return absl::OkStatus();
}

absl::Status EnqueueSetResidual(CudaWorkspace& ws, cudaStream_t stream) {
  const size_t bytes = sizeof(float) * ws.rows * ws.params.d_model;
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(ws.residual.data(), ws.residual_in.data(), bytes,
                                                  cudaMemcpyHostToDevice, stream));
  return absl::OkStatus();
}

absl::Status EnqueueLayer(CudaWorkspace& ws, const UnitStorage& w, const KvLayout& kv,
                          cudaStream_t stream) {
  const ModelParams& params = ws.params;
  const MatmulTerm qkv[] = {
      Term(w.matrix(TensorRole::kAttnQ), ws.q.data(), w.vector(TensorRole::kAttnQBias)),
      Term(w.matrix(TensorRole::kAttnK), ws.k.data(), w.vector(TensorRole::kAttnKBias)),
      Term(w.matrix(TensorRole::kAttnV), ws.v.data(), w.vector(TensorRole::kAttnVBias))};
  STAGECOACH_RETURN_IF_ERROR(ProjectNormed(ws, w, qkv, ws.rows, ws.residual.data(),
                                           w.vector(TensorRole::kAttnNorm), {}, stream));
  const AttentionInputs inputs = {.q = ws.q.data(),
                                  .k = ws.k.data(),
                                  .v = ws.v.data(),
                                  .turns = ws.turns.data(),
                                  .pairs = params.rope_dims / 2};
  // Attention itself makes what the next product reads, if that is easily done.
  const int width = params.heads * params.value_length;
  const bool direct = width % kSuperblock == 0 &&
                      FormFor(w.matrix(TensorRole::kAttnOutput).type) == ActivationForm::kHalf;
  const Activations attended =
      direct ? LayOutActivations(ws.activations.data(), ActivationForm::kHalf, ws.rows, width)
             : LayOutActivations(ws.attended.data(), ActivationForm::kFloat, ws.rows, width);
  STAGECOACH_RETURN_IF_CUDA_ERROR(
      StoreAndAttend(ws.plan, ws.inputs.table(), inputs, kv, ws.partials.data(), attended, stream));
  const MatmulTerm output[] = {Term(w.matrix(TensorRole::kAttnOutput), ws.residual.data(),
                                    w.vector(TensorRole::kAttnOutputBias), /*accumulate=*/true)};
  STAGECOACH_RETURN_IF_ERROR(Project(ws, output, ws.rows, stream, [&](const Activations& x) {
    return direct ? cudaSuccess : LaunchConvert(ws.attended.data(), x, stream);
  }));

  const MatmulTerm inward[] = {Term(w.matrix(TensorRole::kFfnGate), ws.gate.data()),
                               Term(w.matrix(TensorRole::kFfnUp), ws.up.data())};
  const MatmulTerm outward[] = {Term(w.matrix(TensorRole::kFfnDown), ws.residual.data(),
                                     /*bias=*/nullptr, /*accumulate=*/true)};
  Fusion gate;
  if (inward[0].weights.paired) {
    // In the place of gate's own results, which are not stored then. Halves fit: their rows are
    // rounded up to 32 or 64 (Activations), less than twice as many, and take half as much each.
    gate.gated =
        LayOutActivations(ws.gate.data(), ActivationForm::kHalf, ws.rows, params.ffn_length);
  }
  STAGECOACH_RETURN_IF_ERROR(ProjectNormed(ws, w, inward, ws.rows, ws.residual.data(),
                                           w.vector(TensorRole::kFfnNorm), gate, stream));
  if (gate.gated.halves != nullptr) {
    STAGECOACH_RETURN_IF_CUDA_ERROR(LaunchMatmul(outward, gate.gated, stream, ws.MatmulMemory()));
    return absl::OkStatus();
  }
  return Project(ws, outward, ws.rows, stream, [&](const Activations& x) {
    return LaunchSwiGlu(ws.gate.data(), ws.up.data(), params.ffn_length, x, stream);
  });
}

absl::Status EnqueueGather(CudaWorkspace& ws, int first, int count, cudaStream_t stream) {
  STAGECOACH_RETURN_IF_CUDA_ERROR(EmbedRows(TensorType::kF32, ws.residual.data(), ws.params.d_model,
                                            ws.inputs.head_rows() + first, /*choices=*/nullptr,
                                            count, ws.head_input.data(), stream));
  return absl::OkStatus();
}

absl::Status EnqueueHead(CudaWorkspace& ws, const UnitStorage& head, const float* x, int count,
                         cudaStream_t stream) {
  const MatmulTerm output[] = {Term(head.matrix(TensorRole::kOutput), ws.logits.data())};
  return ProjectNormed(ws, head, output, count, x, head.vector(TensorRole::kOutputNorm), {},
                       stream);
}

}  // namespace stagecoach::cuda
