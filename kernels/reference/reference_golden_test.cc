// The reference backend and the block decoders against logits computed by another program in
// float64 (tests/data/golden). Everything else is tested against the reference.
#include <memory>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/compare.h"
#include "kernels/golden_fixture.h"
#include "kernels/reference/reference_backend.h"
#include "model/test_paths.h"

namespace stagecoach {
namespace {

const std::string kData = TestDataPath("");

class ReferenceGolden : public testing::TestWithParam<GoldenModel> {};

TEST_P(ReferenceGolden, LogitsOfEveryPosition) {
  const std::vector<float> expected = GoldenLogits(kData, GetParam().name);
  ASSERT_FALSE(expected.empty());
  const std::unique_ptr<Backend> backend = MakeReferenceBackend();
  const std::vector<float> whole = RunGolden(*backend, kData, GetParam().name, kGoldenTokens);
  const Comparison comparison = Compare(whole, expected);
  RecordProperty("comparison", ToString(comparison));
  EXPECT_TRUE(comparison.Within(1e-6)) << ToString(comparison);

  EXPECT_TRUE(SameBits(RunGolden(*backend, kData, GetParam().name, 1), whole)) << "chunks of 1";
  EXPECT_TRUE(SameBits(RunGolden(*backend, kData, GetParam().name, 7), whole)) << "chunks of 7";
}

INSTANTIATE_TEST_SUITE_P(EveryType, ReferenceGolden, testing::ValuesIn(kGoldenModels),
                         [](const auto& test) { return GoldenTestName(test.param.name); });

}  // namespace
}  // namespace stagecoach
