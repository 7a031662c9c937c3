#include "kernels/cuda/quant_matmul_check.h"

#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/cuda/checked_term.h"
#include "kernels/cuda/device_array.h"
#include "kernels/cuda/quant_matmul.h"

namespace stagecoach::cuda {
namespace {

// Relative RMS errors.
constexpr double kSumTolerance = 1e-5;       // of float32 sums, given both factors
constexpr double kRoundingTolerance = 1e-3;  // of factors rounded to halves

// Shapes and rows to check. Every count of rows is compared with the largest bit by bit, and that
// one with float64.
struct MatmulCheck {
  TensorType type = TensorType::kF32;
  int n = 0;  // of the first term; three others of the same type have less
  int k = 0;
  std::span<const int> rows;  // the largest last
};

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
                        term.bias.get(),
                        term.accumulates()});
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
      if (!term.host_bias.empty()) sum += term.host_bias[i];
      if (term.accumulates()) sum += term.start[row * term.n + i];
      expected.push_back(sum);
      actual.push_back(y[row * term.n + i]);
    }
  }
  return RelativeRms(actual, expected);
}

size_t HashOf(std::span<const std::vector<float>> results) {
  size_t hash = 0;
  for (const std::vector<float>& values : results) {
    const std::string_view bytes(reinterpret_cast<const char*>(values.data()), values.size() * 4);
    hash = hash * 31 + std::hash<std::string_view>()(bytes);
  }
  return hash;
}

bool RunMatmulCheck(const MatmulCheck& check) {
  std::mt19937 random(check.n + check.k);
  const int most = check.rows.back();
  std::vector<CheckedTerm> terms;
  const auto add = [&](int n, AddedTo added_to) {
    terms.push_back(MakeTerm(random, check.type, n, check.k, most, added_to));
  };
  add(check.n, AddedTo::kNothing);
  add(check.n / 3 + 1, AddedTo::kBoth);
  add(check.n / 5 + 1, AddedTo::kBias);
  add(check.n / 7 + 1, AddedTo::kResult);
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
  // The hash is for comparing two builds on one GPU.
  std::printf(
      "%s %-5s n %5d k %5d: error %.1e, of the sums alone %.1e, rows 1..%d %s%s, hash %zx\n",
      ok ? "ok  " : "FAIL", std::string(GetTensorTypeInfo(check.type).name).c_str(), check.n,
      check.k, worst, worst_sum, most,
      different.empty() ? "same bits" : "DIFFERENT BITS:", different.c_str(), HashOf(reference));
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

}  // namespace

bool RunAllMatmulChecks() {
  bool ok = RunActivationCheck();
  ok &= RunFusionChecks();
  constexpr int kFewRows[] = {1, 2, 3, 5, 8, 9, 17, 33, 70};
  constexpr int kDirectRows[] = {1, 2, 3, 8, 16};  // which do not fit shared memory, if long
  constexpr int kManyRows[] = {1, 2, 4, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65, 200};
  for (const TensorTypeInfo& info : AllTensorTypes()) {
    ok &= RunMatmulCheck({info.type, 277, RaggedColumns(info), kFewRows});
    ok &= RunMatmulCheck({info.type, 50, 512, kFewRows});
    ok &= RunMatmulCheck({info.type, 6229, 2048, kManyRows});
    ok &= RunMatmulCheck({info.type, 128, 11008, kManyRows});
    ok &= RunMatmulCheck({info.type, 128, 14336, kManyRows});
    ok &= RunMatmulCheck({info.type, 128, 28672, kDirectRows});
  }
  constexpr int kSharingRows[] = {17, 33, 64, 128};  // more blocks share k than run at once
  ok &= RunMatmulCheck({TensorType::kQ4_K, 5120, 4096, kSharingRows});
  // Several passes that read their activations directly.
  ok &= RunMatmulCheck({TensorType::kQ4_K, 4256, 8192, kDirectRows});
  return ok;
}

}  // namespace stagecoach::cuda
