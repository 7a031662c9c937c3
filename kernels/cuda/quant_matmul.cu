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

// Terms [0, count) of one type.
cudaError_t LaunchSameType(std::span<const MatmulTerm> terms, const Activations& x,
                           int multiprocessors, cudaStream_t stream) {
  MatmulParameters p = {};
  for (const MatmulTerm& term : terms) AddTerm(term, &p);
  p.superblocks = x.PaddedColumns() / kSuperblock;
  p.quant_rows = x.QuantRows();
  p.scale_stride = x.ScaleStride();
  p.precise = x.precise;
  p.quants = x.quants;
  p.sums = x.sums;
  p.scales = x.scales;
  return VisitTileType(terms[0].weights.type, cudaErrorInvalidValue, [&]<TensorType type>() {
    return LaunchTypedMatmul<type>(p, multiprocessors, stream);
  });
}

}  // namespace

cudaError_t LaunchMatmul(std::span<const MatmulTerm> terms, const Activations& x,
                         cudaStream_t stream) {
  if (x.form == ActivationForm::kFloat) {
    for (const MatmulTerm& term : terms) {
      const cudaError_t status = LaunchFloatMatmul(term, x, stream);
      if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
  }
  int device = 0, multiprocessors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  while (status == cudaSuccess && !terms.empty()) {
    size_t same = 1;  // neighbours of one type go together
    while (same < terms.size() && terms[same].weights.type == terms[0].weights.type) ++same;
    status = LaunchSameType(terms.first(same), x, multiprocessors, stream);
    terms = terms.subspan(same);
  }
  return status;
}

}  // namespace stagecoach::cuda
