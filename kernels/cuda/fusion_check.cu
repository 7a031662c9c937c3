// What is fused, or together in a kernel, against the same one by one.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "kernels/cuda/checked_term.h"
#include "kernels/cuda/matmul_parameters.cuh"
#include "kernels/cuda/quant_matmul_check.h"

namespace stagecoach::cuda {
namespace {

// Copies of gate and up, paired.
struct PairedTerms {
  DeviceArray<uint8_t> gate, up;
  MatmulTerm terms[2];

  PairedTerms(const PackedMatrix& of_gate, const PackedMatrix& of_up)
      : gate(Copy(of_gate)), up(Copy(of_up)) {
    CheckDevice(LaunchPairRows(of_gate.type, of_gate.n, of_gate.k, gate.get(), up.get(), nullptr));
    CheckDevice(cudaDeviceSynchronize());
    terms[0].weights = of_gate;
    terms[1].weights = of_up;
    terms[0].weights.data = gate.get();
    terms[1].weights.data = up.get();
    terms[0].weights.paired = terms[1].weights.paired = true;
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
  const CheckedTerm gate = MakeTerm(random, type, hidden, k, kMostRows, AddedTo::kNothing);
  const CheckedTerm up = MakeTerm(random, type, hidden, k, kMostRows, AddedTo::kNothing);
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

// Terms together, in one kernel or in some side by side, against each of them alone. n: of the
// first one; others have less.
bool RunMixedCheck(std::span<const TensorType> types, int n, int k) {
  constexpr int kMostRows = 130;
  constexpr int kRows[] = {1, 2, 3, 4, 7, 16, 17, 40, 64, kMostRows};
  std::mt19937 random(n);
  std::vector<CheckedTerm> terms;
  for (const TensorType type : types) {
    const AddedTo added_to = terms.size() % 2 == 0 ? AddedTo::kBoth : AddedTo::kBias;
    const int own_n = n / (static_cast<int>(terms.size()) + 1) + 1;
    terms.push_back(MakeTerm(random, type, own_n, k, kMostRows, added_to));
  }
  const DeviceArray<float> values(RandomValues(random, size_t{kMostRows} * k, 1));
  const ScratchArray scratch;
  bool ok = true;
  for (const int rows : kRows) {
    const DeviceArray<uint8_t> memory(ActivationBytes(rows, k));
    const Activations x = LayOutActivations(memory.get(), FormFor(types[0]), rows, k);
    std::vector<DeviceArray<float>> together, alone;
    std::vector<MatmulTerm> launched;
    for (size_t i = 0; i < terms.size(); ++i) {
      together.emplace_back(terms[i].start);
      alone.emplace_back(terms[i].start);
      launched.push_back({{types[i], terms[i].n, k, terms[i].packed.get()},
                          together.back().get(),
                          terms[i].n,
                          terms[i].bias.get(),
                          terms[i].accumulates()});
    }
    CheckDevice(LaunchConvert(values.get(), x, nullptr));
    CheckDevice(LaunchMatmul(launched, x, nullptr, scratch.of()));
    for (size_t i = 0; i < terms.size(); ++i) {
      launched[i].y = alone[i].get();
      CheckDevice(LaunchMatmul({&launched[i], 1}, x, nullptr, scratch.of()));
    }
    CheckDevice(cudaDeviceSynchronize());
    for (size_t i = 0; i < terms.size(); ++i) {
      const size_t outputs = static_cast<size_t>(rows) * terms[i].n;
      ok &= CopyToHost(together[i].get(), outputs) == CopyToHost(alone[i].get(), outputs);
    }
  }
  std::string names;
  for (const TensorType type : types) names += ' ' + std::string(GetTensorTypeInfo(type).name);
  std::printf("%s%s n %d k %d: %s\n", ok ? "ok  " : "FAIL", names.c_str(), n, k,
              ok ? "together the same bits as alone" : "DIFFER");
  return ok;
}

// Terms that norm their rows for themselves, against a norm before; two of one type also as a pair.
bool RunNormCheck(std::span<const TensorType> types, int n, int k, int rows) {
  constexpr float kEpsilon = 1e-5f;
  std::mt19937 random(k);
  std::vector<CheckedTerm> terms;
  for (const TensorType type : types) {
    terms.push_back(MakeTerm(random, type, n, k, rows, AddedTo::kNothing));
  }
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

}  // namespace

bool RunFusionChecks() {
  bool ok = RefusesRaggedNorms();
  using Types = std::vector<TensorType>;
  constexpr TensorType kQ4 = TensorType::kQ4_K, kQ5 = TensorType::kQ5_K, kQ6 = TensorType::kQ6_K;
  for (const Types& types : {Types{kQ4, kQ4, kQ6}, {kQ6, kQ4}, {kQ4, kQ6, kQ5}, {kQ5, kQ6}}) {
    ok &= RunMixedCheck(types, 277, 1280);
    ok &= RunMixedCheck(types, 1024, 4096);
    ok &= RunMixedCheck(types, 4352, 2048);  // several passes
  }
  ok &= RunMixedCheck(
      Types{TensorType::kQ8_0, TensorType::kQ2_K, TensorType::kQ3_K, TensorType::kQ5_1}, 1024,
      4096);
  ok &= RunMixedCheck(Types{TensorType::kF16, TensorType::kBF16}, 1024, 4096);
  const bool norms = CurrentKernelSet() == KernelSet::kBulk;
  if (!norms) std::printf("SKIPPED: products of the plain set of kernels norm no rows\n");
  for (int rows = 1; norms && rows <= kMostNormedRows; ++rows) {
    for (const int k : {256, 2304, 4096, 5120, 8192}) {
      ok &= RunNormCheck(Types{kQ4, kQ6}, 277, k, rows);
      ok &= RunNormCheck(Types{kQ4, kQ4}, 768, k, rows);
    }
    ok &= RunNormCheck(Types{kQ5, kQ6}, 277, 2304, rows);
    ok &= RunNormCheck(Types{kQ4, kQ5}, 277, 2304, rows);
    ok &= RunNormCheck(Types{TensorType::kQ4_0}, 50, 1280, rows);
    ok &= RunNormCheck(Types{kQ4, kQ4}, 4352, 4096, rows);  // several passes
    ok &= RunNormCheck(Types{kQ4, kQ4, kQ6}, 4352, 4096, rows);
  }
  for (const TensorTypeInfo& info : AllTensorTypes()) {
    if (FormFor(info.type) != ActivationForm::kHalf) continue;
    ok &= RunFusionCheck(info.type, 768, RaggedColumns(info));
    ok &= RunFusionCheck(info.type, 768, 4096);
    ok &= RunFusionCheck(info.type, 4352, 512);
  }
  return ok;
}

}  // namespace stagecoach::cuda
