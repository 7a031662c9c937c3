// Whole models on the CPU backend against logits computed in float64 (tests/data/golden), and the
// numerics contract: the same bits whatever the chunking, thread count and instruction set.
#include <memory>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/compare.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/golden_fixture.h"
#include "model/test_paths.h"

namespace stagecoach {
namespace {

const std::string kData = TestDataPath("");

std::vector<float> Logits(const std::string& name, const CpuOptions& options, int chunk) {
  return RunGolden(*MakeCpuBackend(options), kData, name, chunk);
}

class CpuGolden : public testing::TestWithParam<GoldenModel> {};

TEST_P(CpuGolden, AccuracyAndBits) {
  const GoldenModel& model = GetParam();
  const std::vector<float> expected = GoldenLogits(kData, model.name);
  ASSERT_FALSE(expected.empty());
  ASSERT_EQ(expected.size() % kGoldenTokens, 0u);
  const std::vector<float> whole = Logits(model.name, {.threads = 1}, kGoldenTokens);
  const Comparison comparison = Compare(whole, expected);
  printf("%s: relative RMS error %.7f, peer %.7f\n", model.name.c_str(), comparison.relative_rms,
         model.peer_error);
  EXPECT_TRUE(comparison.Within(model.bound()))
      << ToString(comparison) << ", bound " << model.bound();

  EXPECT_TRUE(SameBits(Logits(model.name, {.threads = 1}, 1), whole)) << "chunks of 1";
  EXPECT_TRUE(SameBits(Logits(model.name, {.threads = 3}, 7), whole)) << "3 threads, chunks of 7";
  EXPECT_TRUE(SameBits(Logits(model.name, {.threads = 2, .isa = "portable"}, 33), whole))
      << "portable";
  EXPECT_TRUE(SameBits(Logits(model.name, {.threads = 1, .isa = "avx2"}, 20), whole)) << "AVX2";
}

INSTANTIATE_TEST_SUITE_P(EveryType, CpuGolden, testing::ValuesIn(kGoldenModels),
                         [](const auto& test) { return GoldenTestName(test.param.name); });

}  // namespace
}  // namespace stagecoach
