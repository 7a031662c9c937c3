// What the golden tests of all backends share: the token sequence, the logits computed in float64
// by another program (tests/data/golden), and the accuracy that is asked of quantised products.
#ifndef STAGECOACH_KERNELS_GOLDEN_FIXTURE_H_
#define STAGECOACH_KERNELS_GOLDEN_FIXTURE_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <span>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/model_runner.h"

namespace stagecoach {

inline constexpr int kGoldenTokens = 48;
inline constexpr int32_t kGoldenSequence[kGoldenTokens] = {
    1,   304, 305, 997,  393, 424, 969, 989, 422, 261, 314, 362, 1001, 364, 305, 997,
    393, 424, 969, 1006, 356, 261, 980, 261, 717, 474, 260, 424, 268,  977, 355, 974,
    983, 330, 366, 261,  474, 977, 2,   1,   304, 305, 997, 269, 414,  362, 977, 364};

// `peer_error`: the relative RMS error of another implementation that quantises activations to int8
// too (summary.json). We allow 5 % more; float weights have a bound of their own.
struct GoldenModel {
  std::string name;
  double peer_error;
  double bound() const { return std::max(1.05 * peer_error, 1e-4); }
};

inline const GoldenModel kGoldenModels[] = {{"demo2-F32", 0},
                                            {"demo2-f16", 0},
                                            {"demo2-BF16", 0},
                                            {"demo2-Q4_0", 0.0078498},
                                            {"demo2-Q4_1", 0.00686},
                                            {"demo2-Q5_0", 0.0071704},
                                            {"demo2-Q5_1", 0.0063309},
                                            {"demo2-Q8_0", 0.0065046},
                                            {"demo2-Q2_K", 0.0165547},
                                            {"demo2-Q3_K_S", 0.0148262},
                                            {"demo2-Q4_K_S", 0.0057891},
                                            {"demo2-Q5_K_S", 0.0065395},
                                            {"demo2-Q6_K", 0.0058749},
                                            {"demo-Q4_K_M", 0.0050051}};

// Names of parametrised tests have no dashes.
inline std::string GoldenTestName(std::string model) {
  std::replace(model.begin(), model.end(), '-', '_');
  return model;
}

// float32 [kGoldenTokens][vocab] of tests/data/golden below `data`; empty if there is no such file.
inline std::vector<float> GoldenLogits(const std::string& data, const std::string& model) {
  std::ifstream file(data + "/golden/" + model + ".logits.f32", std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  std::vector<float> values(bytes.size() / sizeof(float));
  std::memcpy(values.data(), bytes.data(), values.size() * sizeof(float));
  return values;
}

// The backend's logits of the sequence, run in chunks of `chunk` tokens; empty after a failure.
inline std::vector<float> RunGolden(Backend& backend, const std::string& data,
                                    const std::string& model, int chunk) {
  auto runner =
      ModelRunner::Open(backend, data + "/" + model + ".gguf", kGoldenTokens, kGoldenTokens);
  if (!runner.ok()) {
    ADD_FAILURE() << runner.status();
    return {};
  }
  std::vector<float> logits;
  for (int start = 0; start < kGoldenTokens; start += chunk) {
    const auto part = (*runner)->Run(
        std::span(kGoldenSequence).subspan(start, std::min(chunk, kGoldenTokens - start)));
    if (!part.ok()) {
      ADD_FAILURE() << part.status();
      return {};
    }
    logits.insert(logits.end(), part->begin(), part->end());
  }
  return logits;
}

}  // namespace stagecoach

#endif  // STAGECOACH_KERNELS_GOLDEN_FIXTURE_H_
