// Whole models on the CUDA backend against logits computed in float64 (tests/data/golden), and the
// numerics contract: the same bits whatever the chunking, with and without graphs.
#include <algorithm>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/compare.h"
#include "kernels/cuda/cuda_test.h"
#include "kernels/model_runner.h"

namespace stagecoach {
namespace {

constexpr int kTokens = 48;
constexpr int32_t kSequence[kTokens] = {
    1,   304, 305, 997,  393, 424, 969, 989, 422, 261, 314, 362, 1001, 364, 305, 997,
    393, 424, 969, 1006, 356, 261, 980, 261, 717, 474, 260, 424, 268,  977, 355, 974,
    983, 330, 366, 261,  474, 977, 2,   1,   304, 305, 997, 269, 414,  362, 977, 364};

// `peer_error`: the relative RMS error of another implementation that quantises activations to int8
// too (summary.json). We allow 5 % more; float weights have a bound of their own.
struct GoldenModel {
  std::string name;
  double peer_error;
};
constexpr double kFloatError = 1e-4;

std::vector<float> ReadFloats(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  std::vector<float> values(bytes.size() / sizeof(float));
  std::memcpy(values.data(), bytes.data(), values.size() * sizeof(float));
  return values;
}

// The logits of the sequence, run in chunks of `chunk` tokens.
std::vector<float> Logits(Backend& backend, const std::string& name, int chunk) {
  auto runner = ModelRunner::Open(backend, TestDataPath(name + ".gguf"), kTokens, kTokens);
  if (!runner.ok()) {
    ADD_FAILURE() << runner.status();
    return {};
  }
  std::vector<float> logits;
  for (int start = 0; start < kTokens; start += chunk) {
    const auto part =
        (*runner)->Run(std::span(kSequence).subspan(start, std::min(chunk, kTokens - start)));
    if (!part.ok()) {
      ADD_FAILURE() << part.status();
      return {};
    }
    logits.insert(logits.end(), part->begin(), part->end());
  }
  return logits;
}

class CudaGolden : public CudaTest, public testing::WithParamInterface<GoldenModel> {};

TEST_P(CudaGolden, AccuracyAndBits) {
  const GoldenModel& model = GetParam();
  const std::vector<float> expected =
      ReadFloats(TestDataPath("golden/" + model.name + ".logits.f32"));
  ASSERT_EQ(expected.size() % kTokens, 0u);
  const std::vector<float> whole = Logits(*backend_, model.name, kTokens);
  const Comparison comparison = Compare(whole, expected);
  const double bound = std::max(1.05 * model.peer_error, kFloatError);
  printf("%s: relative RMS error %.7f, peer %.7f\n", model.name.c_str(), comparison.relative_rms,
         model.peer_error);
  EXPECT_TRUE(comparison.Within(bound)) << ToString(comparison) << ", bound " << bound;

  EXPECT_TRUE(SameBits(Logits(*backend_, model.name, 1), whole)) << "chunks of 1";
  EXPECT_TRUE(SameBits(Logits(*backend_, model.name, 7), whole)) << "chunks of 7";
  const auto eager = MakeCudaBackend({.graphs = false});
  ASSERT_TRUE(eager.ok()) << eager.status();
  EXPECT_TRUE(SameBits(Logits(**eager, model.name, 1), whole)) << "without graphs";
}

INSTANTIATE_TEST_SUITE_P(
    EveryType, CudaGolden,
    testing::Values(GoldenModel{"demo2-F32", 0}, GoldenModel{"demo2-f16", 0},
                    GoldenModel{"demo2-BF16", 0}, GoldenModel{"demo2-Q4_0", 0.0078498},
                    GoldenModel{"demo2-Q4_1", 0.00686}, GoldenModel{"demo2-Q5_0", 0.0071704},
                    GoldenModel{"demo2-Q5_1", 0.0063309}, GoldenModel{"demo2-Q8_0", 0.0065046},
                    GoldenModel{"demo2-Q2_K", 0.0165547}, GoldenModel{"demo2-Q3_K_S", 0.0148262},
                    GoldenModel{"demo2-Q4_K_S", 0.0057891}, GoldenModel{"demo2-Q5_K_S", 0.0065395},
                    GoldenModel{"demo2-Q6_K", 0.0058749}, GoldenModel{"demo-Q4_K_M", 0.0050051}),
    [](const auto& test) {
      std::string name = test.param.name;
      std::replace(name.begin(), name.end(), '-', '_');
      return name;
    });

}  // namespace
}  // namespace stagecoach
