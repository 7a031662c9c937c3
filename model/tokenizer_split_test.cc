// Expected words are reasoned from the published patterns, not taken from this implementation.
#include "model/tokenizer_split.h"

#include <string>
#include <string_view>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/model_error.h"
#include "model/tokenizer_test_vocab.h"

namespace stagecoach {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

std::vector<std::string> Words(std::string_view pre, std::string_view text) {
  const auto splitter = PreTokenizer::Create(pre);
  if (!splitter.ok()) {
    ADD_FAILURE() << splitter.status();
    return {};
  }
  const auto words = (*splitter)->Split(text);
  if (!words.ok()) {
    ADD_FAILURE() << words.status();
    return {};
  }
  return std::vector<std::string>(words->begin(), words->end());
}

TEST(PreTokenizerTest, Gpt2) {
  EXPECT_THAT(Words("gpt-2", "Hello world's 2nd  test!"),
              ElementsAre("Hello", " world", "'s", " 2", "nd", " ", " test", "!"));
  EXPECT_THAT(Words("gpt-2", "I'LL 1234567 x"), ElementsAre("I", "'", "LL", " 1234567", " x"));
  EXPECT_THAT(Words("gpt-2", "a\n\nb \t c  "),
              ElementsAre("a", "\n", "\n", "b", " \t", " c", "  "));
  EXPECT_THAT(Words("gpt-2", "we've you're I'm he'd don't"),
              ElementsAre("we", "'ve", " you", "'re", " I", "'m", " he", "'d", " don", "'t"));
  EXPECT_THAT(Words("gpt-2", "für ½ 日本。"), ElementsAre("für", " ½", " 日本", "。"));
}

TEST(PreTokenizerTest, Llama3) {
  EXPECT_THAT(Words("llama-bpe", "I'LL pay $1234567!\n\nOK"),
              ElementsAre("I", "'LL", " pay", " $", "123", "456", "7", "!\n\n", "OK"));
  EXPECT_THAT(Words("llama-bpe", "(x) -y\t z"), ElementsAre("(x", ")", " -", "y", "\t", " z"));
  EXPECT_THAT(Words("llama-bpe", "a  \n \n  b"), ElementsAre("a", "  \n \n", " ", " b"));
  EXPECT_THAT(Words("llama-bpe", " 12"), ElementsAre(" ", "12"));
  EXPECT_THAT(Words("llama-bpe", "end   "), ElementsAre("end", "   "));
  for (const char* same : {"llama3", "llama-v3"}) {
    EXPECT_EQ(Words(same, "It'S 12345"), Words("llama-bpe", "It'S 12345"));
  }
}

TEST(PreTokenizerTest, Qwen2TakesDigitsOneByOne) {
  EXPECT_THAT(Words("qwen2", "a 123\r\n"), ElementsAre("a", " ", "1", "2", "3", "\r\n"));
  EXPECT_THAT(Words("qwen2", "'Tis it's"), ElementsAre("'T", "is", " it", "'s"));
}

TEST(PreTokenizerTest, SmollmAndKinTakeDigitsOutFirst) {
  for (const char* pre : {"smollm", "starcoder", "refact", "command-r"}) {
    // The space before 1 is cut off with the digit's left side, so it stays alone.
    EXPECT_THAT(Words(pre, "x 12 don't"), ElementsAre("x", " ", "1", "2", " don", "'t")) << pre;
  }
}

TEST(PreTokenizerTest, DefaultCutsPunctuationThenDigitsByThree) {
  EXPECT_THAT(Words("default", "a, b 1234567 ok?!"),
              ElementsAre("a", ",", " b", " ", "123", "456", "7", " ok", "?!"));
  // The apostrophe is punctuation and goes first, so no contraction is left.
  EXPECT_THAT(Words("default", "it's"), ElementsAre("it", "'", "s"));
}

TEST(PreTokenizerTest, Falcon) {
  EXPECT_THAT(Words("falcon", "a`b 12345"), ElementsAre("a", "`", "b", " ", "123", "45"));
}

TEST(PreTokenizerTest, DeepseekCoder) {
  // "=" is a symbol, not punctuation: no pattern takes it, so it stays with the spaces around it.
  EXPECT_THAT(Words("deepseek-coder", "int x = 42 ;\n"),
              ElementsAre("int", " x", " = ", "4", "2", " ;", "\n"));
  EXPECT_THAT(Words("deepseek-coder", "a\n\nb"), ElementsAre("a", "\n", "\n", "b"));
}

TEST(PreTokenizerTest, DeepseekLlm) {
  EXPECT_THAT(Words("deepseek-llm", "Hello, 世界 123  "),
              ElementsAre("Hello", ",", " ", "世界", " ", "123", "  "));
  // Georgian is not in the list of letters, Greek and Cyrillic are.
  EXPECT_THAT(Words("deepseek-llm", "α я x"), ElementsAre("α", " я", " x"));
}

TEST(PreTokenizerTest, TekkenCutsBetweenLowerAndUpperCase) {
  EXPECT_THAT(Words("tekken", "helloWorld HTTPServer 42"),
              ElementsAre("hello", "World", " HTTPServer", " ", "4", "2"));
  EXPECT_THAT(Words("tekken", "a/b //\n"), ElementsAre("a", "/b", " //\n"));
}

TEST(PreTokenizerTest, Gpt4oKeepsContractionsWithTheirWord) {
  EXPECT_THAT(Words("gpt-4o", "don't stopNow 12345"),
              ElementsAre("don't", " stop", "Now", " ", "123", "45"));
}

TEST(PreTokenizerTest, InvalidBytesAreWordsOfTheirOwn) {
  EXPECT_THAT(Words("gpt-2", "ab\xFF\xC3 cd\xE2\x82"),
              ElementsAre("ab", "\xFF\xC3", " cd", "\xE2\x82"));
  EXPECT_THAT(Words("llama-bpe", "\x80"), ElementsAre("\x80"));
}

TEST(PreTokenizerTest, EmptyText) { EXPECT_TRUE(Words("default", "").empty()); }

TEST(PreTokenizerTest, WordsCoverEveryText) {
  for (const char* pre : {"default", "gpt-2", "llama-bpe", "qwen2", "smollm", "tekken", "gpt-4o",
                          "falcon", "deepseek-llm", "deepseek-coder"}) {
    for (uint32_t seed = 0; seed < 200; ++seed) {
      const std::string text = RandomText(seed, 50);
      std::string joined;
      for (const std::string& word : Words(pre, text)) {
        ASSERT_FALSE(word.empty());
        joined += word;
      }
      ASSERT_EQ(joined, text) << pre;
    }
  }
}

TEST(PreTokenizerTest, UnknownNameIsRefusedByName) {
  const auto splitter = PreTokenizer::Create("martian");
  EXPECT_EQ(GetModelError(splitter.status()), ModelError::kUnsupported);
  EXPECT_THAT(std::string(splitter.status().message().data(), splitter.status().message().size()),
              testing::AllOf(HasSubstr("'martian'"), HasSubstr("llama-bpe")));
}

}  // namespace
}  // namespace stagecoach
