#include "kernels/cuda/quant_matmul_check.h"

#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/device_array.h"
#include "kernels/cuda/quant_matmul.h"
#include "model/block_decode.h"

namespace stagecoach::cuda {
namespace {

constexpr double kSumTolerance = 2e-6;  // relative RMS: float sums of exact integers

std::vector<float> RandomValues(std::mt19937& random, size_t count, float stddev) {
  std::normal_distribution<float> normal(0, stddev);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

// Random blocks with sane scales, and what they stand for.
struct RandomWeights {
  std::vector<uint8_t> raw;
  std::vector<double> values;  // [n][k]
};

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

template <typename Block>
RandomWeights MakeWeights(std::mt19937& random, int n, int k) {
  RandomWeights result;
  const size_t count = static_cast<size_t>(n) * k / Block::kElements;
  result.raw.resize((count * sizeof(Block) + 3) / 4 * 4);
  for (size_t i = 0; i < result.raw.size(); i += 4) {
    const uint32_t word = random();
    std::memcpy(&result.raw[i], &word, 4);
  }
  result.values.resize(static_cast<size_t>(n) * k);
  auto* blocks = reinterpret_cast<Block*>(result.raw.data());
  for (size_t b = 0; b < count; ++b) {
    MakeSane(random, &blocks[b]);
    double* out = &result.values[b * Block::kElements];
    if constexpr (Block::kElements == 1) {
      out[0] = blocks[b].value();
    } else {
      for (int i = 0; i < Block::kElements; ++i) {
        const int g = i / Block::kGroup;
        out[i] = static_cast<double>(blocks[b].delta()) * blocks[b].scale(g) * blocks[b].quant(i) -
                 static_cast<double>(blocks[b].delta_min()) * blocks[b].min(g);
      }
    }
  }
  return result;
}

// What quantised activations on the device stand for: [rows][k].
std::vector<double> ReadActivations(const Activations& x) {
  std::vector<double> result(static_cast<size_t>(x.rows) * x.k);
  if (x.form == ActivationForm::kFloat) {
    const auto values = CopyToHost(x.values, result.size());
    return {values.begin(), values.end()};
  }
  const int columns = x.PaddedColumns(), passes = x.precise ? 2 : 1;
  const int per_scale = x.form == ActivationForm::kQuant256 ? 256 : 32;
  const auto quants = CopyToHost(x.quants, static_cast<size_t>(x.QuantRows()) * columns);
  const auto scales =
      CopyToHost(x.scales, static_cast<size_t>(columns) / per_scale * x.ScaleStride());
  for (int q = 0; q < x.QuantRows(); ++q) {
    for (int c = 0; c < x.k; ++c) {
      const int in_group = c % 32;
      const int place = c / 32 * 32 + in_group % 16 / 4 * 8 + in_group / 16 * 4 + in_group % 4;
      result[static_cast<size_t>(q / passes) * x.k + c] +=
          static_cast<double>(quants[static_cast<size_t>(q) * columns + place]) *
          scales[static_cast<size_t>(c / per_scale) * x.ScaleStride() + q];
    }
  }
  return result;
}

// Whether the sums that go with quantised activations are those of their quants.
bool SumsAreRight(const Activations& x) {
  if (x.form == ActivationForm::kFloat) return true;
  const size_t groups = static_cast<size_t>(x.QuantRows()) * x.PaddedColumns() / 32;
  const auto quants = CopyToHost(x.quants, groups * 32);
  const auto sums = CopyToHost(x.sums, groups);
  for (size_t i = 0; i < groups; ++i) {
    int sum = 0;
    for (int j = 0; j < 32; ++j) sum += quants[i * 32 + j];
    if (sum != sums[i]) return false;
  }
  return true;
}

double RelativeRms(const std::vector<double>& actual, const std::vector<double>& expected) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    error += (actual[i] - expected[i]) * (actual[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(error / norm);
}

// One matrix on the device with its result.
struct CheckedTerm {
  RandomWeights weights;
  DeviceArray<uint8_t> packed;
  DeviceArray<float> bias;
  std::vector<float> host_bias, start;  // start: what y holds before, [rows][n]
  int n = 0;
  bool accumulate = false;
};

CheckedTerm MakeTerm(std::mt19937& random, const MatmulCheck& check, int n, bool accumulate) {
  CheckedTerm term;
  term.n = n;
  term.accumulate = accumulate;
  term.weights = [&] {
    return VisitBlockType(check.type,
                          [&]<typename Block>() { return MakeWeights<Block>(random, n, check.k); });
  }();
  const DeviceArray<uint8_t> raw(term.weights.raw);
  term.packed = DeviceArray<uint8_t>(PackedBytes(check.type, n, check.k));
  CheckDevice(LaunchRepack(check.type, n, check.k, raw.get(), term.packed.get(), nullptr));
  CheckDevice(cudaDeviceSynchronize());
  term.start.assign(static_cast<size_t>(check.rows.back()) * n, NAN);
  if (accumulate) {
    term.host_bias = RandomValues(random, n, 1);
    term.bias = DeviceArray<float>(term.host_bias);
    term.start = RandomValues(random, term.start.size(), 1);
  }
  return term;
}

// y of all terms for the first `rows` rows of x.
std::vector<std::vector<float>> Multiply(const MatmulCheck& check,
                                         const std::vector<CheckedTerm>& terms,
                                         const std::vector<float>& x, int rows,
                                         std::vector<double>* quantised, bool* sums_right) {
  const DeviceArray<float> values(x);
  const DeviceArray<uint8_t> memory(ActivationBytes(rows, check.k, check.precise));
  const Activations activations =
      LayOutActivations(memory.get(), FormFor(check.type), rows, check.k, check.precise);
  CheckDevice(LaunchQuantize(values.get(), activations, nullptr));
  std::vector<MatmulTerm> launched;
  std::vector<DeviceArray<float>> y;
  for (const CheckedTerm& term : terms) {
    y.emplace_back(term.start);
    launched.push_back({{check.type, term.n, check.k, term.packed.get()},
                        y.back().get(),
                        term.n,
                        term.accumulate ? term.bias.get() : nullptr,
                        term.accumulate});
  }
  CheckDevice(LaunchMatmul(launched, activations, nullptr));
  CheckDevice(cudaDeviceSynchronize());
  if (quantised != nullptr) *quantised = ReadActivations(activations);
  if (sums_right != nullptr) *sums_right = SumsAreRight(activations);
  std::vector<std::vector<float>> result;
  for (size_t i = 0; i < terms.size(); ++i) {
    result.push_back(CopyToHost(y[i].get(), static_cast<size_t>(rows) * terms[i].n));
  }
  return result;
}

// Against float64, of large matrices only some output rows.
double ErrorOf(const CheckedTerm& term, const std::vector<double>& x, int k,
               const std::vector<float>& y) {
  const int step = term.n > 1000 ? 61 : 1;
  std::vector<double> actual, expected;
  for (size_t row = 0; row < y.size() / term.n; ++row) {
    for (int i = 0; i < term.n; i += step) {
      const double* w = &term.weights.values[static_cast<size_t>(i) * k];
      double sum = 0;
      for (int c = 0; c < k; ++c) sum += w[c] * x[row * k + c];
      if (term.accumulate) sum += term.host_bias[i] + term.start[row * term.n + i];
      expected.push_back(sum);
      actual.push_back(y[row * term.n + i]);
    }
  }
  return RelativeRms(actual, expected);
}

}  // namespace

bool RunMatmulCheck(const MatmulCheck& check) {
  std::mt19937 random(check.n + check.k);
  const int most = check.rows.back();
  std::vector<CheckedTerm> terms;
  terms.push_back(MakeTerm(random, check, check.n, false));
  terms.push_back(MakeTerm(random, check, check.n / 3 + 1, true));
  const std::vector<float> x = RandomValues(random, static_cast<size_t>(most) * check.k, 1);
  std::vector<double> quantised;
  bool sums_right = false;
  const auto reference = Multiply(check, terms, x, most, &quantised, &sums_right);
  const double quantisation = RelativeRms(quantised, {x.begin(), x.end()});
  bool ok = sums_right && quantisation <= (check.precise ? 1e-4 : 1.5e-2);
  double worst = 0;
  for (size_t i = 0; i < terms.size(); ++i) {
    const double error = ErrorOf(terms[i], quantised, check.k, reference[i]);
    if (!(error <= kSumTolerance)) ok = false;
    if (!(error <= worst)) worst = error;
  }
  std::string different;
  for (const int rows : check.rows) {
    const auto y = Multiply(check, terms, x, rows, nullptr, nullptr);
    for (size_t i = 0; i < terms.size(); ++i) {
      if (std::memcmp(y[i].data(), reference[i].data(), y[i].size() * 4) != 0) {
        different += ' ';
        different += std::to_string(rows);
        ok = false;
      }
    }
  }
  std::printf("%s %-5s n %5d k %5d%s: error %.1e, quantisation %.1e, rows 1..%d %s%s\n",
              ok ? "ok  " : "FAIL", std::string(GetTensorTypeInfo(check.type).name).c_str(),
              check.n, check.k, check.precise ? " precise" : "", worst, quantisation, most,
              different.empty() ? "same bits" : "DIFFERENT BITS:", different.c_str());
  std::fflush(stdout);
  return ok;
}

bool RunActivationCheck() {
  bool all_ok = true;
  std::mt19937 random(5);
  const int rows = 3, k = 1312;
  const float epsilon = 1e-5f;
  const std::vector<float> x = RandomValues(random, rows * k, 2);
  const std::vector<float> up = RandomValues(random, rows * k, 1);
  std::vector<double> normed(x.size()), gated(x.size());
  for (int row = 0; row < rows; ++row) {
    double squares = 0;
    for (int c = 0; c < k; ++c) squares += static_cast<double>(x[row * k + c]) * x[row * k + c];
    for (int c = 0; c < k; ++c) {
      const double v = x[row * k + c];
      normed[row * k + c] = v / std::sqrt(squares / k + epsilon) * up[c];
      gated[row * k + c] = v / (1 + std::exp(-v)) * up[row * k + c];
    }
  }
  const DeviceArray<float> device_x(x), device_up(up);
  for (const auto form :
       {ActivationForm::kFloat, ActivationForm::kQuant32, ActivationForm::kQuant256}) {
    const bool precise = form == ActivationForm::kQuant32;
    const DeviceArray<uint8_t> memory(ActivationBytes(rows, k, precise));
    const Activations out = LayOutActivations(memory.get(), form, rows, k, precise);
    CheckDevice(LaunchRmsNormQuantize(device_x.get(), device_up.get(), epsilon, out, nullptr));
    CheckDevice(cudaDeviceSynchronize());
    const double norm_error = RelativeRms(ReadActivations(out), normed);
    bool ok = SumsAreRight(out);
    CheckDevice(LaunchSwiGluQuantize(device_x.get(), device_up.get(), k, out, nullptr));
    CheckDevice(cudaDeviceSynchronize());
    const double gate_error = RelativeRms(ReadActivations(out), gated);
    const double tolerance = form == ActivationForm::kFloat ? 1e-6 : precise ? 1e-4 : 2e-2;
    ok = ok && SumsAreRight(out) && norm_error <= tolerance && gate_error <= tolerance;
    std::printf("%s activations, form %d%s: norm error %.1e, SwiGLU error %.1e\n",
                ok ? "ok  " : "FAIL", static_cast<int>(form), precise ? " precise" : "", norm_error,
                gate_error);
    all_ok = all_ok && ok;
  }
  return all_ok;
}

bool RunAllMatmulChecks(bool small) {
  bool ok = RunActivationCheck();
  constexpr int kFewRows[] = {1, 2, 3, 8, 9, 17, 33, 70};
  constexpr int kManyRows[] = {1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65, 200};
  for (const TensorTypeInfo& info : AllTensorTypes()) {
    const int ragged = info.block_elements == 32 ? 1312 : 1280;
    ok &= RunMatmulCheck({info.type, 277, ragged, kFewRows, false});
    ok &= RunMatmulCheck({info.type, 50, 512, kFewRows, true});
    if (small) continue;
    ok &= RunMatmulCheck({info.type, 6229, 2048, kManyRows, false});
    ok &= RunMatmulCheck({info.type, 128, 14336, kManyRows, false});
  }
  return ok;
}

}  // namespace stagecoach::cuda
