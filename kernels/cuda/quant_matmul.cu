#include "kernels/cuda/quant_matmul.h"

#include "kernels/cuda/float_matmul.cuh"
#include "kernels/cuda/matmul_parameters.cuh"
#include "kernels/cuda/stream_layout.cuh"

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
cudaError_t LaunchSameType(std::span<const MatmulTerm> terms, const Activations& x,
                           const Fusion& fusion, const DeviceLimits& device, cudaStream_t stream) {
  MatmulParameters p = {};
  for (const MatmulTerm& term : terms) AddTerm(term, &p);
  p.superblocks = x.PaddedColumns() / kSuperblock;
  p.rows = x.HalfRows();
  p.gated = fusion.gated;
  p.x = reinterpret_cast<const uint8_t*>(x.halves);
  return VisitTileType(terms[0].weights.type, cudaErrorInvalidValue, [&]<TensorType type>() {
    return LaunchTypedMatmul<type>(p, device, stream);
  });
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

// Whether the kernel for few rows, which alone fuses, runs for two such matrices.
bool StreamsTwo(const PackedMatrix& weights, int rows) {
  DeviceLimits device;
  const int superblocks = (weights.k + kSuperblock - 1) / kSuperblock;
  const int tile_rows = 2 * ((weights.n + kTileRows - 1) / kTileRows);
  return ReadLimits(&device) == cudaSuccess &&
         VisitTileType(weights.type, false, [&]<TensorType type>() {
           return ChooseStream<TileOf<type>>(superblocks, rows, tile_rows, device) !=
                  StreamChoice::kNone;
         });
}

}  // namespace

bool CanFuseGate(std::span<const MatmulTerm> terms, int rows) {
  const PackedMatrix& gate = terms[0].weights;
  return terms.size() == 2 && FormFor(gate.type) == ActivationForm::kHalf &&
         gate.type == terms[1].weights.type && gate.n == terms[1].weights.n &&
         gate.n % kSuperblock == 0 && StreamsTwo(gate, rows);
}

cudaError_t LaunchMatmul(std::span<const MatmulTerm> terms, const Activations& x,
                         cudaStream_t stream, const Fusion& fusion) {
  if (x.form == ActivationForm::kFloat) {
    for (const MatmulTerm& term : terms) {
      const cudaError_t status = LaunchFloatMatmul(term, x, stream);
      if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
  }
  DeviceLimits device;
  cudaError_t status = ReadLimits(&device);
  while (status == cudaSuccess && !terms.empty()) {
    size_t same = 1;  // neighbours of one type go together
    while (same < terms.size() && terms[same].weights.type == terms[0].weights.type) ++same;
    status = LaunchSameType(terms.first(same), x, fusion, device, stream);
    terms = terms.subspan(same);
  }
  return status;
}

}  // namespace stagecoach::cuda
