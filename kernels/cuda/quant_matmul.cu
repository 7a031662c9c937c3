#include "kernels/cuda/quant_matmul.h"

#include <algorithm>
#include <utility>

#include "kernels/cuda/float_matmul.cuh"
#include "kernels/cuda/matmul_parameters.cuh"

namespace stagecoach::cuda {
namespace {

void AddTerm(const MatmulTerm& term, MatmulParameters* p) {
  const int index = p->term_count++;
  p->first_tile_rows[index] = p->tile_rows;
  p->origins[index] = reinterpret_cast<uintptr_t>(term.weights.data) -
                      static_cast<uintptr_t>(p->tile_rows) * p->row_bytes;
  MatmulParameters::Term& added = p->terms[index];
  added.y = term.y;
  added.bias = term.bias;
  added.y_stride = term.y_stride;
  added.n = term.weights.n;
  added.accumulate = term.accumulate;
  p->tile_rows += (term.weights.n + kTileRows - 1) / kTileRows;
}

// Terms of one type.
MatmulParameters MakeParameters(std::span<const MatmulTerm> terms, const Activations& x,
                                const MatmulScratch& scratch, const Fusion& fusion) {
  MatmulParameters p = {};
  p.superblocks = x.PaddedColumns() / kSuperblock;
  p.row_bytes = static_cast<uint32_t>(PackedBytes(terms[0].weights.type, 1, x.k));
  std::ranges::fill(p.first_tile_rows, kNoTileRow);
  for (const MatmulTerm& term : terms) AddTerm(term, &p);
  p.rows = x.HalfRows();
  p.gated = fusion.gated;
  p.is_gated = fusion.gated.halves != nullptr;
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

// The multiprocessors of two products that run side by side: some each, if they read few rows of
// activations (more blocks than multiprocessors otherwise) and are done sooner so than in turn.
std::pair<DeviceLimits, DeviceLimits> Divide(const MatmulParameters& first,
                                             const MatmulParameters& second,
                                             const DeviceLimits& device) {
  if (first.rows > kMostStreamRows) return {device, device};
  // What a block reads at most, of so many blocks.
  const auto bytes = [](const MatmulParameters& p, int blocks) {
    return uint64_t{p.row_bytes} * ((p.tile_rows + blocks - 1) / blocks);
  };
  // What a block reads while the second kernel begins, beside the first one (about 2 us) or behind
  // it (2.5 us), as measured on an H200.
  constexpr uint64_t kBeginBeside = 62 << 10, kBeginBehind = 80 << 10;
  std::pair<DeviceLimits, DeviceLimits> best = {device, device};
  uint64_t least =
      bytes(first, device.multiprocessors) + bytes(second, device.multiprocessors) + kBeginBehind;
  for (int blocks = 1; blocks < device.multiprocessors; ++blocks) {
    const int rest = device.multiprocessors - blocks;
    const uint64_t longer = std::max(bytes(first, blocks), bytes(second, rest) + kBeginBeside);
    if (longer >= least) continue;
    least = longer;
    best.first.multiprocessors = blocks;
    best.second.multiprocessors = rest;
  }
  return best;
}

}  // namespace

bool CanFuseNorm(const Activations& x) {
  return x.form == ActivationForm::kHalf && x.rows <= kMostNormedRows && x.k % kSuperblock == 0 &&
         x.k <= kMostNormedSuperblocks * kSuperblock;
}

cudaError_t LaunchMatmul(std::span<const MatmulTerm> terms, const Activations& x,
                         cudaStream_t stream, const MatmulScratch& scratch, const Fusion& fusion) {
  for (const MatmulTerm& term : terms) {
    if (term.weights.paired != (fusion.gated.halves != nullptr)) return cudaErrorInvalidValue;
  }
  if (x.form == ActivationForm::kFloat) {
    for (const MatmulTerm& term : terms) {
      const cudaError_t status = LaunchFloatMatmul(term, x, stream);
      if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
  }
  DeviceLimits device;
  cudaError_t status = ReadLimits(&device);
  // Neighbours of one type go together.
  const auto take_kind = [&] {
    size_t same = 1;
    while (same < terms.size() && terms[same].weights.type == terms[0].weights.type) ++same;
    return std::exchange(terms, terms.subspan(same)).first(same);
  };
  const auto launch = [&](const MatmulParameters& p, TensorType type, const DeviceLimits& share) {
    return VisitTileType(type, cudaErrorInvalidValue, [&]<TensorType type>() {
      return LaunchTypedMatmul<type>(p, share, stream);
    });
  };
  while (status == cudaSuccess && !terms.empty()) {
    const std::span<const MatmulTerm> kind = take_kind();
    MatmulParameters first = MakeParameters(kind, x, scratch, fusion);
    if (terms.empty()) return launch(first, kind[0].weights.type, device);
    const std::span<const MatmulTerm> next_kind = take_kind();
    MatmulParameters second = MakeParameters(next_kind, x, scratch, fusion);
    first.beside_next = second.beside_previous = true;
    const auto [of_first, of_second] = Divide(first, second, device);
    status = launch(first, kind[0].weights.type, of_first);
    if (status == cudaSuccess) status = launch(second, next_kind[0].weights.type, of_second);
  }
  return status;
}

}  // namespace stagecoach::cuda
