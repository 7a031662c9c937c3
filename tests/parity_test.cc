// Parity with the truth: logits computed in float64 from the dequantised tensors, perplexities and
// greedy continuations, all made by other programs and kept in tests/data/golden.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "model/test_paths.h"
#include "tests/stage_chain.h"

namespace stagecoach {
namespace {

// How much worse than llama.cpp's own error (activation quantisation) ours may be.
constexpr double kErrorRatio = 1.05;
constexpr double kFloatTypeError = 1e-4;
constexpr double kDecisiveMargin = 0.25;
constexpr double kPerplexityTolerance = 1e-3;

const nlohmann::json& Summary() {
  static const nlohmann::json summary =
      nlohmann::json::parse(ReadTestFile(TestDataPath("golden/summary.json")));
  return summary;
}

double RelativeRmsError(const std::vector<float>& got, const std::vector<float>& want) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double difference = static_cast<double>(got[i]) - want[i];
    error += difference * difference;
    norm += static_cast<double>(want[i]) * want[i];
  }
  return std::sqrt(error / norm);
}

std::vector<std::string> GoldenModels() {
  std::vector<std::string> names = {"demo-Q4_K_M"};
  for (const char* type : {"F32", "f16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K",
                           "Q3_K_S", "Q4_K_S", "Q5_K_S", "Q6_K"}) {
    names.push_back(std::string("demo2-") + type);
  }
  return names;
}

class LogitsParityTest : public testing::TestWithParam<std::string> {};

TEST_P(LogitsParityTest, ErrorIsNotWorseThanLlamaCpp) {
  const std::string& name = GetParam();
  auto chain = StageChain::Create(TestDataPath(name + ".gguf"), {.stages = 2});
  ASSERT_TRUE(chain.ok()) << chain.status();
  const TokenList sequence = Summary()["sequence"];
  auto logits = (*chain)->Logits({sequence}, 64);
  ASSERT_TRUE(logits.ok()) << logits.status();
  const std::vector<float> golden = ReadFloats(TestDataPath("golden/" + name + ".logits.f32"));
  ASSERT_EQ(golden.size(), (*logits)[0].size());
  ASSERT_EQ(golden.size(), sequence.size() * 1024);

  const double peer = Summary()["models"][name]["relative_rms_error_of_llama_cpp"];
  const bool is_float = name == "demo2-F32" || name == "demo2-f16" || name == "demo2-BF16";
  const double bound = is_float ? kFloatTypeError : kErrorRatio * peer;
  const double error = RelativeRmsError((*logits)[0], golden);
  std::printf("%-14s relative RMS error %.3e, llama.cpp %.3e, bound %.3e\n", name.c_str(), error,
              peer, bound);
  if (!(error <= bound)) ADD_FAILURE() << name << ": " << error << " > " << bound;
}

INSTANTIATE_TEST_SUITE_P(AllTypes, LogitsParityTest, testing::ValuesIn(GoldenModels()),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

TEST(GreedyParityTest, SameChoiceWhereverTheMarginIsDecisive) {
  auto chain = StageChain::Create(TestDataPath("demo-Q4_K_M.gguf"), {.stages = 2});
  ASSERT_TRUE(chain.ok()) << chain.status();
  const std::string lines = ReadTestFile(TestDataPath("golden/demo-Q4_K_M.greedy.jsonl"));
  int compared = 0;
  for (size_t start = 0, end; (end = lines.find('\n', start)) != std::string::npos;
       start = end + 1) {
    const auto golden = nlohmann::json::parse(lines.substr(start, end - start));
    const TokenList prompt = golden["prompt_tokens"];
    const TokenList continuation = golden["continuation"];
    const std::vector<double> margin = golden["margin"];
    TokenList all = prompt;
    all.insert(all.end(), continuation.begin(), continuation.end());
    auto logits = (*chain)->Logits({all}, 64);
    ASSERT_TRUE(logits.ok()) << logits.status();
    for (size_t i = 0; i < continuation.size(); ++i) {
      if (margin[i] < kDecisiveMargin) continue;
      const auto row =
          (*logits)[0].begin() + static_cast<std::ptrdiff_t>((prompt.size() + i - 1) * 1024);
      const auto choice = std::max_element(row, row + 1024) - row;
      EXPECT_EQ(choice, continuation[i]) << golden["prompt"] << " step " << i;
      ++compared;
    }
  }
  EXPECT_GT(compared, 400);
}

TEST(PerplexityParityTest, WithinATenthOfAPercent) {
  auto chain = StageChain::Create(TestDataPath("demo-Q4_K_M.gguf"), {.stages = 2});
  ASSERT_TRUE(chain.ok()) << chain.status();
  const auto documents =
      nlohmann::json::parse(ReadTestFile(TestDataPath("golden/valid_tokens.json")))
          .get<std::vector<TokenList>>();
  double log_probability = 0;
  size_t positions = 0;
  for (const TokenList& tokens : documents) {
    auto logits = (*chain)->Logits({tokens}, 64);
    ASSERT_TRUE(logits.ok()) << logits.status();
    for (size_t i = 0; i + 1 < tokens.size(); ++i) {
      const float* row = (*logits)[0].data() + i * 1024;
      const double max = *std::max_element(row, row + 1024);
      double sum = 0;
      for (int v = 0; v < 1024; ++v) sum += std::exp(row[v] - max);
      log_probability += row[tokens[i + 1]] - max - std::log(sum);
      ++positions;
    }
  }
  const double perplexity = std::exp(-log_probability / static_cast<double>(positions));
  const double exact = Summary()["models"]["demo-Q4_K_M"]["perplexity_exact"];
  std::printf("perplexity %.6f, exact %.6f\n", perplexity, exact);
  EXPECT_NEAR(perplexity / exact, 1.0, kPerplexityTolerance);
}

}  // namespace
}  // namespace stagecoach
