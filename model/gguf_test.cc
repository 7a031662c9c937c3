#include "model/gguf.h"

#include <unistd.h>

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/faulty_file.h"
#include "model/gguf_image.h"
#include "model/gguf_writer.h"
#include "model/model_error.h"

namespace stagecoach {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

absl::StatusOr<GgufFile> ParseBytes(const std::string& bytes) {
  return GgufFile::Parse(*MakeMemoryFile("test.gguf", bytes));
}

GgufImage OneOfEachType() {
  GgufImage image;
  image.Set("u8", kGgufU8, RawU8(200));
  image.Set("i8", kGgufI8, RawU8(200));
  image.Set("u16", kGgufU16, std::string("\xff\xfe", 2));
  image.Set("i16", kGgufI16, std::string("\xff\xfe", 2));
  image.SetU32("u32", 0xfffffffe);
  image.Set("i32", kGgufI32, RawU32(0xfffffffe));
  image.SetF32("f32", 0.5f);
  image.Set("bool", kGgufBool, RawU8(1));
  image.SetString("string", std::string("a\0\xff", 3));
  image.Set("u64", kGgufU64, RawU64(~uint64_t{0}));
  image.Set("i64", kGgufI64, RawU64(7));
  image.Set("f64", kGgufF64, RawU64(0x3ff8000000000000));  // 1.5
  image.Set("strings", kGgufArray, RawStrings({"", "one", "two"}));
  image.Set("floats", kGgufArray, RawArray(kGgufF32, 2, RawF32(1) + RawF32(-2)));
  image.Set("ints", kGgufArray, RawArray(kGgufI32, 2, RawU32(3) + RawU32(0xffffffff)));
  image.Set("bytes", kGgufArray, RawArray(kGgufU8, 3, "\1\2\3"));
  image.Set("bools", kGgufArray, RawArray(kGgufBool, 2, std::string("\1\0", 2)));
  image.Set("huge", kGgufArray, RawArray(kGgufU64, 1, RawU64(~uint64_t{0})));
  image.Set("none", kGgufArray, RawArray(kGgufString, 0, ""));
  return image;
}

TEST(GgufTest, ReadsEveryValueType) {
  const auto gguf = ParseBytes(OneOfEachType().Bytes());
  ASSERT_TRUE(gguf.ok()) << gguf.status();
  EXPECT_EQ(gguf->Uint("u8").value(), 200u);
  EXPECT_EQ(gguf->Uint("u16").value(), 0xfeffu);
  EXPECT_EQ(gguf->Uint("u32").value(), 0xfffffffeu);
  EXPECT_EQ(gguf->Uint("u64").value(), ~uint64_t{0});
  EXPECT_EQ(gguf->Uint("i64").value(), 7u);
  EXPECT_EQ(gguf->Float("f32").value(), 0.5);
  EXPECT_EQ(gguf->Float("f64").value(), 1.5);
  EXPECT_EQ(gguf->Bool("bool").value(), true);
  EXPECT_EQ(gguf->String("string").value(), std::string("a\0\xff", 3));
  EXPECT_THAT(*gguf->StringArray("strings").value(), ElementsAre("", "one", "two"));
  EXPECT_TRUE(gguf->StringArray("none").value()->empty());
  EXPECT_THAT(*gguf->FloatArray("floats").value(), ElementsAre(1.0f, -2.0f));
  EXPECT_THAT(gguf->IntArray("ints").value().value(), ElementsAre(3, -1));
  EXPECT_THAT(gguf->IntArray("bytes").value().value(), ElementsAre(1, 2, 3));
  EXPECT_EQ(std::get<int64_t>(gguf->metadata().at("i8")), -56);
  EXPECT_EQ(std::get<int64_t>(gguf->metadata().at("i16")), -257);
  EXPECT_EQ(std::get<int64_t>(gguf->metadata().at("i32")), -2);
  EXPECT_EQ(std::get<std::vector<bool>>(gguf->metadata().at("bools")),
            (std::vector<bool>{true, false}));
}

TEST(GgufTest, AbsentKeysAreNotErrors) {
  const auto gguf = ParseBytes(OneOfEachType().Bytes());
  ASSERT_TRUE(gguf.ok()) << gguf.status();
  EXPECT_EQ(gguf->Uint("absent").value(), std::nullopt);
  EXPECT_EQ(gguf->String("absent").value(), std::nullopt);
  EXPECT_EQ(gguf->StringArray("absent").value(), nullptr);
  EXPECT_EQ(gguf->IntArray("absent").value(), std::nullopt);
}

TEST(GgufTest, WrongTypesNameKeyPlaceAndBothTypes) {
  const auto gguf = ParseBytes(OneOfEachType().Bytes());
  ASSERT_TRUE(gguf.ok()) << gguf.status();
  const absl::Status status = gguf->Uint("string").status();
  EXPECT_EQ(GetModelError(status), ModelError::kBadType);
  EXPECT_THAT(std::string(status.message()), HasSubstr("key 'string' at byte "));
  EXPECT_THAT(std::string(status.message()), HasSubstr("is string, but a non-negative integer"));
  EXPECT_EQ(GetModelError(gguf->Uint("i32").status()), ModelError::kBadType);
  EXPECT_EQ(GetModelError(gguf->Float("u32").status()), ModelError::kBadType);
  EXPECT_EQ(GetModelError(gguf->Bool("u8").status()), ModelError::kBadType);
  EXPECT_EQ(GetModelError(gguf->String("strings").status()), ModelError::kBadType);
  EXPECT_EQ(GetModelError(gguf->StringArray("floats").status()), ModelError::kBadType);
  EXPECT_EQ(GetModelError(gguf->FloatArray("ints").status()), ModelError::kBadType);
  EXPECT_EQ(GetModelError(gguf->IntArray("huge").status()), ModelError::kBadType);
  EXPECT_EQ(GetModelError(gguf->IntArray("floats").status()), ModelError::kBadType);
}

TEST(GgufTest, KeyOffsetsPointAtRecords) {
  const std::string bytes = OneOfEachType().Bytes();
  const auto gguf = ParseBytes(bytes);
  ASSERT_TRUE(gguf.ok()) << gguf.status();
  for (const auto& [key, value] : gguf->metadata()) {
    EXPECT_EQ(bytes.substr(gguf->KeyOffset(key), 8 + key.size()), RawString(key));
  }
  EXPECT_EQ(gguf->KeyOffset("absent"), OneOfEachType().HeaderBytes().size());
}

TEST(GgufTest, PlacesTensors) {
  GgufImage image = TinyLlamaImage();
  image.version = 2;
  image.SetU32("general.alignment", 256);
  image.alignment = 256;
  for (GgufImage::Tensor& tensor : image.tensors) tensor.offset *= 8;
  image.data.resize(image.data.size() * 8);
  const std::string bytes = image.Bytes();
  const auto gguf = GgufFile::Parse(*MakeMemoryFile("test.gguf", bytes), 3);
  ASSERT_TRUE(gguf.ok()) << gguf.status();
  EXPECT_EQ(gguf->version(), 2u);
  EXPECT_EQ(gguf->alignment(), 256u);
  EXPECT_EQ(gguf->data_offset(), (image.HeaderBytes().size() + 255) / 256 * 256);
  ASSERT_EQ(gguf->tensors().size(), image.tensors.size());
  const TensorInfo* down = gguf->FindTensor("blk.1.ffn_down.weight");
  ASSERT_NE(down, nullptr);
  EXPECT_THAT(down->dims, ElementsAre(16, 8));
  EXPECT_EQ(down->columns(), 16u);
  EXPECT_EQ(down->rows(), 8u);
  EXPECT_EQ(down->bytes, 16u * 8 * 4);
  EXPECT_EQ(down->file_index, 3);
  EXPECT_EQ(down->offset, gguf->data_offset() + image.tensor("blk.1.ffn_down.weight").offset);
  EXPECT_EQ(bytes.substr(down->record_offset + 8, down->name.size()), down->name);
  EXPECT_EQ(gguf->FindTensor("blk.2.ffn_down.weight"), nullptr);
}

TEST(GgufTest, HashIsOfTheHeaderAlone) {
  GgufImage image = TinyLlamaImage();
  const std::string hash = ParseBytes(image.Bytes()).value().header_hash();
  EXPECT_EQ(hash.size(), 32u);
  image.data[5] ^= 1;
  EXPECT_EQ(ParseBytes(image.Bytes()).value().header_hash(), hash);
  image.SetString("general.name", "tinx");
  EXPECT_NE(ParseBytes(image.Bytes()).value().header_hash(), hash);
}

// Larger than the cursor's buffer, so that reads cross its end at all kinds of places.
GgufImage LargeHeader() {
  GgufImage image = TinyLlamaImage();
  std::vector<std::string> strings;
  for (int i = 0; i < 60'000; ++i) strings.push_back(std::string(i % 13, 'a' + i % 26));
  image.Set("strings", kGgufArray, RawStrings(strings));
  image.SetString("text", std::string(900'001, 'x'));
  return image;
}

TEST(GgufTest, ShortAndFailingReadsChangeNothing) {
  const std::string bytes = LargeHeader().Bytes();
  const auto whole = ParseBytes(bytes);
  ASSERT_TRUE(whole.ok()) << whole.status();
  EXPECT_EQ(whole->StringArray("strings").value()->at(59'999),
            std::string(59'999 % 13, 'a' + 59'999 % 26));
  for (const FaultPlan& plan : {FaultPlan{.max_chunk = 7}, FaultPlan{.max_chunk = 4097},
                                FaultPlan{.first_failure = 2, .failures = kReadRetries}}) {
    const FaultyFile file(MakeMemoryFile("test.gguf", bytes), plan);
    const auto pieces = GgufFile::Parse(file);
    ASSERT_TRUE(pieces.ok()) << pieces.status();
    EXPECT_EQ(pieces->metadata(), whole->metadata());
    EXPECT_EQ(pieces->header_hash(), whole->header_hash());
    EXPECT_GT(file.reads(), 2u);
  }
}

TEST(GgufTest, ReadErrorsAndShrinkingFilesAreReported) {
  const std::string bytes = LargeHeader().Bytes();
  const FaultyFile bad(MakeMemoryFile("test.gguf", bytes),
                       {.bad_begin = 300'000, .bad_end = 300'001});
  EXPECT_EQ(GetModelError(GgufFile::Parse(bad).status()), ModelError::kIo);
  const FaultyFile cut(MakeMemoryFile("test.gguf", bytes), {.truncate_at = 300'000});
  EXPECT_EQ(GetModelError(GgufFile::Parse(cut).status()), ModelError::kTruncated);
}

std::string WriterPath() {
  return ::testing::TempDir() + "gguf_writer." + std::to_string(::getpid()) + ".gguf";
}

TEST(GgufWriterTest, WhatIsWrittenIsRead) {
  const std::string path = WriterPath();
  auto writer = GgufWriter::Create(path, 64).value();
  writer->AddUint32("uint", 5);
  writer->AddFloat32("float", 0.25f);
  writer->AddBool("bool", true);
  writer->AddString("string", "text");
  writer->AddStrings("strings", std::vector<std::string>{"a", "bc"});
  writer->AddFloats("floats", std::vector<float>{1, 2});
  writer->AddInts("ints", std::vector<int32_t>{-1, 2});
  ASSERT_TRUE(writer->AddTensor("first", TensorType::kF32, std::vector<uint64_t>{5}).ok());
  ASSERT_TRUE(writer->AddTensor("second", TensorType::kQ4_0, std::vector<uint64_t>{32, 3}).ok());
  ASSERT_TRUE(writer->WriteHeader().ok());
  const std::string first(20, 'f'), second(54, 's');
  ASSERT_TRUE(writer->WriteData(std::as_bytes(std::span(first))).ok());
  for (const char& byte : second) {
    ASSERT_TRUE(writer->WriteData(std::as_bytes(std::span(&byte, 1))).ok());
  }
  EXPECT_FALSE(std::filesystem::exists(path)) << "not there before it is complete";
  ASSERT_TRUE(writer->Finish().ok());

  const auto file = OpenFile(path).value();
  const auto gguf = GgufFile::Parse(*file);
  ASSERT_TRUE(gguf.ok()) << gguf.status();
  EXPECT_EQ(gguf->alignment(), 64u);
  EXPECT_EQ(gguf->Uint("uint").value(), 5u);
  EXPECT_EQ(gguf->Float("float").value(), 0.25);
  EXPECT_EQ(gguf->Bool("bool").value(), true);
  EXPECT_EQ(gguf->String("string").value(), "text");
  EXPECT_THAT(*gguf->StringArray("strings").value(), ElementsAre("a", "bc"));
  EXPECT_THAT(*gguf->FloatArray("floats").value(), ElementsAre(1.0f, 2.0f));
  EXPECT_THAT(gguf->IntArray("ints").value().value(), ElementsAre(-1, 2));
  for (const auto& [name, bytes] : {std::pair("first", first), std::pair("second", second)}) {
    const TensorInfo* tensor = gguf->FindTensor(name);
    ASSERT_NE(tensor, nullptr);
    EXPECT_EQ(tensor->offset % 64, 0u);
    std::string data(tensor->bytes, '\0');
    ASSERT_TRUE(ReadFully(*file, tensor->offset, std::as_writable_bytes(std::span(data))).ok());
    EXPECT_EQ(data, bytes);
  }
  EXPECT_EQ(file->size(), gguf->data_offset() + 64 + 64);
  std::filesystem::remove(path);
}

TEST(GgufWriterTest, UnfinishedFilesAreRemoved) {
  const std::string path = WriterPath();
  auto writer = GgufWriter::Create(path).value();
  EXPECT_EQ(GetModelError(writer->AddTensor("t", TensorType::kQ4_K, std::vector<uint64_t>{32})),
            ModelError::kBadShape);
  EXPECT_TRUE(std::filesystem::exists(path + ".partial"));
  writer.reset();
  EXPECT_FALSE(std::filesystem::exists(path + ".partial"));
  EXPECT_FALSE(std::filesystem::exists(path));
  EXPECT_TRUE(absl::IsNotFound(GgufWriter::Create("/nonexistent/x").status()));
}

TEST(TensorTypeTest, NamesAndGeometry) {
  for (const TensorTypeInfo& info : AllTensorTypes()) {
    EXPECT_EQ(FindTensorType(static_cast<uint32_t>(info.type))->type, info.type);
    EXPECT_EQ(ParseTensorType(info.name), info.type);
    EXPECT_EQ(DescribeTensorTypeId(static_cast<uint32_t>(info.type)), info.name);
    EXPECT_EQ(RowBytes(info.type, 512).value(), 512 / info.block_elements * info.block_bytes);
  }
  EXPECT_EQ(ParseTensorType("q4_k"), TensorType::kQ4_K);
  EXPECT_EQ(ParseTensorType("q4"), std::nullopt);
  EXPECT_EQ(FindTensorType(4), nullptr);
  EXPECT_EQ(DescribeTensorTypeId(16), "IQ2_XXS");
  EXPECT_EQ(DescribeTensorTypeId(77), "unknown type 77");
  EXPECT_EQ(GetModelError(RowBytes(TensorType::kQ4_K, 128).status()), ModelError::kBadShape);
  EXPECT_EQ(GetModelError(RowBytes(TensorType::kF32, uint64_t{1} << 62).status()),
            ModelError::kOverflow);
}

TEST(ModelErrorTest, NamesAndCodes) {
  const absl::Status status = MakeModelError(ModelError::kBadAlign, "alignment 3");
  EXPECT_EQ(status.message(), "BAD_ALIGN: alignment 3");
  EXPECT_TRUE(absl::IsInvalidArgument(status));
  EXPECT_EQ(GetModelError(status), ModelError::kBadAlign);
  EXPECT_EQ(GetModelError(WithPath(status, "m.gguf")), ModelError::kBadAlign);
  EXPECT_EQ(WithPath(status, "m.gguf").message(), "BAD_ALIGN: alignment 3 (file 'm.gguf')");
  EXPECT_TRUE(absl::IsUnavailable(MakeModelError(ModelError::kIo, "")));
  EXPECT_TRUE(absl::IsAborted(MakeModelError(ModelError::kChanged, "")));
  EXPECT_TRUE(absl::IsDataLoss(MakeModelError(ModelError::kCorrupt, "")));
  EXPECT_TRUE(absl::IsDataLoss(MakeModelError(ModelError::kTruncated, "")));
  EXPECT_TRUE(absl::IsUnimplemented(MakeModelError(ModelError::kUnsupportedArch, "")));
  EXPECT_EQ(GetModelError(absl::InvalidArgumentError("BAD_ALIGN: no")), std::nullopt);
}

}  // namespace
}  // namespace stagecoach
