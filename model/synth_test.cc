#include "model/synth.h"

#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/dequantize.h"
#include "model/model_file.h"
#include "model/random_blocks.h"

namespace stagecoach {
namespace {

using ::testing::HasSubstr;

std::string PathOf(const std::string& name) {
  return ::testing::TempDir() + "synth." + std::to_string(::getpid()) + "." + name + ".gguf";
}

std::string ReadAll(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

class SynthTypesTest : public ::testing::TestWithParam<std::string_view> {};

TEST_P(SynthTypesTest, WritesAModelThatOpens) {
  const std::string types(GetParam());
  const std::string path = PathOf(types);
  const absl::Status status = WriteSyntheticModel(path, {.shape = "tiny", .types = types});
  ASSERT_TRUE(status.ok()) << status;
  const auto model = ModelFile::Open(path);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_TRUE((*model)->unused_tensors().empty());
  EXPECT_EQ((*model)->params().layers, 2);
  const std::optional<TensorType> type = ParseTensorType(types);
  uint64_t end = (*model)->gguf().data_offset();
  for (const TensorInfo& tensor : (*model)->gguf().tensors()) {
    EXPECT_EQ(tensor.offset, end) << tensor.name << " follows the one before it";
    end = (tensor.offset + tensor.bytes + 31) / 32 * 32;
    if (type && tensor.dims.size() == 2) {
      EXPECT_EQ(tensor.type, *type) << tensor.name;
    }
  }
  EXPECT_EQ(std::filesystem::file_size(path), end);
  EXPECT_FALSE(std::filesystem::exists(path + ".partial"));
  std::filesystem::remove(path);
}

INSTANTIATE_TEST_SUITE_P(All, SynthTypesTest, ::testing::ValuesIn(SynthTypeNames()),
                         [](const auto& info) { return std::string(info.param); });

TEST(SynthTest, SameSpecSameBytesOtherSeedOtherBytes) {
  const std::string a = PathOf("a"), b = PathOf("b"), c = PathOf("c");
  ASSERT_TRUE(WriteSyntheticModel(a, {.seed = 7}).ok());
  ASSERT_TRUE(WriteSyntheticModel(b, {.seed = 7}).ok());
  ASSERT_TRUE(WriteSyntheticModel(c, {.seed = 8}).ok());
  EXPECT_EQ(ReadAll(a), ReadAll(b));
  EXPECT_NE(ReadAll(a), ReadAll(c));
  EXPECT_EQ(ReadAll(a).size(), ReadAll(c).size());
  for (const std::string& path : {a, b, c}) std::filesystem::remove(path);
}

TEST(SynthTest, RowsThatKQuantsDoNotFitFallBack) {
  const std::string path = PathOf("smollm");
  ASSERT_TRUE(WriteSyntheticModel(path, {.shape = "SmolLM-135M", .types = "Q4_K_M"}).ok());
  const auto model = ModelFile::Open(path);
  ASSERT_TRUE(model.ok()) << model.status();
  const GgufFile& gguf = (*model)->gguf();
  EXPECT_TRUE((*model)->params().tied_embeddings);
  EXPECT_EQ(gguf.FindTensor("token_embd.weight")->type, TensorType::kQ8_0);  // Q6_K, 576 columns
  EXPECT_EQ(gguf.FindTensor("blk.0.attn_q.weight")->type, TensorType::kQ5_0);
  EXPECT_EQ(gguf.FindTensor("blk.0.ffn_down.weight")->type, TensorType::kQ6_K);  // 1536 columns
  EXPECT_EQ(gguf.FindTensor("blk.3.ffn_down.weight")->type, TensorType::kQ4_K);
  std::filesystem::remove(path);
}

TEST(SynthTest, Llama3ShapeHasRopeFactors) {
  // The shape of Llama 3.2 1B in its smallest type; it is removed at once.
  const std::string path = PathOf("llama3");
  ASSERT_TRUE(WriteSyntheticModel(path, {.shape = "llama3.2-1b", .types = "q2_k"}).ok());
  const auto model = ModelFile::Open(path);
  std::filesystem::remove(path);
  ASSERT_TRUE(model.ok()) << model.status();
  const std::vector<float>& factors = (*model)->params().rope_freq_factors;
  ASSERT_EQ(factors.size(), 32u);
  EXPECT_FLOAT_EQ(factors.front(), 1.0f);
  EXPECT_FLOAT_EQ(factors.back(), 32.0f);
  EXPECT_TRUE(std::is_sorted(factors.begin(), factors.end()));
}

TEST(SynthTest, UnknownNamesAreRefusedWithTheList) {
  const absl::Status shape = WriteSyntheticModel(PathOf("x"), {.shape = "gpt-5"});
  EXPECT_TRUE(absl::IsInvalidArgument(shape));
  EXPECT_THAT(std::string(shape.message()), HasSubstr("llama3-8b"));
  const absl::Status types = WriteSyntheticModel(PathOf("x"), {.types = "q9"});
  EXPECT_THAT(std::string(types.message()), HasSubstr("q4_k_m"));
  EXPECT_TRUE(absl::IsNotFound(WriteSyntheticModel("/nonexistent/x.gguf", {})));
}

TEST(SynthTest, VocabularyIsUnique) {
  const std::string path = PathOf("vocab");
  ASSERT_TRUE(WriteSyntheticModel(path, {.shape = "smollm-135m", .types = "q2_k"}).ok());
  const auto model = ModelFile::Open(path);
  std::filesystem::remove(path);
  ASSERT_TRUE(model.ok()) << model.status();
  const auto tokens = (*model)->gguf().StringArray("tokenizer.ggml.tokens");
  ASSERT_TRUE(tokens.ok() && *tokens != nullptr);
  EXPECT_EQ(std::set<std::string>((*tokens)->begin(), (*tokens)->end()).size(), 49152u);
}

class RandomBlocksTest : public ::testing::TestWithParam<TensorTypeInfo> {};

TEST_P(RandomBlocksTest, HaveTheMomentsAskedFor) {
  const TensorTypeInfo& info = GetParam();
  constexpr size_t kElements = 1 << 20;
  constexpr float kDeviation = 0.0156f;  // 1 / sqrt(4096)
  FastRandom random(3);
  const std::vector<std::byte> raw =
      MakeRandomBlocks(info.type, kElements / info.block_elements, kDeviation, random);
  ASSERT_TRUE(FiniteScales(info.type, raw).ok());
  std::vector<float> values(kElements);
  ASSERT_TRUE(DequantizeRow(info.type, raw, values).ok());
  double sum = 0, squares = 0;
  for (const float value : values) {
    sum += value;
    squares += static_cast<double>(value) * value;
  }
  const double mean = sum / kElements;
  const double deviation = std::sqrt(squares / kElements);
  EXPECT_LT(std::fabs(mean), 0.01 * kDeviation);
  EXPECT_GT(deviation, 0.9 * kDeviation);
  EXPECT_LT(deviation, 1.1 * kDeviation);
}

INSTANTIATE_TEST_SUITE_P(All, RandomBlocksTest, ::testing::ValuesIn(AllTensorTypes()),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace stagecoach
