#include "model/manifest.h"

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/gguf_image.h"
#include "model/model_error.h"
#include "model/model_file.h"
#include "model/test_paths.h"
#include "xxhash.h"

namespace stagecoach {
namespace {

using ::testing::HasSubstr;

const std::string kModelPath = TestDataPath("demo2-Q8_0.gguf");

std::shared_ptr<const ModelFile> OpenDemo() { return ModelFile::Open(kModelPath).value(); }

absl::StatusOr<std::shared_ptr<const ModelFile>> OpenImage(const GgufImage& image,
                                                           std::optional<Manifest> manifest) {
  std::vector<std::unique_ptr<RandomAccessFile>> files;
  files.push_back(MakeMemoryFile("test.gguf", image.Bytes()));
  return ModelFile::FromFiles(std::move(files), std::move(manifest));
}

TEST(ManifestTest, HashesEveryTensorOfTheFile) {
  const auto model = OpenDemo();
  const Manifest manifest = Manifest::OfModel(*model).value();
  EXPECT_TRUE(manifest.CheckModel(*model).ok());
  for (const TensorInfo& tensor : model->gguf().tensors()) {
    std::vector<std::byte> bytes(tensor.bytes);
    ASSERT_TRUE(ReadFully(model->file(0), tensor.offset, bytes).ok());
    const uint64_t hash = XXH3_64bits(bytes.data(), bytes.size());
    EXPECT_TRUE(manifest.CheckTensor(tensor, hash).ok()) << tensor.name;
    EXPECT_EQ(GetModelError(manifest.CheckTensor(tensor, hash ^ 1)), ModelError::kCorrupt);
  }
}

TEST(ManifestTest, TextIsReadBackAsItWas) {
  const auto model = OpenDemo();
  const std::string text = Manifest::OfModel(*model).value().ToText();
  const auto again = Manifest::Parse(text);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->ToText(), text);
  EXPECT_EQ(again->model_hash(), model->hash());
  EXPECT_THAT(text, HasSubstr(" token_embd.weight\n"));
}

TEST(ManifestTest, WhatIsNoManifestIsRefused) {
  const std::string head = "stagecoach-manifest 1\nmodel abc\n";
  for (const std::string& text :
       {std::string(), std::string("GGUF"), std::string("stagecoach-manifest 2\nmodel a\n"),
        std::string("stagecoach-manifest 1\n"), head + "\n", head + "0123456789abcdef 5\n",
        head + "0123456789abcde 5 name\n", head + "0123456789abcdeg 5 name\n",
        head + "0123456789abcdef -5 name\n", head + "0123456789abcdef 18446744073709551616 name\n",
        head + "0123456789abcdef  5 name\n"}) {
    EXPECT_EQ(GetModelError(Manifest::Parse(text).status()), ModelError::kBadType) << text;
  }
  const std::string line = "0123456789abcdef 5 name\n";
  EXPECT_TRUE(Manifest::Parse(head + line).ok());
  EXPECT_EQ(GetModelError(Manifest::Parse(head + line + line).status()), ModelError::kDuplicate);
}

TEST(ManifestTest, OpenRefusesTheManifestOfAnotherModel) {
  const std::string path =
      ::testing::TempDir() + "manifest_test." + std::to_string(::getpid()) + ".manifest";
  std::ofstream(path) << Manifest::OfModel(*OpenDemo()).value().ToText();
  const auto same = ModelFile::Open(kModelPath, {.manifest = path});
  ASSERT_TRUE(same.ok()) << same.status();
  EXPECT_NE((*same)->manifest(), nullptr);
  const auto other = ModelFile::Open(TestDataPath("demo2-F32.gguf"), {.manifest = path});
  EXPECT_EQ(GetModelError(other.status()), ModelError::kCorrupt) << other.status();
  std::filesystem::remove(path);
  EXPECT_TRUE(absl::IsNotFound(ModelFile::Open(kModelPath, {.manifest = path}).status()));
}

TEST(ManifestTest, EveryTensorMustBeListed) {
  const GgufImage image = TinyLlamaImage();
  const auto model = OpenImage(image, std::nullopt).value();
  EXPECT_EQ(model->manifest(), nullptr);
  std::string text = Manifest::OfModel(*model).value().ToText();
  EXPECT_TRUE(OpenImage(image, Manifest::Parse(text).value()).ok());
  text.resize(text.rfind('\n', text.size() - 2) + 1);  // without the last record
  const absl::Status status = OpenImage(image, Manifest::Parse(text).value()).status();
  EXPECT_EQ(GetModelError(status), ModelError::kCorrupt) << status;
}

}  // namespace
}  // namespace stagecoach
