// The reference backend and the block decoders against logits computed by another program in
// float64 (tests/data/golden). Everything else is tested against the reference.
#include <algorithm>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/compare.h"
#include "kernels/model_runner.h"
#include "kernels/reference/reference_backend.h"

namespace stagecoach {
namespace {

constexpr int kTokens = 48;
constexpr int32_t kSequence[kTokens] = {
    1,   304, 305, 997,  393, 424, 969, 989, 422, 261, 314, 362, 1001, 364, 305, 997,
    393, 424, 969, 1006, 356, 261, 980, 261, 717, 474, 260, 424, 268,  977, 355, 974,
    983, 330, 366, 261,  474, 977, 2,   1,   304, 305, 997, 269, 414,  362, 977, 364};

std::string DataPath(const std::string& name) {
  return std::string(STAGECOACH_SOURCE_DIR) + "/tests/data/" + name;
}

std::vector<float> ReadFloats(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  std::vector<float> values(bytes.size() / sizeof(float));
  std::memcpy(values.data(), bytes.data(), values.size() * sizeof(float));
  return values;
}

class ReferenceGolden : public testing::TestWithParam<std::string> {};

TEST_P(ReferenceGolden, LogitsOfEveryPosition) {
  const std::vector<float> expected = ReadFloats(DataPath("golden/" + GetParam() + ".logits.f32"));
  ASSERT_FALSE(expected.empty());
  const std::unique_ptr<Backend> backend = MakeReferenceBackend();
  auto runner = ModelRunner::Open(*backend, DataPath(GetParam() + ".gguf"), kTokens, kTokens);
  ASSERT_TRUE(runner.ok()) << runner.status();

  const auto whole = (*runner)->Run(kSequence);
  ASSERT_TRUE(whole.ok()) << whole.status();
  const Comparison comparison = Compare(*whole, expected);
  RecordProperty("comparison", ToString(comparison));
  EXPECT_TRUE(comparison.Within(1e-6)) << ToString(comparison);

  (*runner)->Reset();
  std::vector<float> chunked;
  for (int start = 0, size = 1; start < kTokens; start += size, size = 7) {
    const auto part =
        (*runner)->Run(std::span(kSequence).subspan(start, std::min(size, kTokens - start)));
    ASSERT_TRUE(part.ok()) << part.status();
    chunked.insert(chunked.end(), part->begin(), part->end());
  }
  EXPECT_TRUE(SameBits(chunked, *whole));
}

INSTANTIATE_TEST_SUITE_P(EveryType, ReferenceGolden,
                         testing::Values("demo2-F32", "demo2-f16", "demo2-BF16", "demo2-Q4_0",
                                         "demo2-Q4_1", "demo2-Q5_0", "demo2-Q5_1", "demo2-Q8_0",
                                         "demo2-Q2_K", "demo2-Q3_K_S", "demo2-Q4_K_S",
                                         "demo2-Q5_K_S", "demo2-Q6_K", "demo-Q4_K_M"),
                         [](const auto& test) {
                           std::string name = test.param;
                           for (char& c : name) {
                             if (c == '-') c = '_';
                           }
                           return name;
                         });

}  // namespace
}  // namespace stagecoach
