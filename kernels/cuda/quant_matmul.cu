#include "kernels/cuda/quant_matmul.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "kernels/cuda/float_matmul.cuh"
#include "kernels/cuda/matmul_parameters.cuh"
#include "kernels/cuda/norm_ops.cuh"
#include "kernels/cuda/stream_layout.cuh"

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
  p.norm_share = NormShare(x.k);
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
  limits->kernels = CurrentKernelSet();
  return status;
}

// Neighbouring terms of one type.
struct TermsOfType {
  TensorType type;
  MatmulParameters p;
};

// What a block reads at most, of so many blocks.
uint64_t MostBytes(const MatmulParameters& p, int blocks) {
  return uint64_t{p.row_bytes} * ((p.tile_rows + blocks - 1) / blocks);
}

struct Division {
  int of_first;      // multiprocessors
  uint64_t longest;  // bytes that a block reads, and what counts as much
};
// Multiprocessors for two products, for each some, so that the longest block is as short as it can
// be; without two of them no block is short enough. lag: what a block reads until the second one
// begins.
Division DivideMultiprocessors(const MatmulParameters& first, const MatmulParameters& second,
                               int multiprocessors, uint64_t lag) {
  Division best = {.of_first = 0, .longest = UINT64_MAX};
  for (int blocks = 1; blocks < multiprocessors; ++blocks) {
    const uint64_t longest =
        std::max(MostBytes(first, blocks), MostBytes(second, multiprocessors - blocks) + lag);
    if (longest < best.longest) best = {.of_first = blocks, .longest = longest};
  }
  return best;
}

// One kind of terms or two in the kernel for Q4_K and Q6_K, if they and their rows are such.
std::optional<MixedParameters> Mix(const TermsOfType& kind, const std::optional<TermsOfType>& next,
                                   const DeviceLimits& device) {
  const int rows = kind.p.rows, superblocks = kind.p.superblocks;
  if (device.kernels != KernelSet::kBulk || rows > kMostMixedRows || device.multiprocessors < 2) {
    return std::nullopt;
  }
  MixedParameters mixed = {};
  const auto add = [&]<TensorType type>(const TermsOfType& added, MatmulParameters* p) {
    if (added.type != type || p->tile_rows > 0 ||
        !SharesActivations<TileOf<type>>(superblocks, rows, device)) {
      return false;
    }
    *p = added.p;
    return true;
  };
  const auto add_any = [&](const TermsOfType& added) {
    return add.template operator()<TensorType::kQ4_K>(added, &mixed.q4_k) ||
           add.template operator()<TensorType::kQ6_K>(added, &mixed.q6_k);
  };
  if (!add_any(kind) || (next && !add_any(*next))) return std::nullopt;
  int of_q4_k = device.multiprocessors, of_q6_k = device.multiprocessors;
  if (next) {
    of_q4_k = DivideMultiprocessors(mixed.q4_k, mixed.q6_k, device.multiprocessors, 0).of_first;
    of_q6_k -= of_q4_k;
  }
  mixed.q4_k.shares = BlockShares::Of(mixed.q4_k.tile_rows, of_q4_k);
  mixed.q6_k.shares = BlockShares::Of(mixed.q6_k.tile_rows, of_q6_k);
  return mixed;
}

// The multiprocessors of two products that run side by side: some each, if they read few rows of
// activations (more blocks than multiprocessors otherwise) and are done sooner so than in turn.
std::pair<DeviceLimits, DeviceLimits> LimitsBeside(const MatmulParameters& first,
                                                   const MatmulParameters& second,
                                                   const DeviceLimits& device) {
  std::pair<DeviceLimits, DeviceLimits> limits = {device, device};
  if (first.rows > kMostStreamRows) return limits;
  // What a block reads while the second kernel begins, beside the first one (about 2 us) or behind
  // it (2.5 us), as measured on an H200.
  constexpr uint64_t kBeginBeside = 62 << 10, kBeginBehind = 80 << 10;
  const int all = device.multiprocessors;
  const uint64_t in_turn = MostBytes(first, all) + MostBytes(second, all) + kBeginBehind;
  const Division division = DivideMultiprocessors(first, second, all, kBeginBeside);
  if (division.longest < in_turn) {
    limits.first.multiprocessors = division.of_first;
    limits.second.multiprocessors = all - division.of_first;
  }
  return limits;
}

}  // namespace

bool CanFuseNorm(const Activations& x) {
  return CurrentKernelSet() == KernelSet::kBulk && x.form == ActivationForm::kHalf &&
         x.rows <= kMostNormedRows && x.k % kSuperblock == 0 &&
         x.k <= kMostNormedSuperblocks * kSuperblock;
}

cudaError_t LaunchMatmul(std::span<const MatmulTerm> terms, const Activations& x,
                         cudaStream_t stream, const MatmulScratch& scratch, const Fusion& fusion) {
  for (const MatmulTerm& term : terms) {
    if (term.weights.paired != (fusion.gated.halves != nullptr)) return cudaErrorInvalidValue;
  }
  if (fusion.norm_input != nullptr && !CanFuseNorm(x)) return cudaErrorInvalidValue;
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
    const TensorType type = terms[0].weights.type;
    size_t same = 1;
    while (same < terms.size() && terms[same].weights.type == type) ++same;
    const TermsOfType kind = {type, MakeParameters(terms.first(same), x, scratch, fusion)};
    terms = terms.subspan(same);
    return kind;
  };
  const auto launch = [&](const TermsOfType& kind, const DeviceLimits& share) {
    return VisitTileType(kind.type, cudaErrorInvalidValue, [&]<TensorType type>() {
      return LaunchTypedMatmul<type>(kind.p, share, stream);
    });
  };
  while (status == cudaSuccess && !terms.empty()) {
    TermsOfType kind = take_kind();
    std::optional<TermsOfType> next;
    const bool beside = device.kernels == KernelSet::kBulk;  // plain ones run in turn
    if (!terms.empty() && beside) next = take_kind();
    if (const std::optional<MixedParameters> mixed = Mix(kind, next, device)) {
      status = LaunchMixedMatmul(*mixed, device, stream);
    } else if (next) {
      kind.p.beside_next = next->p.beside_previous = true;
      const auto [of_first, of_second] = LimitsBeside(kind.p, next->p, device);
      status = launch(kind, of_first);
      if (status == cudaSuccess) status = launch(*next, of_second);
    } else {
      status = launch(kind, device);
    }
  }
  return status;
}

}  // namespace stagecoach::cuda
