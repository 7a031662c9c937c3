#include "kernels/cuda/quant_matmul_check.h"

#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/device_array.h"
#include "kernels/cuda/matmul_parameters.cuh"
#include "kernels/cuda/quant_matmul.h"
#include "kernels/cuda/tile_format.cuh"
#include "model/block_decode.h"

namespace stagecoach::cuda {
namespace {

// Relative RMS errors.
constexpr double kSumTolerance = 1e-5;       // of float32 sums, given both factors
constexpr double kRoundingTolerance = 1e-3;  // of factors rounded to halves

std::vector<float> RandomValues(std::mt19937& random, size_t count, float stddev) {
  std::normal_distribution<float> normal(0, stddev);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

// Random blocks with sane scales, and what they stand for.
struct RandomWeights {
  std::vector<uint8_t> raw;
  std::vector<double> values;   // [n][k]
  std::vector<double> decoded;  // the same as the device's products take them
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

// What activations on the device stand for: [rows][k].
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

// Memory for products as after many, whose count of arrivals is about to wrap.
class ScratchArray {
 public:
  ScratchArray() {
    const std::vector<unsigned> arrivals(kMostSplitGroups, 0u - kQuarters);
    CheckDevice(cudaMemcpy(memory_.get(), arrivals.data(), arrivals.size() * sizeof(unsigned),
                           cudaMemcpyHostToDevice));
  }
  MatmulScratch of() const { return {memory_.get()}; }

 private:
  DeviceArray<uint8_t> memory_{kMatmulScratchBytes};
};

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
  const double unit = VisitTileType(check.type, 1.0f,
                                    [&]<TensorType type>() { return TileOf<type>::kWeightScale; });
  term.weights = VisitBlockType(
      check.type, [&]<typename Block>() { return MakeWeights<Block>(random, n, check.k, unit); });
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
                                         const MatmulScratch& scratch,
                                         std::vector<double>* converted) {
  const DeviceArray<float> values(x);
  const DeviceArray<uint8_t> memory(ActivationBytes(rows, check.k));
  const Activations activations =
      LayOutActivations(memory.get(), FormFor(check.type), rows, check.k);
  CheckDevice(LaunchConvert(values.get(), activations, nullptr));
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
  CheckDevice(LaunchMatmul(launched, activations, nullptr, scratch));
  CheckDevice(cudaDeviceSynchronize());
  if (converted != nullptr) *converted = ReadActivations(activations);
  std::vector<std::vector<float>> result;
  for (size_t i = 0; i < terms.size(); ++i) {
    result.push_back(CopyToHost(y[i].get(), static_cast<size_t>(rows) * terms[i].n));
  }
  return result;
}

// Of y against float64 sums of weights[n][k] * x[rows][k], of large matrices only some output rows.
double ErrorOf(const CheckedTerm& term, const std::vector<double>& weights,
               std::span<const double> x, int k, const std::vector<float>& y) {
  const int step = term.n > 1000 ? 61 : 1;
  std::vector<double> actual, expected;
  for (size_t row = 0; row < y.size() / term.n; ++row) {
    for (int i = 0; i < term.n; i += step) {
      const double* w = &weights[static_cast<size_t>(i) * k];
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
  const std::vector<double> exact(x.begin(), x.end());
  std::vector<double> converted;
  const ScratchArray scratch;
  const auto reference = Multiply(check, terms, x, most, scratch.of(), &converted);
  bool ok = true;
  double worst_sum = 0, worst = 0;
  for (size_t i = 0; i < terms.size(); ++i) {
    const RandomWeights& weights = terms[i].weights;
    const double sum_error = ErrorOf(terms[i], weights.decoded, converted, check.k, reference[i]);
    const double error = ErrorOf(terms[i], weights.values, exact, check.k, reference[i]);
    if (!(sum_error <= kSumTolerance) || !(error <= kRoundingTolerance)) ok = false;
    if (!(sum_error <= worst_sum)) worst_sum = sum_error;
    if (!(error <= worst)) worst = error;
  }
  std::string different;
  for (const int rows : check.rows) {
    for (const MatmulScratch& memory : {scratch.of(), MatmulScratch{}}) {  // none: k is not split
      const auto y = Multiply(check, terms, x, rows, memory, nullptr);
      for (size_t i = 0; i < terms.size(); ++i) {
        if (std::memcmp(y[i].data(), reference[i].data(), y[i].size() * 4) != 0) {
          different += ' ';
          different += std::to_string(rows);
          ok = false;
        }
      }
    }
  }
  std::printf("%s %-5s n %5d k %5d: error %.1e, of the sums alone %.1e, rows 1..%d %s%s\n",
              ok ? "ok  " : "FAIL", std::string(GetTensorTypeInfo(check.type).name).c_str(),
              check.n, check.k, worst, worst_sum, most,
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
       {ActivationForm::kFloat, ActivationForm::kHalf, ActivationForm::kHalfPairs}) {
    const DeviceArray<uint8_t> memory(ActivationBytes(rows, k));
    const Activations out = LayOutActivations(memory.get(), form, rows, k);
    CheckDevice(LaunchRmsNorm(device_x.get(), device_up.get(), epsilon, out, nullptr));
    CheckDevice(cudaDeviceSynchronize());
    const double norm_error = RelativeRms(ReadActivations(out), normed);
    CheckDevice(LaunchSwiGlu(device_x.get(), device_up.get(), k, out, nullptr));
    CheckDevice(cudaDeviceSynchronize());
    const double gate_error = RelativeRms(ReadActivations(out), gated);
    const double tolerance = form == ActivationForm::kHalf ? kRoundingTolerance : 1e-6;
    const bool ok = norm_error <= tolerance && gate_error <= tolerance;
    std::printf("%s activations, form %d: norm error %.1e, SwiGLU error %.1e\n",
                ok ? "ok  " : "FAIL", static_cast<int>(form), norm_error, gate_error);
    all_ok = all_ok && ok;
  }
  return all_ok;
}

// Copies of gate and up, paired.
struct PairedTerms {
  DeviceArray<uint8_t> gate, up;
  MatmulTerm terms[2];

  PairedTerms(const PackedMatrix& of_gate, const PackedMatrix& of_up)
      : gate(Copy(of_gate)), up(Copy(of_up)) {
    const auto& [type, n, k, data, paired] = of_gate;
    CheckDevice(LaunchPairRows(type, n, k, gate.get(), up.get(), nullptr));
    CheckDevice(cudaDeviceSynchronize());
    terms[0].weights = {type, n, k, gate.get(), /*paired=*/true};
    terms[1].weights = {type, n, k, up.get(), /*paired=*/true};
  }
  static DeviceArray<uint8_t> Copy(const PackedMatrix& matrix) {
    const size_t bytes = PackedBytes(matrix.type, matrix.n, matrix.k);
    return DeviceArray<uint8_t>(CopyToHost(static_cast<const uint8_t*>(matrix.data), bytes));
  }
};

// hidden: rows of gate and up; from some thousands on a block has several of them.
bool RunFusionCheck(TensorType type, int hidden, int k) {
  constexpr int kEmpty = 0xdd, kMostRows = 86;
  constexpr int kRows[] = {1, 2, 3, 4, 5, 8, 9, 16, 17, 40, kMostRows};
  std::mt19937 random(k);
  const MatmulCheck check = {type, hidden, k, kRows};
  const CheckedTerm gate = MakeTerm(random, check, hidden, false);
  const CheckedTerm up = MakeTerm(random, check, hidden, false);
  const DeviceArray<float> values(RandomValues(random, size_t{kMostRows} * k, 2));
  const PackedMatrix separate[] = {{type, hidden, k, gate.packed.get()},
                                   {type, hidden, k, up.packed.get()}};
  const PairedTerms paired(separate[0], separate[1]);
  bool ok = true;
  for (const int rows : kRows) {
    const size_t outputs = static_cast<size_t>(rows) * hidden;
    const DeviceArray<float> gates(std::vector<float>(outputs, NAN)), ups(outputs);
    const DeviceArray<uint8_t> converted(ActivationBytes(rows, k));
    const std::vector<uint8_t> empty(ActivationBytes(rows, hidden), kEmpty);
    const DeviceArray<uint8_t> expected(empty), actual(empty);
    const auto laid_out = [&](const DeviceArray<uint8_t>& memory, int columns) {
      return LayOutActivations(memory.get(), ActivationForm::kHalf, rows, columns);
    };
    const MatmulTerm terms[] = {{separate[0], gates.get(), hidden},
                                {separate[1], ups.get(), hidden}};
    const Activations x = laid_out(converted, k);
    CheckDevice(LaunchConvert(values.get(), x, nullptr));
    CheckDevice(LaunchMatmul(terms, x, nullptr, {}));
    CheckDevice(LaunchSwiGlu(gates.get(), ups.get(), hidden, laid_out(expected, hidden), nullptr));
    CheckDevice(LaunchMatmul(paired.terms, x, nullptr, {}, {.gated = laid_out(actual, hidden)}));
    CheckDevice(cudaDeviceSynchronize());
    ok = ok && CopyToHost(expected.get(), empty.size()) == CopyToHost(actual.get(), empty.size());
  }
  std::printf("%s %-5s n %d k %5d: fused gates of %zu row counts %s\n", ok ? "ok  " : "FAIL",
              std::string(GetTensorTypeInfo(type).name).c_str(), hidden, k, std::size(kRows),
              ok ? "have the same bits" : "DIFFER");
  return ok;
}

// Terms of several types, whose kernels may run side by side, against each of them alone.
bool RunMixedCheck(std::span<const TensorType> types, int n, int k) {
  constexpr int kRows[] = {1, 2, 7, 16, 17, 40, 64, 130};
  std::mt19937 random(n);
  std::vector<CheckedTerm> terms;
  for (const TensorType type : types) {
    terms.push_back(MakeTerm(random, {type, n, k, kRows}, n, /*accumulate=*/true));
  }
  const DeviceArray<float> values(RandomValues(random, size_t{130} * k, 1));
  const ScratchArray scratch;
  bool ok = true;
  for (const int rows : kRows) {
    const DeviceArray<uint8_t> memory(ActivationBytes(rows, k));
    const Activations x = LayOutActivations(memory.get(), ActivationForm::kHalf, rows, k);
    std::vector<DeviceArray<float>> together, alone;
    std::vector<MatmulTerm> launched;
    for (size_t i = 0; i < terms.size(); ++i) {
      together.emplace_back(terms[i].start);
      alone.emplace_back(terms[i].start);
      launched.push_back({{types[i], n, k, terms[i].packed.get()},
                          together.back().get(),
                          n,
                          terms[i].bias.get(),
                          true});
    }
    CheckDevice(LaunchConvert(values.get(), x, nullptr));
    CheckDevice(LaunchMatmul(launched, x, nullptr, scratch.of()));
    for (size_t i = 0; i < terms.size(); ++i) {
      launched[i].y = alone[i].get();
      CheckDevice(LaunchMatmul({&launched[i], 1}, x, nullptr, scratch.of()));
    }
    CheckDevice(cudaDeviceSynchronize());
    const size_t outputs = static_cast<size_t>(rows) * n;
    for (size_t i = 0; i < terms.size(); ++i) {
      ok &= CopyToHost(together[i].get(), outputs) == CopyToHost(alone[i].get(), outputs);
    }
  }
  std::printf("%s %zu types n %d k %d: %s\n", ok ? "ok  " : "FAIL", types.size(), n, k,
              ok ? "together the same bits as alone" : "DIFFER");
  return ok;
}

// Terms that norm their rows for themselves, against a norm before; two of one type also as a pair.
bool RunNormCheck(std::span<const TensorType> types, int n, int k, int rows) {
  const int counts[] = {rows};
  constexpr float kEpsilon = 1e-5f;
  std::mt19937 random(k);
  std::vector<CheckedTerm> terms;
  for (const TensorType type : types)
    terms.push_back(MakeTerm(random, {type, n, k, counts}, n, false));
  const DeviceArray<float> values(RandomValues(random, static_cast<size_t>(rows) * k, 3)),
      weight(RandomValues(random, k, 1));
  const std::vector<uint8_t> nothing(ActivationBytes(rows, k), 0xff);  // NaN, if it is read
  const DeviceArray<uint8_t> normed(nothing), unused(nothing);
  const std::vector<uint8_t> empty(ActivationBytes(rows, n), 0xdd);
  const DeviceArray<uint8_t> expected_gate(empty), gate(empty);
  const size_t outputs = static_cast<size_t>(rows) * n;
  std::vector<DeviceArray<float>> expected, actual;
  const auto launch = [&](std::vector<DeviceArray<float>>& results, const Activations& x,
                          const Fusion& fusion) {
    std::vector<MatmulTerm> launched;
    for (size_t i = 0; i < terms.size(); ++i) {
      results.emplace_back(std::vector<float>(outputs, NAN));
      launched.push_back({{types[i], n, k, terms[i].packed.get()}, results.back().get(), n});
    }
    CheckDevice(LaunchMatmul(launched, x, nullptr, {}, fusion));
  };
  const auto lay_out = [&](const DeviceArray<uint8_t>& memory, int columns) {
    return LayOutActivations(memory.get(), ActivationForm::kHalf, rows, columns);
  };
  const Activations x = lay_out(normed, k), by_itself = lay_out(unused, k);
  Fusion fusion = {
      .norm_input = values.get(), .norm_weight = weight.get(), .norm_epsilon = kEpsilon};
  CheckDevice(LaunchRmsNorm(values.get(), weight.get(), kEpsilon, x, nullptr));
  bool ok = CanFuseNorm(by_itself);
  launch(expected, x, {});
  launch(actual, by_itself, fusion);
  CheckDevice(cudaDeviceSynchronize());
  for (size_t i = 0; i < terms.size(); ++i) {
    ok &= CopyToHost(expected[i].get(), outputs) == CopyToHost(actual[i].get(), outputs);
  }
  const auto matrix = [&](int i) { return PackedMatrix{types[i], n, k, terms[i].packed.get()}; };
  const bool gated = terms.size() == 2 && CanPairRows(matrix(0), matrix(1));
  if (gated) {
    const PairedTerms paired(matrix(0), matrix(1));
    CheckDevice(LaunchMatmul(paired.terms, x, nullptr, {}, {.gated = lay_out(expected_gate, n)}));
    fusion.gated = lay_out(gate, n);
    CheckDevice(LaunchMatmul(paired.terms, by_itself, nullptr, {}, fusion));
    CheckDevice(cudaDeviceSynchronize());
    ok &= CopyToHost(expected_gate.get(), empty.size()) == CopyToHost(gate.get(), empty.size());
  }
  std::printf("%s %zu terms n %d k %5d: %d rows normed by their products%s %s\n",
              ok ? "ok  " : "FAIL", terms.size(), n, k, rows, gated ? ", gated, too," : "",
              ok ? "have the same bits" : "DIFFER");
  return ok;
}

// Products norm only rows of whole superblocks.
bool RefusesRaggedNorms() {
  const bool ok = !CanFuseNorm(LayOutActivations(nullptr, ActivationForm::kHalf, 1, 1312));
  std::printf("%s rows of 1312 columns are not normed by their products\n", ok ? "ok  " : "FAIL");
  return ok;
}

bool RunAllMatmulChecks(bool small) {
  bool ok = RunActivationCheck();
  constexpr TensorType kTypes[] = {TensorType::kQ4_K, TensorType::kQ6_K, TensorType::kQ5_K};
  ok &= RunMixedCheck(std::span(kTypes).first(2), 277, 1280);
  ok &= RunMixedCheck(kTypes, 1024, 4096);
  constexpr TensorType kAlike[] = {TensorType::kQ4_K, TensorType::kQ4_K},
                       kSmallBlocks[] = {TensorType::kQ4_0};
  ok &= RefusesRaggedNorms();
  for (int rows = 1; rows <= kMostNormedRows; ++rows) {
    for (const int k : {256, 2304, 4096, 5120, 8192}) {
      ok &= RunNormCheck(std::span(kTypes).first(2), 277, k, rows);
      ok &= RunNormCheck(kAlike, 768, k, rows);
    }
    ok &= RunNormCheck(kSmallBlocks, 50, 1280, rows);
    ok &= RunNormCheck(kAlike, 4352, 4096, rows);  // several passes
  }
  constexpr int kFewRows[] = {1, 2, 3, 5, 8, 9, 17, 33, 70};
  constexpr int kDirectRows[] = {1, 2, 3, 8, 16};  // which do not fit shared memory, if long
  constexpr int kManyRows[] = {1, 2, 4, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65, 200};
  for (const TensorTypeInfo& info : AllTensorTypes()) {
    const int ragged = info.block_elements == 32 ? 1312 : 1280;
    ok &= RunMatmulCheck({info.type, 277, ragged, kFewRows});
    ok &= RunMatmulCheck({info.type, 50, 512, kFewRows});
    if (FormFor(info.type) == ActivationForm::kHalf) {
      ok &= RunFusionCheck(info.type, 768, ragged);
      ok &= RunFusionCheck(info.type, 768, 4096);
      ok &= RunFusionCheck(info.type, 4352, 512);
    }
    if (small) continue;
    ok &= RunMatmulCheck({info.type, 6229, 2048, kManyRows});
    ok &= RunMatmulCheck({info.type, 128, 11008, kManyRows});
    ok &= RunMatmulCheck({info.type, 128, 14336, kManyRows});
    ok &= RunMatmulCheck({info.type, 128, 28672, kDirectRows});
  }
  constexpr int kSharingRows[] = {17, 33, 64, 128};  // more blocks share k than run at once
  if (!small) ok &= RunMatmulCheck({TensorType::kQ4_K, 5120, 4096, kSharingRows});
  // Several passes that read their activations directly.
  if (!small) ok &= RunMatmulCheck({TensorType::kQ4_K, 4256, 8192, kDirectRows});
  return ok;
}

}  // namespace stagecoach::cuda
