#include "kernels/cuda/quant_matmul.h"

#include "kernels/cuda/float_matmul.cuh"
#include "kernels/cuda/matmul_parameters.cuh"

namespace stagecoach::cuda {
namespace {

void AddTerm(const MatmulTerm& term, MatmulParameters* p) {
  MatmulParameters::Term& added = p->terms[p->term_count++];
  added.tiles = static_cast<const uint8_t*>(term.weights.data);
  added.y = term.y;
  added.bias = term.bias;
  added.y_stride = term.y_stride;
  added.n = term.weights.n;
  added.first_tile_row = p->tile_rows;
  added.accumulate = term.accumulate;
  p->tile_rows += (term.weights.n + kTileRows - 1) / kTileRows;
}

// Terms of one type.
MatmulParameters MakeParameters(std::span<const MatmulTerm> terms, const Activations& x,
                                const MatmulScratch& scratch, const Fusion& fusion) {
  MatmulParameters p = {};
  for (const MatmulTerm& term : terms) AddTerm(term, &p);
  p.superblocks = x.PaddedColumns() / kSuperblock;
  p.rows = x.HalfRows();
  p.gated = fusion.gated;
  p.norm_input = fusion.norm_input;
  p.norm_weight = fusion.norm_weight;
  p.norm_epsilon = fusion.norm_epsilon;
  p.k = x.k;
  p.x = reinterpret_cast<const uint8_t*>(x.halves);
  if (scratch.memory != nullptr) {
    p.arrivals = static_cast<unsigned*>(scratch.memory);
    p.partials = static_cast<float*>(scratch.memory) + kMostSplitGroups;
  }
  return p;
}

cudaError_t ReadLimits(DeviceLimits* limits) {
  int device = 0, shared = 0;
  cudaError_t status = cudaGetDevice(&device);
  const auto read = [&](cudaDeviceAttr attribute, int* value) {
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(value, attribute, device);
  };
  read(cudaDevAttrMultiProcessorCount, &limits->multiprocessors);
  read(cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared);
  limits->shared_bytes = static_cast<size_t>(shared);
  return status;
}

}  // namespace

bool CanFuseNorm(const Activations& x) {
  return x.form == ActivationForm::kHalf && x.rows <= kMostNormedRows && x.k % kSuperblock == 0 &&
         x.k <= kMostNormedSuperblocks * kSuperblock;
}

bool CanFuseGate(std::span<const MatmulTerm> terms) {
  if (terms.size() != 2) return false;
  const PackedMatrix& gate = terms[0].weights;
  return FormFor(gate.type) == ActivationForm::kHalf && gate.type == terms[1].weights.type &&
         gate.n == terms[1].weights.n && gate.n % kSuperblock == 0;
}

cudaError_t LaunchMatmul(std::span<const MatmulTerm> terms, const Activations& x,
                         cudaStream_t stream, const MatmulScratch& scratch, const Fusion& fusion) {
  if (x.form == ActivationForm::kFloat) {
    for (const MatmulTerm& term : terms) {
      const cudaError_t status = LaunchFloatMatmul(term, x, stream);
      if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
  }
  DeviceLimits device;
  cudaError_t status = ReadLimits(&device);
  bool beside_previous = false;
  while (status == cudaSuccess && !terms.empty()) {
    const TensorType type = terms[0].weights.type;
    size_t same = 1;  // neighbours of one type go together
    while (same < terms.size() && terms[same].weights.type == type) ++same;
    MatmulParameters p = MakeParameters(terms.first(same), x, scratch, fusion);
    p.beside_previous = beside_previous;
    p.beside_next = same < terms.size() && !beside_previous;  // two by two
    status = VisitTileType(type, cudaErrorInvalidValue, [&]<TensorType type>() {
      return LaunchTypedMatmul<type>(p, device, stream);
    });
    beside_previous = p.beside_next;
    terms = terms.subspan(same);
  }
  return status;
}

}  // namespace stagecoach::cuda
