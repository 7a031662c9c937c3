// Vocabularies that must be refused, and what is read from those that are not.
#include "model/tokenizer_vocab.h"

#include <cmath>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/model_error.h"
#include "model/tokenizer_test_vocab.h"

namespace stagecoach {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

constexpr char kModelKey[] = "tokenizer.ggml.model";
constexpr char kTokens[] = "tokenizer.ggml.tokens";
constexpr char kScores[] = "tokenizer.ggml.scores";
constexpr char kTypes[] = "tokenizer.ggml.token_type";
constexpr char kMerges[] = "tokenizer.ggml.merges";

void ExpectRefused(const TestGguf& gguf, ModelError error, const std::string& what) {
  const absl::Status status = gguf.MakeTokenizer().status();
  EXPECT_EQ(GetModelError(status), error) << status;
  EXPECT_THAT(std::string(status.message().data(), status.message().size()), HasSubstr(what));
}

// A "llama" vocabulary of three tokens with room to break one array.
TestGguf SmallSpm() { return TestGguf().Set(kModelKey, "llama"); }
const std::vector<std::string> kThree = {"<unk>", "a", "b"};
const std::vector<float> kThreeScores = {0, -1, -2};
const std::vector<int32_t> kThreeTypes = {kUnknownType, kNormalType, kNormalType};

TEST(VocabTest, MissingKeys) {
  ExpectRefused(TestGguf(), ModelError::kMissingKey, kModelKey);
  ExpectRefused(SmallSpm(), ModelError::kMissingKey, kTokens);
  ExpectRefused(SmallSpm().Set(kTokens, kThree), ModelError::kMissingKey, kScores);
  ExpectRefused(SmallSpm().Set(kTokens, kThree).Set(kScores, kThreeScores), ModelError::kMissingKey,
                kTypes);
  ExpectRefused(TestGguf().Set(kModelKey, "gpt2").Set(kTokens, kThree), ModelError::kMissingKey,
                kMerges);
}

TEST(VocabTest, UnknownModelIsRefusedByName) {
  ExpectRefused(TestGguf().Set(kModelKey, "bert"), ModelError::kUnsupported, "'bert'");
  ExpectRefused(MakeBpeGguf("martian", {}, {}), ModelError::kUnsupported, "'martian'");
}

TEST(VocabTest, WrongTypes) {
  ExpectRefused(SmallSpm().Set(kTokens, kThreeScores), ModelError::kBadVocab, kTokens);
  ExpectRefused(SmallSpm().Set(kTokens, kThree).Set(kScores, kThreeTypes), ModelError::kBadVocab,
                kScores);
  ExpectRefused(SmallSpm().Set(kTokens, kThree).Set(kScores, kThreeScores).Set(kTypes, kThree),
                ModelError::kBadVocab, kTypes);
  ExpectRefused(TestGguf().Set(kModelKey, true), ModelError::kBadType, kModelKey);
  ExpectRefused(MakeSpmGguf({}).Set("tokenizer.ggml.bos_token_id", "one"), ModelError::kBadVocab,
                "bos_token_id");
}

TEST(VocabTest, CountsThatDiffer) {
  ExpectRefused(SmallSpm().Set(kTokens, std::vector<std::string>()), ModelError::kBadVocab,
                kTokens);
  ExpectRefused(SmallSpm().Set(kTokens, kThree).Set(kScores, std::vector<float>{0, 0}),
                ModelError::kBadVocab, "2 entries for 3 tokens");
  ExpectRefused(SmallSpm()
                    .Set(kTokens, kThree)
                    .Set(kScores, kThreeScores)
                    .Set(kTypes, std::vector<int32_t>(4, kNormalType)),
                ModelError::kBadVocab, "4 entries for 3 tokens");
}

TEST(VocabTest, BadEntriesAreNamed) {
  ExpectRefused(SmallSpm().Set(kTokens, kThree).Set(kScores, std::vector<float>{0, NAN, 0}),
                ModelError::kBadVocab, std::string(kScores) + "[1]");
  ExpectRefused(MakeSpmGguf({{"x"}, {"y", 0, 7}}), ModelError::kBadVocab,
                std::string(kTypes) + "[260]");
  ExpectRefused(MakeSpmGguf({{"x", 0, -1}}), ModelError::kBadVocab, std::string(kTypes) + "[259]");
  ExpectRefused(MakeSpmGguf({{"<0xG0>", 0, kByteType}}), ModelError::kBadVocab,
                std::string(kTokens) + "[259]");
  ExpectRefused(MakeSpmGguf({{std::string(kMaxPieceBytes + 1, 'x')}}), ModelError::kBadVocab,
                std::string(kTokens) + "[259]");
  EXPECT_TRUE(MakeSpmGguf({{std::string(kMaxPieceBytes, 'x')}}).MakeTokenizer().ok());
}

TEST(VocabTest, IdsOutsideTheVocabulary) {
  for (const char* key :
       {"bos_token_id", "eos_token_id", "unknown_token_id", "eot_token_id", "eom_token_id"}) {
    const std::string full_key = std::string("tokenizer.ggml.") + key;
    ExpectRefused(MakeSpmGguf({}).Set(full_key, 259u), ModelError::kBadVocab, full_key);
    EXPECT_TRUE(MakeSpmGguf({}).Set(full_key, 258u).MakeTokenizer().ok());
  }
  ExpectRefused(MakeSpmGguf({}).Set("tokenizer.ggml.bos_token_id", 0xFFFFFFFFu),
                ModelError::kBadVocab, "bos_token_id");
}

TEST(VocabTest, AddingATokenThatDoesNotExist) {
  ExpectRefused(MakeBpeGguf("gpt-2", {}, {}).Set("tokenizer.ggml.add_bos_token", true),
                ModelError::kBadVocab, "add_bos_token");
  ExpectRefused(MakeBpeGguf("gpt-2", {}, {}).Set("tokenizer.ggml.add_eos_token", true),
                ModelError::kBadVocab, "add_eos_token");
}

TEST(VocabTest, SamePieceTwice) {
  ExpectRefused(MakeSpmGguf({{"x"}, {"x"}}), ModelError::kBadVocab, std::string(kTokens) + "[260]");
  ExpectRefused(MakeSpmGguf({{"x"}, {"x", 0, kUserDefinedType}}), ModelError::kBadVocab, kTokens);
  ExpectRefused(MakeSpmGguf({{"</s>", 0, kControlType}}), ModelError::kBadVocab, kTokens);
  // Told apart: a control piece is never matched from plain text. Empty pieces never match at all.
  EXPECT_TRUE(MakeSpmGguf({{"</s>"}, {""}, {""}}).MakeTokenizer().ok());
}

TEST(VocabTest, Merges) {
  ExpectRefused(MakeBpeGguf("gpt-2", {{"ab"}}, {"a b", "ab c"}), ModelError::kBadVocab,
                std::string(kMerges) + "[1]");  // "abc" is no token
  ExpectRefused(MakeBpeGguf("gpt-2", {{"xyz"}}, {"xy z"}), ModelError::kBadVocab, kMerges);
  ExpectRefused(MakeBpeGguf("gpt-2", {{"ab"}}, {"ab"}), ModelError::kBadVocab, kMerges);
  ExpectRefused(MakeBpeGguf("gpt-2", {{"ab"}}, {""}), ModelError::kBadVocab, kMerges);
  ExpectRefused(MakeBpeGguf("gpt-2", {{"ab"}}, {" "}), ModelError::kBadVocab, kMerges);
  ExpectRefused(MakeBpeGguf("gpt-2", {{"ab", 0, kControlType}}, {"a b"}), ModelError::kBadVocab,
                kMerges);  // plain text must not become a control token
}

TEST(VocabTest, SpmMustCoverEveryByte) {
  TestGguf with_unknown = SmallSpm().Set(kTokens, kThree).Set(kScores, kThreeScores);
  TestGguf without = with_unknown;
  EXPECT_TRUE(with_unknown.Set(kTypes, kThreeTypes).MakeTokenizer().ok());
  ExpectRefused(without.Set(kTypes, std::vector<int32_t>(3, kNormalType)), ModelError::kBadVocab,
                "<0x00>");
}

TEST(VocabTest, SpecialIdsByDefault) {
  const auto spm = MakeSpmGguf({}).MakeTokenizer();
  ASSERT_TRUE(spm.ok()) << spm.status();
  EXPECT_EQ((*spm)->bos_id(), 1);
  EXPECT_EQ((*spm)->eos_id(), 2);
  EXPECT_TRUE((*spm)->adds_bos());
  const auto bpe = MakeBpeGguf("gpt-2", {}, {}).MakeTokenizer();
  ASSERT_TRUE(bpe.ok()) << bpe.status();
  EXPECT_EQ((*bpe)->bos_id(), -1);
  EXPECT_EQ((*bpe)->eos_id(), -1);
  EXPECT_FALSE((*bpe)->adds_bos());
  const auto llama3 = MakeBpeGguf("llama-bpe", {{"<|begin_of_text|>", 0, kControlType}}, {})
                          .Set("tokenizer.ggml.bos_token_id", 256u)
                          .MakeTokenizer();
  ASSERT_TRUE(llama3.ok()) << llama3.status();
  EXPECT_TRUE((*llama3)->adds_bos());
  EXPECT_THAT(*(*llama3)->Encode("a", {.add_special = true}), ElementsAre(256, 'a'));
  EXPECT_THAT(*(*llama3)->Encode("a", {}), ElementsAre('a'));
}

TEST(VocabTest, AddFlagsAreObeyed) {
  const auto spm = MakeSpmGguf({})
                       .Set("tokenizer.ggml.add_bos_token", false)
                       .Set("tokenizer.ggml.add_eos_token", true)
                       .Set("tokenizer.ggml.add_space_prefix", false)
                       .MakeTokenizer();
  ASSERT_TRUE(spm.ok()) << spm.status();
  EXPECT_FALSE((*spm)->strips_leading_space());
  EXPECT_THAT(*(*spm)->Encode("a", {.add_special = true}), ElementsAre(kTestFirstByteId + 'a', 2));
}

TEST(VocabTest, EndOfGeneration) {
  const auto tokenizer = MakeSpmGguf({{"<|im_end|>", 0, kControlType},         // 259
                                      {"<|eot_id|>"},                          // 260: not control
                                      {"<end_of_turn>", 0, kUserDefinedType},  // 261
                                      {"x"},                                   // 262
                                      {"y"}})                                  // 263
                             .Set("tokenizer.ggml.eot_token_id", 262u)
                             .Set("tokenizer.ggml.eom_token_id", 263u)
                             .MakeTokenizer();
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  std::vector<int32_t> ends;
  for (int32_t id = 0; id < (*tokenizer)->vocab_size(); ++id) {
    if ((*tokenizer)->IsEndOfGeneration(id)) ends.push_back(id);
  }
  EXPECT_THAT(ends, ElementsAre(2, 259, 261, 262, 263));
  EXPECT_FALSE((*tokenizer)->IsEndOfGeneration(-1));
}

TEST(VocabTest, ParseBytePiece) {
  EXPECT_EQ(ParseBytePiece("<0x00>"), 0);
  EXPECT_EQ(ParseBytePiece("<0xfF>"), 255);
  for (const char* bad : {"", "<0x0>", "<0x000>", "<0xG0>", "0x00>>", "<0x00 "}) {
    EXPECT_EQ(ParseBytePiece(bad), std::nullopt) << bad;
  }
}

TEST(PieceMatcherTest, LongestPrefix) {
  const PieceMatcher matcher({{"ab", 1}, {"abcd", 2}, {"b", 3}, {"abce", 4}, {"\xFF", 5}});
  const auto match = [&](std::string_view text) {
    const auto found = matcher.LongestPrefix(text);
    return found ? found->id * 10 + static_cast<int>(found->length) : -1;
  };
  EXPECT_EQ(match("abcdx"), 24);
  EXPECT_EQ(match("abce"), 44);
  EXPECT_EQ(match("abcx"), 12);
  EXPECT_EQ(match("ab"), 12);
  EXPECT_EQ(match("a"), -1);
  EXPECT_EQ(match("bab"), 31);
  EXPECT_EQ(match("\xFF\xFF"), 51);
  EXPECT_EQ(match(""), -1);
  EXPECT_EQ(PieceMatcher().LongestPrefix("a"), std::nullopt);
}

}  // namespace
}  // namespace stagecoach
