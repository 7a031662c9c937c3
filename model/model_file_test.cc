#include "model/model_file.h"

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/faulty_file.h"
#include "model/gguf_image.h"
#include "model/model_error.h"
#include "model/test_paths.h"

namespace stagecoach {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

using ModelOr = absl::StatusOr<std::shared_ptr<const ModelFile>>;

ModelOr OpenImage(const GgufImage& image, FaultPlan plan = {}) {
  std::vector<std::unique_ptr<RandomAccessFile>> files;
  files.push_back(
      std::make_unique<FaultyFile>(MakeMemoryFile("test.gguf", image.Bytes()), std::move(plan)));
  return ModelFile::FromFiles(std::move(files));
}

std::vector<TensorRole> Roles(const ModelFile& model, const Unit& unit) {
  std::vector<TensorRole> roles;
  for (const UnitTensor& tensor : model.UnitTensors(unit)) roles.push_back(tensor.role);
  return roles;
}

constexpr Unit kEmbedding{Unit::Kind::kEmbedding};
constexpr Unit kHead{Unit::Kind::kHead};

TEST(ModelFileTest, OpensTheDemoModel) {
  const ModelOr model = ModelFile::Open(TestDataPath("demo-Q4_K_M.gguf"));
  ASSERT_TRUE(model.ok()) << model.status();
  const ModelParams& params = (*model)->params();
  EXPECT_EQ(params.layers, 32);
  EXPECT_EQ(params.d_model, 256);
  EXPECT_EQ(params.heads, 4);
  EXPECT_EQ(params.kv_heads, 2);
  EXPECT_EQ(params.key_length, 64);
  EXPECT_EQ(params.value_length, 64);
  EXPECT_EQ(params.rope_dims, 64);
  EXPECT_EQ(params.ffn_length, 512);
  EXPECT_EQ(params.vocab_size, 1024);
  EXPECT_EQ(params.context_length, 1024);
  EXPECT_FALSE(params.tied_embeddings);
  EXPECT_TRUE(params.rope_freq_factors.empty());
  EXPECT_TRUE((*model)->unused_tensors().empty());
  uint64_t unit_bytes = 0, tensor_bytes = 0;
  for (const Unit& unit : StageUnits(params, 0, params.layers)) {
    unit_bytes += (*model)->UnitBytes(unit);
  }
  for (const TensorInfo& tensor : (*model)->gguf().tensors()) tensor_bytes += tensor.bytes;
  EXPECT_EQ(unit_bytes, tensor_bytes);
  EXPECT_TRUE((*model)->CheckUnchanged().ok());
}

TEST(ModelFileTest, UnitsHoldTheirTensorsInOrderOfUse) {
  const ModelOr model = OpenImage(TinyLlamaImage());
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_THAT(Roles(**model, kEmbedding), ElementsAre(TensorRole::kTokenEmbedding));
  EXPECT_THAT(Roles(**model, kHead), ElementsAre(TensorRole::kOutputNorm, TensorRole::kOutput));
  const Unit layer{Unit::Kind::kLayer, 1};
  EXPECT_THAT(Roles(**model, layer),
              ElementsAre(TensorRole::kAttnNorm, TensorRole::kAttnQ, TensorRole::kAttnK,
                          TensorRole::kAttnV, TensorRole::kAttnOutput, TensorRole::kFfnNorm,
                          TensorRole::kFfnGate, TensorRole::kFfnUp, TensorRole::kFfnDown));
  EXPECT_EQ((*model)->UnitTensors(layer)[8].tensor->name, "blk.1.ffn_down.weight");
}

TEST(ModelFileTest, BiasesAreOptional) {
  GgufImage image = TinyLlamaImage();
  image.AddF32("blk.1.attn_q.bias", {8});
  image.AddF32("blk.1.attn_v.bias", {4});
  const ModelOr model = OpenImage(image);
  ASSERT_TRUE(model.ok()) << model.status();
  const std::vector<TensorRole> roles = Roles(**model, {Unit::Kind::kLayer, 1});
  EXPECT_THAT(roles, ::testing::IsSupersetOf({TensorRole::kAttnQBias, TensorRole::kAttnVBias}));
  EXPECT_EQ(roles.size(), 11u);
  EXPECT_EQ(Roles(**model, {Unit::Kind::kLayer, 0}).size(), 9u);
  image.tensor("blk.1.attn_q.bias").dims = {4};
  EXPECT_EQ(GetModelError(OpenImage(image).status()), ModelError::kShapeMismatch);
}

TEST(ModelFileTest, TiedEmbeddingsServeAsTheHead) {
  GgufImage image = TinyLlamaImage();
  image.RemoveTensor("output.weight");
  const ModelOr model = OpenImage(image);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_TRUE((*model)->params().tied_embeddings);
  ASSERT_THAT(Roles(**model, kHead), ElementsAre(TensorRole::kOutputNorm, TensorRole::kOutput));
  EXPECT_EQ((*model)->UnitTensors(kHead)[1].tensor, (*model)->UnitTensors(kEmbedding)[0].tensor);
}

TEST(ModelFileTest, DefaultsOfOptionalKeys) {
  GgufImage image = TinyLlamaImage();
  image.RemoveKey("llama.rope.dimension_count");
  image.RemoveKey("llama.rope.freq_base");
  image.RemoveKey("llama.vocab_size");
  ModelOr model = OpenImage(image);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ((*model)->params().rope_dims, 4);
  EXPECT_EQ((*model)->params().rope_freq_base, 10000.0f);
  EXPECT_EQ((*model)->params().rope_freq_scale, 1.0f);
  EXPECT_EQ((*model)->params().vocab_size, 4) << "from the tokens";
  image.RemoveKey("tokenizer.ggml.tokens");
  model = OpenImage(image);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ((*model)->params().vocab_size, 4) << "from the embedding";
  image.RemoveKey("llama.attention.head_count_kv");
  const absl::Status status = OpenImage(image).status();
  EXPECT_EQ(GetModelError(status), ModelError::kShapeMismatch) << "as many KV heads as heads";
  EXPECT_THAT(std::string(status.message()), HasSubstr("'blk.0.attn_k.weight'"));
}

TEST(ModelFileTest, HeadLengthsMayDifferFromTheQuotient) {
  GgufImage image = TinyLlamaImage();
  image.SetU32("llama.attention.key_length", 6);
  image.SetU32("llama.attention.value_length", 2);
  for (const std::string layer : {"blk.0.", "blk.1."}) {
    image.RemoveTensor(layer + "attn_q.weight");
    image.AddF32(layer + "attn_q.weight", {8, 12});
    image.RemoveTensor(layer + "attn_k.weight");
    image.AddF32(layer + "attn_k.weight", {8, 6});
    image.tensor(layer + "attn_v.weight").dims = {8, 2};
    image.tensor(layer + "attn_output.weight").dims = {4, 8};
  }
  const ModelOr model = OpenImage(image);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ((*model)->params().key_length, 6);
  EXPECT_EQ((*model)->params().value_length, 2);
  EXPECT_EQ((*model)->params().rope_dims, 4);
}

TEST(ModelFileTest, RopeScaling) {
  GgufImage image = TinyLlamaImage();
  image.SetF32("llama.rope.scale_linear", 2.0f);
  EXPECT_EQ(OpenImage(image).value()->params().rope_freq_scale, 0.5f);
  image.SetF32("llama.rope.scaling.factor", 4.0f);
  EXPECT_EQ(OpenImage(image).value()->params().rope_freq_scale, 0.25f) << "the newer key wins";
  image.SetString("llama.rope.scaling.type", "linear");
  EXPECT_EQ(OpenImage(image).value()->params().rope_freq_scale, 0.25f);
  image.SetString("llama.rope.scaling.type", "none");
  EXPECT_EQ(OpenImage(image).value()->params().rope_freq_scale, 1.0f);
}

TEST(ModelFileTest, RopeFactorsAreReadFromTheirTensor) {
  GgufImage image = TinyLlamaImage();
  image.AddF32("rope_freqs.weight", {2});
  const uint64_t offset = image.tensors.back().offset;
  image.data.replace(offset, 8, RawF32(1) + RawF32(32));
  const ModelOr model = OpenImage(image, {.max_chunk = 7});
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_THAT((*model)->params().rope_freq_factors, ElementsAre(1.0f, 32.0f));
  EXPECT_TRUE((*model)->unused_tensors().empty());
  const uint64_t place = image.Bytes().size() - image.data.size() + offset;
  EXPECT_EQ(GetModelError(OpenImage(image, {.bad_begin = place, .bad_end = place + 1}).status()),
            ModelError::kIo);
}

TEST(ModelFileTest, TensorsOfNoUseAreListed) {
  GgufImage image = TinyLlamaImage();
  image.AddF32("blk.99.attn_q.weight", {8, 8});
  image.AddF32("adapter", {1});
  const ModelOr model = OpenImage(image);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_THAT((*model)->unused_tensors(), ElementsAre("adapter", "blk.99.attn_q.weight"));
}

TEST(ModelFileTest, HashTellsModelsApart) {
  GgufImage image = TinyLlamaImage();
  const std::string hash = OpenImage(image).value()->hash();
  EXPECT_EQ(hash.size(), 32u);
  EXPECT_EQ(OpenImage(image).value()->hash(), hash);
  image.data += "x";
  EXPECT_NE(OpenImage(image).value()->hash(), hash) << "another size";
  image = TinyLlamaImage();
  image.SetF32("llama.rope.freq_base", 20000.0f);
  EXPECT_NE(OpenImage(image).value()->hash(), hash) << "another header";
}

TEST(StageUnitsTest, FirstHasTheEmbeddingAndLastTheHead) {
  const ModelParams params{.layers = 3};
  const Unit layers[] = {{Unit::Kind::kLayer, 0}, {Unit::Kind::kLayer, 1}, {Unit::Kind::kLayer, 2}};
  EXPECT_THAT(StageUnits(params, 0, 3),
              ElementsAre(kEmbedding, layers[0], layers[1], layers[2], kHead));
  EXPECT_THAT(StageUnits(params, 0, 1), ElementsAre(kEmbedding, layers[0]));
  EXPECT_THAT(StageUnits(params, 1, 2), ElementsAre(layers[1]));
  EXPECT_THAT(StageUnits(params, 2, 3), ElementsAre(layers[2], kHead));
  EXPECT_EQ(UnitName(kEmbedding), "embedding");
  EXPECT_EQ(UnitName(layers[2]), "layer 2");
  EXPECT_EQ(UnitName(kHead), "head");
  EXPECT_EQ(TensorRoleName(TensorRole::kTokenEmbedding), "token_embedding");
  EXPECT_EQ(TensorRoleName(TensorRole::kFfnDown), "ffn_down");
}

// A folder of its own for files on disk.
class ModelFileOnDiskTest : public ::testing::Test {
 protected:
  void SetUp() override { std::filesystem::create_directories(folder_); }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::string Write(const std::string& name, const std::string& bytes) {
    const std::string path = folder_ / name;
    std::ofstream(path, std::ios::binary) << bytes;
    return path;
  }

  // The tiny model in `count` parts, all tensors but those of the first part's in the last.
  std::vector<std::string> WriteParts(int count) {
    std::vector<GgufImage> parts(count);
    parts[0] = TinyLlamaImage();
    const auto total = static_cast<uint32_t>(parts[0].tensors.size());
    for (const std::string name : {"output.weight", "output_norm.weight"}) {
      const std::vector<uint64_t> dims = parts[0].tensor(name).dims;
      parts[0].RemoveTensor(name);
      parts.back().AddF32(name, dims);
    }
    std::vector<std::string> paths;
    for (int i = 0; i < count; ++i) {
      parts[i].SetU32("split.no", i);
      parts[i].SetU32("split.count", count);
      parts[i].SetU32("split.tensors.count", total);
      char name[64];
      std::snprintf(name, sizeof(name), "tiny-%05d-of-%05d.gguf", i + 1, count);
      paths.push_back(Write(name, parts[i].Bytes()));
    }
    return paths;
  }

  const std::filesystem::path folder_ =
      ::testing::TempDir() + "model_file_test." + std::to_string(::getpid());
};

TEST_F(ModelFileOnDiskTest, SplitModelsOpenByAnyPart) {
  const std::vector<std::string> paths = WriteParts(3);
  std::string hash;
  for (const std::string& path : paths) {
    const ModelOr model = ModelFile::Open(path);
    ASSERT_TRUE(model.ok()) << model.status();
    EXPECT_EQ((*model)->parts().size(), 3u);
    const UnitTensor& output = (*model)->UnitTensors(kHead)[1];
    EXPECT_EQ(output.tensor->name, "output.weight");
    EXPECT_EQ(output.tensor->file_index, 2);
    EXPECT_EQ((*model)->file(2).path(), paths[2]);
    if (hash.empty()) hash = (*model)->hash();
    EXPECT_EQ((*model)->hash(), hash);
  }
}

TEST_F(ModelFileOnDiskTest, MissingPartsAreNamed) {
  const std::vector<std::string> paths = WriteParts(3);
  std::filesystem::remove(paths[1]);
  const absl::Status status = ModelFile::Open(paths[0]).status();
  EXPECT_TRUE(absl::IsNotFound(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("tiny-00002-of-00003.gguf"));
}

TEST_F(ModelFileOnDiskTest, PartUnderAnotherNameIsRefused) {
  const std::vector<std::string> paths = WriteParts(2);
  const std::string renamed = folder_ / "model.gguf";
  std::filesystem::copy(paths[0], renamed);
  EXPECT_EQ(GetModelError(ModelFile::Open(renamed).status()), ModelError::kCorrupt);
  const std::string whole = Write("whole-00001-of-00001.gguf", TinyLlamaImage().Bytes());
  EXPECT_TRUE(ModelFile::Open(whole).ok());
  const std::string many = Write("m-00001-of-99999.gguf", TinyLlamaImage().Bytes());
  EXPECT_EQ(GetModelError(ModelFile::Open(many).status()), ModelError::kLimit);
}

TEST_F(ModelFileOnDiskTest, ChangesAreNoticed) {
  const std::string path = Write("model.gguf", TinyLlamaImage().Bytes());
  const ModelOr model = ModelFile::Open(path);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_TRUE((*model)->CheckUnchanged().ok());
  std::filesystem::resize_file(path, 100);
  const absl::Status status = (*model)->CheckUnchanged();
  EXPECT_EQ(GetModelError(status), ModelError::kChanged);
  EXPECT_THAT(std::string(status.message()), HasSubstr(path));
}

}  // namespace
}  // namespace stagecoach
