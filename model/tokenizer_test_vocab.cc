#include "model/tokenizer_test_vocab.h"

#include <iterator>
#include <random>

#include "fmt/format.h"
#include "model/file.h"
#include "model/status_macros.h"
#include "model/unicode.h"

namespace stagecoach {
namespace {

void SetPieces(const std::vector<TestPiece>& pieces, TestGguf* gguf) {
  std::vector<std::string> texts;
  std::vector<float> scores;
  std::vector<int32_t> types;
  for (const TestPiece& piece : pieces) {
    texts.push_back(piece.text);
    scores.push_back(piece.score);
    types.push_back(piece.type);
  }
  gguf->Set("tokenizer.ggml.tokens", texts)
      .Set("tokenizer.ggml.scores", scores)
      .Set("tokenizer.ggml.token_type", types);
}

}  // namespace

TestGguf& TestGguf::Set(const std::string& key, std::string_view value) {
  image_.SetString(key, value);
  return *this;
}
TestGguf& TestGguf::Set(const std::string& key, uint32_t value) {
  image_.SetU32(key, value);
  return *this;
}
TestGguf& TestGguf::Set(const std::string& key, bool value) {
  image_.Set(key, kGgufBool, RawU8(value));
  return *this;
}
TestGguf& TestGguf::Set(const std::string& key, const std::vector<std::string>& values) {
  image_.Set(key, kGgufArray, RawStrings(values));
  return *this;
}
TestGguf& TestGguf::Set(const std::string& key, const std::vector<float>& values) {
  std::string elements;
  for (const float value : values) elements += RawF32(value);
  image_.Set(key, kGgufArray, RawArray(kGgufF32, values.size(), elements));
  return *this;
}
TestGguf& TestGguf::Set(const std::string& key, const std::vector<int32_t>& values) {
  std::string elements;
  for (const int32_t value : values) elements += RawU32(static_cast<uint32_t>(value));
  image_.Set(key, kGgufArray, RawArray(kGgufI32, values.size(), elements));
  return *this;
}

absl::StatusOr<GgufFile> TestGguf::Parse() const {
  return GgufFile::Parse(*MakeMemoryFile("test.gguf", image_.Bytes()));
}

absl::StatusOr<std::unique_ptr<Tokenizer>> TestGguf::MakeTokenizer() const {
  STAGECOACH_ASSIGN_OR_RETURN(const GgufFile gguf, Parse());
  return Tokenizer::Create(gguf);
}

TestGguf MakeSpmGguf(const std::vector<TestPiece>& pieces) {
  std::vector<TestPiece> all = {
      {"<unk>", 0, kUnknownType}, {"<s>", 0, kControlType}, {"</s>", 0, kControlType}};
  for (int byte = 0; byte < 256; ++byte) {
    all.push_back({fmt::format("<0x{:02X}>", byte), 0, kByteType});
  }
  all.insert(all.end(), pieces.begin(), pieces.end());
  TestGguf gguf;
  gguf.Set("tokenizer.ggml.model", "llama");
  SetPieces(all, &gguf);
  return gguf;
}

TestGguf MakeBpeGguf(std::string_view pre, const std::vector<TestPiece>& pieces,
                     const std::vector<std::string>& merges) {
  std::vector<TestPiece> all;
  for (int byte = 0; byte < 256; ++byte) {
    all.push_back({ToByteAlphabet(std::string(1, static_cast<char>(byte)))});
  }
  all.insert(all.end(), pieces.begin(), pieces.end());
  TestGguf gguf;
  gguf.Set("tokenizer.ggml.model", "gpt2");
  if (!pre.empty()) gguf.Set("tokenizer.ggml.pre", pre);
  SetPieces(all, &gguf);
  gguf.Set("tokenizer.ggml.merges", merges);
  return gguf;
}

std::string ToByteAlphabet(std::string_view bytes) {
  // By ranges, unlike the tokeniser's table: 00-20 are written from U+0100 on, 7F-A0 from U+0121
  // on, AD is U+0143, all others are written as themselves.
  std::string text;
  for (const char c : bytes) {
    const uint32_t byte = static_cast<uint8_t>(c);
    if (byte <= 0x20) {
      AppendUtf8(0x100 + byte, &text);
    } else if (byte >= 0x7F && byte <= 0xA0) {
      AppendUtf8(0x121 + (byte - 0x7F), &text);
    } else {
      AppendUtf8(byte == 0xAD ? 0x143 : byte, &text);
    }
  }
  return text;
}

std::string RandomText(uint32_t seed, size_t characters) {
  std::mt19937 random(seed);
  constexpr std::string_view kCommon = "etaoinshrdluETA0123456789   \n\t.,!'-<>|[]";
  struct Range {
    uint32_t first;
    uint32_t last;
  };
  constexpr Range kRanges[] = {{0x00, 0x7F},     {0xA0, 0x17F},      {0x370, 0x52F},
                               {0x5D0, 0x6FF},   {0x900, 0x97F},     {0x2000, 0x206F},
                               {0x3000, 0x30FF}, {0x4E00, 0x9FFF},   {0xAC00, 0xD7FF},
                               {0xE000, 0xFFFF}, {0x1F300, 0x1F9FF}, {0x20000, 0x10FFFF}};
  std::string text;
  for (size_t i = 0; i < characters; ++i) {
    if (random() % 3 != 0) {
      text += kCommon[random() % kCommon.size()];
      continue;
    }
    const Range range = kRanges[random() % std::size(kRanges)];
    AppendUtf8(range.first + random() % (range.last - range.first + 1), &text);
  }
  return text;
}

}  // namespace stagecoach
