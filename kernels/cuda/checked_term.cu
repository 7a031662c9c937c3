#include "kernels/cuda/checked_term.h"

#include <cuda_runtime.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels/cuda/matmul_parameters.cuh"
#include "kernels/cuda/tile_format.cuh"
#include "model/block_decode.h"

namespace stagecoach::cuda {
namespace {

template <typename Block>
void MakeSane(std::mt19937& random, Block* block) {
  const auto half = [&] { return FloatToHalf(0.001f * static_cast<float>(1 + random() % 29)); };
  if constexpr (Block::kElements == 1) {
    const float value = std::normal_distribution<float>(0, 0.05f)(random);
    if constexpr (sizeof(Block) == 4) {
      block->element = value;
    } else if constexpr (std::is_same_v<Block, BlockF16>) {
      block->bits = FloatToHalf(value);
    } else {
      block->bits = FloatToBfloat16(value);
    }
  } else {
    block->d = half();
    if constexpr (requires { block->m; }) block->m = half() ^ 0x8000;
    if constexpr (requires { block->dmin; }) block->dmin = half();
  }
}

double RoundToHalf(double value) { return HalfToFloat(FloatToHalf(static_cast<float>(value))); }

// unit: what the device's weights are multiplied with before they are rounded (tile_format.cuh).
template <typename Block>
RandomWeights MakeWeights(std::mt19937& random, int n, int k, double unit) {
  RandomWeights result;
  const size_t count = static_cast<size_t>(n) * k / Block::kElements;
  result.raw.resize((count * sizeof(Block) + 3) / 4 * 4);
  for (size_t i = 0; i < result.raw.size(); i += 4) {
    const uint32_t word = random();
    std::memcpy(&result.raw[i], &word, 4);
  }
  result.values.resize(static_cast<size_t>(n) * k);
  result.decoded.resize(result.values.size());
  auto* blocks = reinterpret_cast<Block*>(result.raw.data());
  for (size_t b = 0; b < count; ++b) {
    MakeSane(random, &blocks[b]);
    double* out = &result.values[b * Block::kElements];
    double* decoded = &result.decoded[b * Block::kElements];
    if constexpr (Block::kElements == 1) {
      out[0] = blocks[b].value();
      decoded[0] = sizeof(Block) == 4 ? out[0] : RoundToHalf(out[0]);
    } else {
      for (int i = 0; i < Block::kElements; ++i) {
        const int g = i / Block::kGroup;
        const double scale = static_cast<double>(blocks[b].delta()) * blocks[b].scale(g);
        const double offset = -static_cast<double>(blocks[b].delta_min()) * blocks[b].min(g);
        out[i] = scale * blocks[b].quant(i) + offset;
        decoded[i] = RoundToHalf(RoundToHalf(scale) * unit * blocks[b].quant(i) +
                                 RoundToHalf(RoundToHalf(offset) * unit)) /
                     unit;
      }
    }
  }
  return result;
}

}  // namespace

CheckedTerm MakeTerm(std::mt19937& random, TensorType type, int n, int k, int most_rows,
                     AddedTo added_to) {
  CheckedTerm term;
  term.n = n;
  term.added_to = added_to;
  const double unit =
      VisitTileType(type, 1.0f, [&]<TensorType type>() { return TileOf<type>::kWeightScale; });
  term.weights = VisitBlockType(
      type, [&]<typename Block>() { return MakeWeights<Block>(random, n, k, unit); });
  const DeviceArray<uint8_t> raw(term.weights.raw);
  term.packed = DeviceArray<uint8_t>(PackedBytes(type, n, k));
  CheckDevice(LaunchRepack(type, n, k, raw.get(), term.packed.get(), nullptr));
  CheckDevice(cudaDeviceSynchronize());
  term.start.assign(static_cast<size_t>(most_rows) * n, NAN);
  if (added_to == AddedTo::kBias || added_to == AddedTo::kBoth) {
    term.host_bias = RandomValues(random, n, 1);
    term.bias = DeviceArray<float>(term.host_bias);
  }
  if (term.accumulates()) term.start = RandomValues(random, term.start.size(), 1);
  return term;
}

std::vector<float> RandomValues(std::mt19937& random, size_t count, float stddev) {
  std::normal_distribution<float> normal(0, stddev);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

std::vector<double> ReadActivations(const Activations& x) {
  std::vector<double> result(static_cast<size_t>(x.rows) * x.k);
  if (x.form == ActivationForm::kFloat) {
    const auto values = CopyToHost(x.values, result.size());
    return {values.begin(), values.end()};
  }
  const auto halves = CopyToHost(x.halves, ActivationBytes(x.rows, x.k) / 2);
  const bool pairs = x.form == ActivationForm::kHalfPairs;
  for (size_t i = 0; i < result.size(); ++i) {
    const int row = static_cast<int>(i / x.k), column = static_cast<int>(i % x.k);
    const auto value = [&](int half_row) {
      return HalfToFloat(halves[x.HalfPlace(half_row, column)]) / kActivationScale;
    };
    result[i] = pairs ? value(2 * row) + double{value(2 * row + 1)} * kRestScale : value(row);
  }
  return result;
}

double RelativeRms(const std::vector<double>& actual, const std::vector<double>& expected) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    error += (actual[i] - expected[i]) * (actual[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(error / norm);
}

ScratchArray::ScratchArray() {
  const std::vector<unsigned> arrivals(kMostSplitGroups, 0u - kQuarters);
  CheckDevice(cudaMemcpy(memory_.get(), arrivals.data(), arrivals.size() * sizeof(unsigned),
                         cudaMemcpyHostToDevice));
}

}  // namespace stagecoach::cuda
