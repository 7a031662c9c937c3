// Whole models on the CUDA backend against logits computed in float64 (tests/data/golden), and the
// numerics contract: the same bits whatever the chunking, with and without graphs.
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/compare.h"
#include "kernels/cuda/cuda_test.h"
#include "kernels/golden_fixture.h"
#include "model/test_paths.h"

namespace stagecoach {
namespace {

class CudaGolden : public CudaTest, public testing::WithParamInterface<GoldenModel> {};

TEST_P(CudaGolden, AccuracyAndBits) {
  const GoldenModel& model = GetParam();
  const std::string data = TestDataPath("");
  const std::vector<float> expected = GoldenLogits(data, model.name);
  ASSERT_FALSE(expected.empty());
  ASSERT_EQ(expected.size() % kGoldenTokens, 0u);
  const std::vector<float> whole = RunGolden(*backend_, data, model.name, kGoldenTokens);
  const Comparison comparison = Compare(whole, expected);
  printf("%s: relative RMS error %.7f, peer %.7f\n", model.name.c_str(), comparison.relative_rms,
         model.peer_error);
  EXPECT_TRUE(comparison.Within(model.bound()))
      << ToString(comparison) << ", bound " << model.bound();

  EXPECT_TRUE(SameBits(RunGolden(*backend_, data, model.name, 1), whole)) << "chunks of 1";
  EXPECT_TRUE(SameBits(RunGolden(*backend_, data, model.name, 7), whole)) << "chunks of 7";
  const auto eager = MakeCudaBackend({.graphs = false});
  ASSERT_TRUE(eager.ok()) << eager.status();
  EXPECT_TRUE(SameBits(RunGolden(**eager, data, model.name, 1), whole)) << "without graphs";
}

INSTANTIATE_TEST_SUITE_P(EveryType, CudaGolden, testing::ValuesIn(kGoldenModels),
                         [](const auto& test) { return GoldenTestName(test.param.name); });

}  // namespace
}  // namespace stagecoach
