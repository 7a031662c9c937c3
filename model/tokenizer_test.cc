// The tokenisers against what other implementations say, and properties that hold for all texts.
#include "model/tokenizer.h"

#include <cstdlib>
#include <ctime>
#include <fstream>
#include <iterator>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "model/file.h"
#include "model/test_paths.h"
#include "model/tokenizer_test_vocab.h"
#include "nlohmann/json.hpp"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr size_t kLongTextBytes = 128 << 10;  // sanitizers are slow
#else
constexpr size_t kLongTextBytes = 1 << 20;
#endif

namespace stagecoach {
namespace {

std::unique_ptr<Tokenizer> LoadTokenizer(const std::string& path) {
  const absl::StatusOr<std::unique_ptr<RandomAccessFile>> file = OpenFile(path);
  if (!file.ok()) {
    ADD_FAILURE() << file.status();
    return nullptr;
  }
  const absl::StatusOr<GgufFile> gguf = GgufFile::Parse(**file);
  if (!gguf.ok()) {
    ADD_FAILURE() << gguf.status();
    return nullptr;
  }
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = Tokenizer::Create(*gguf);
  if (!tokenizer.ok()) {
    ADD_FAILURE() << tokenizer.status();
    return nullptr;
  }
  return *std::move(tokenizer);
}

const Tokenizer& DemoTokenizer() {
  static const Tokenizer* tokenizer = LoadTokenizer(TestDataPath("demo-Q4_K_M.gguf")).release();
  return *tokenizer;
}

// A byte-level vocabulary with a few merges.
std::unique_ptr<Tokenizer> SmallBpe(const std::string& pre) {
  auto tokenizer = MakeBpeGguf(pre, {{"aa"}, {"aaaa"}, {"ĠĠ"}, {"he"}, {"hell"}, {"ll"}, {"Ġa"}},
                               {"l l", "h e", "a a", "Ġ Ġ", "he ll", "aa aa", "Ġ a"})
                       .MakeTokenizer();
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return *std::move(tokenizer);
}

std::vector<int32_t> Encode(const Tokenizer& tokenizer, std::string_view text,
                            EncodeOptions options = {}) {
  absl::StatusOr<std::vector<int32_t>> ids = tokenizer.Encode(text, options);
  EXPECT_TRUE(ids.ok()) << ids.status();
  return ids.ok() ? *std::move(ids) : std::vector<int32_t>();
}

TEST(TokenizerTest, DemoVocabularyAgreesWithSentencePiece) {
  std::ifstream lines(TestDataPath("golden/demo.tokenizer.jsonl"));
  int count = 0;
  for (std::string line; std::getline(lines, line); ++count) {
    const nlohmann::json golden = nlohmann::json::parse(line);
    const std::string text = golden["text"];
    EXPECT_EQ(Encode(DemoTokenizer(), text), golden["tokens"].get<std::vector<int32_t>>()) << text;
  }
  EXPECT_EQ(count, 31);
}

TEST(TokenizerTest, DemoVocabularySpecials) {
  const Tokenizer& demo = DemoTokenizer();
  EXPECT_EQ(demo.vocab_size(), 1024);
  EXPECT_EQ(demo.bos_id(), 1);
  EXPECT_EQ(demo.eos_id(), 2);
  EXPECT_TRUE(demo.adds_bos());
  EXPECT_TRUE(demo.strips_leading_space());
  EXPECT_TRUE(demo.IsEndOfGeneration(2));
  EXPECT_FALSE(demo.IsEndOfGeneration(1));
  EXPECT_EQ(Encode(demo, "", {.add_special = true}), std::vector<int32_t>{1});
}

std::vector<std::string> SplitOn(const std::string& text, const std::string& separator) {
  std::vector<std::string> parts;
  size_t begin = 0;
  for (size_t hit; (hit = text.find(separator, begin)) != std::string::npos;
       begin = hit + separator.size()) {
    parts.push_back(text.substr(begin, hit - begin));
  }
  parts.push_back(text.substr(begin));
  return parts;
}

std::string ReadAll(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(in), {});
}

// `name`.inp: texts, separated by a marker line; `name`.out: their ids, one line each.
void CompareWithVectors(const std::string& path) {
  const std::unique_ptr<Tokenizer> tokenizer = LoadTokenizer(path);
  ASSERT_NE(tokenizer, nullptr);
  // Both files end with a separator.
  std::vector<std::string> texts = SplitOn(ReadAll(path + ".inp"), "\n__ggml_vocab_test__\n");
  std::vector<std::string> lines = SplitOn(ReadAll(path + ".out"), "\n");
  ASSERT_EQ(texts.back(), "");
  ASSERT_EQ(lines.back(), "");
  texts.pop_back();
  lines.pop_back();
  ASSERT_EQ(texts.size(), lines.size());
  for (size_t i = 0; i < texts.size(); ++i) {
    std::istringstream line(lines[i]);
    const std::vector<int32_t> expected((std::istream_iterator<int32_t>(line)),
                                        std::istream_iterator<int32_t>());
    EXPECT_EQ(Encode(*tokenizer, texts[i]), expected) << "text " << i << ": " << texts[i];
    EXPECT_EQ(*tokenizer->Decode(expected, false), texts[i]) << "text " << i;
  }
  EXPECT_GT(texts.size(), 40u);
}

class ThirdPartyTest : public testing::TestWithParam<const char*> {};

TEST_P(ThirdPartyTest, AgreesWithItsVectors) {
  const char* dir = std::getenv("STAGECOACH_THIRDPARTY_DIR");
  if (dir == nullptr) GTEST_SKIP() << "STAGECOACH_THIRDPARTY_DIR is not set";
  const std::string path = std::string(dir) + "/" + GetParam();
  if (!std::ifstream(path)) GTEST_SKIP() << path << " does not exist";
  CompareWithVectors(path);
}

INSTANTIATE_TEST_SUITE_P(Vocabularies, ThirdPartyTest,
                         testing::Values("ggml-vocab-llama-spm.gguf", "ggml-vocab-gpt-2.gguf"),
                         [](const auto& info) {
                           return std::string(info.param).find("spm") != std::string::npos
                                      ? "LlamaSpm"
                                      : "Gpt2";
                         });

using NamedTokenizers = std::vector<std::pair<std::string, std::unique_ptr<Tokenizer>>>;

// The demo model's and those of small vocabularies with the given pre-tokenisers.
NamedTokenizers DemoAnd(const std::vector<std::string>& pre_tokenizers) {
  NamedTokenizers all;
  all.emplace_back("demo", LoadTokenizer(TestDataPath("demo-Q4_K_M.gguf")));
  for (const std::string& pre : pre_tokenizers) all.emplace_back(pre, SmallBpe(pre));
  return all;
}

NamedTokenizers AllTokenizers() {
  return DemoAnd({"default", "gpt-2", "llama-bpe", "qwen2", "smollm", "tekken", "gpt-4o", "falcon",
                  "deepseek-llm", "deepseek-coder"});
}

TEST(TokenizerTest, ValidTextRoundTrips) {
  for (const auto& [name, tokenizer] : AllTokenizers()) {
    for (uint32_t seed = 0; seed < 300; ++seed) {
      const std::string text = RandomText(seed, seed % 60);
      ASSERT_EQ(*tokenizer->Decode(Encode(*tokenizer, text), false), text) << name << " " << seed;
    }
  }
}

TEST(TokenizerTest, AnyBytesRoundTrip) {
  std::mt19937 random(7);
  for (const auto& [name, tokenizer] : AllTokenizers()) {
    for (int round = 0; round < 300; ++round) {
      std::string text(random() % 40, '\0');
      for (char& c : text) c = static_cast<char>(random());
      ASSERT_EQ(*tokenizer->Decode(Encode(*tokenizer, text), false), text) << name;
    }
  }
}

TEST(TokenizerTest, LongTextsTakeLinearTime) {
  std::string random_bytes(kLongTextBytes, '\0');
  std::mt19937 random(3);
  for (char& c : random_bytes) c = static_cast<char>(random());
  std::string spaced_letters;
  while (spaced_letters.size() < kLongTextBytes) spaced_letters += "   x";
  const std::pair<const char*, std::string> texts[] = {
      {"letters", std::string(kLongTextBytes, 'a')},
      {"spaces", std::string(kLongTextBytes, ' ')},
      {"spaces before a digit", std::string(kLongTextBytes, ' ') + "7"},
      {"line breaks", std::string(kLongTextBytes, '\n')},
      {"digits", std::string(kLongTextBytes, '1')},
      {"punctuation", std::string(kLongTextBytes, '!')},
      {"spaced letters", spaced_letters},
      {"random bytes", random_bytes},
  };
  for (const auto& [name, tokenizer] :
       DemoAnd({"default", "llama-bpe", "tekken", "deepseek-llm"})) {
    for (const auto& [what, text] : texts) {
      const std::clock_t start = std::clock();  // CPU time: the machine may be busy
      const std::vector<int32_t> ids = Encode(*tokenizer, text);
      const double seconds = static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
      EXPECT_LT(seconds, 2) << name << ", " << what;
      ASSERT_EQ(*tokenizer->Decode(ids, false), text) << name << ", " << what;
    }
  }
}

TEST(TokenizerTest, TooLongATextIsRefused) {
  const std::string text(kMaxEncodeBytes + 1, 'a');
  EXPECT_EQ(DemoTokenizer().Encode(text, {}).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(TokenizerTest, DecodeRefusesForeignIds) {
  for (const int32_t id : {-1, 1024}) {
    const std::vector<int32_t> ids = {5, id};
    EXPECT_EQ(DemoTokenizer().Decode(ids, false).status().code(), absl::StatusCode::kOutOfRange);
  }
}

}  // namespace
}  // namespace stagecoach
