// The two algorithms on vocabularies small enough to follow by hand, and the way back to text.
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/tokenizer.h"
#include "model/tokenizer_test_vocab.h"

namespace stagecoach {
namespace {

using testing::ElementsAre;

std::unique_ptr<Tokenizer> Make(const TestGguf& gguf) {
  auto tokenizer = gguf.MakeTokenizer();
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return *std::move(tokenizer);
}

std::vector<int32_t> Encode(const Tokenizer& tokenizer, std::string_view text,
                            EncodeOptions options = {}) {
  auto ids = tokenizer.Encode(text, options);
  EXPECT_TRUE(ids.ok()) << ids.status();
  return *std::move(ids);
}

// Ids of SPM pieces: the n-th piece given to MakeSpmGguf.
constexpr int32_t P(int n) { return kTestFirstPieceId + n; }
constexpr int32_t Byte(int byte) { return kTestFirstByteId + byte; }

TEST(SpmTest, BestScoreFirstThenLeftmost) {
  // "▁abc": bc (-1) beats ab (-2), so a stays alone although ab is further left.
  const auto tokenizer =
      Make(MakeSpmGguf({{"▁", -9}, {"a", -9}, {"b", -9}, {"c", -9}, {"ab", -2}, {"bc", -1}}));
  EXPECT_THAT(Encode(*tokenizer, "abc"), ElementsAre(P(0), P(1), P(5)));
  // Equal scores: "aaa" becomes aa + a.
  const auto even = Make(MakeSpmGguf({{"▁", -9}, {"a", -9}, {"aa", -1}}));
  EXPECT_THAT(Encode(*even, "aaa"), ElementsAre(P(0), P(2), P(1)));
}

TEST(SpmTest, SpacePrefix) {
  const std::vector<TestPiece> pieces = {{"▁", -9}, {"a", -9}, {"▁a", -1}};
  const auto with = Make(MakeSpmGguf(pieces));
  EXPECT_THAT(Encode(*with, "a a"), ElementsAre(P(2), P(2)));
  EXPECT_TRUE(Encode(*with, "").empty());
  EXPECT_EQ(*with->Decode(std::vector<int32_t>{1, P(2), P(2)}, false), "a a");
  EXPECT_EQ(*with->Decode(std::vector<int32_t>{1, P(2)}, true), "<s> a");
  const auto without = Make(MakeSpmGguf(pieces).Set("tokenizer.ggml.add_space_prefix", false));
  EXPECT_THAT(Encode(*without, "a a"), ElementsAre(P(1), P(2)));
  EXPECT_EQ(*without->Decode(std::vector<int32_t>{P(2)}, false), " a");
}

TEST(SpmTest, ByteFallbackAndUnknown) {
  const auto tokenizer = Make(MakeSpmGguf({{"▁", -1}, {"b"}}));
  EXPECT_THAT(Encode(*tokenizer, "é\xFF"), ElementsAre(P(0), Byte(0xC3), Byte(0xA9), Byte(0xFF)));
  // Without byte pieces each unknown character is one <unk>.
  TestGguf gguf;
  gguf.Set("tokenizer.ggml.model", "llama")
      .Set("tokenizer.ggml.tokens", std::vector<std::string>{"<unk>", "▁", "b"})
      .Set("tokenizer.ggml.scores", std::vector<float>{0, 0, 0})
      .Set("tokenizer.ggml.token_type",
           std::vector<int32_t>{kUnknownType, kNormalType, kNormalType})
      .Set("tokenizer.ggml.add_bos_token", false);
  EXPECT_THAT(Encode(*Make(gguf), "éb\xFF"), ElementsAre(1, 0, 2, 0));
}

TEST(SpmTest, ControlAndBytePiecesAreNotForText) {
  const auto tokenizer = Make(MakeSpmGguf({{"▁", -1}, {"a", -1}}));
  const std::vector<int32_t> plain = Encode(*tokenizer, "</s><0x41>");
  for (const int32_t id : plain) EXPECT_NE(id, 2);
  EXPECT_THAT(plain, testing::Not(testing::Contains(Byte(0x41))));
  EXPECT_EQ(*tokenizer->Decode(plain, false), "</s><0x41>");
  // With parse_special each stretch of text gets its own space in front.
  EXPECT_THAT(Encode(*tokenizer, "<s>a</s>a", {.parse_special = true}),
              ElementsAre(1, P(0), P(1), 2, P(0), P(1)));
}

TEST(SpmTest, UserDefinedPiecesStayWhole) {
  const auto tokenizer = Make(MakeSpmGguf({{"▁", -9},
                                           {"a", -9},
                                           {"<t>", 0, kUserDefinedType},
                                           {"<t>a", -1},
                                           {"  ", 0, kUserDefinedType},
                                           {"▁a", -1}}));
  EXPECT_THAT(Encode(*tokenizer, "a<t>a"), ElementsAre(P(5), P(2), P(1)));
  EXPECT_THAT(Encode(*tokenizer, "<t>"), ElementsAre(P(0), P(2)));
  // The space in front and the first of the text make the user-defined pair of spaces.
  EXPECT_THAT(Encode(*tokenizer, " a"), ElementsAre(P(4), P(1)));
  EXPECT_EQ(*tokenizer->Decode(Encode(*tokenizer, " a<t>"), false), " a<t>");
}

TEST(SpmTest, UnusedPiecesAreTakenApartAgain) {
  const auto tokenizer = Make(MakeSpmGguf(
      {{"▁", -9}, {"a", -9}, {"b", -9}, {"c", -9}, {"ab", -1, kUnusedType}, {"abc", -2}}));
  EXPECT_THAT(Encode(*tokenizer, "abc"), ElementsAre(P(0), P(5)));       // a step towards abc
  EXPECT_THAT(Encode(*tokenizer, "ab"), ElementsAre(P(0), P(1), P(2)));  // not a result
}

TEST(SpmTest, UserDefinedMarkersCannotBeForged) {
  const auto tokenizer = Make(MakeSpmGguf({{"<|user|>", 0, kUserDefinedType}}));
  EXPECT_EQ(tokenizer->kind(P(0)), TokenKind::kControl);
  EXPECT_THAT(Encode(*tokenizer, "<|user|>"), testing::Not(testing::Contains(P(0))));
  EXPECT_THAT(Encode(*tokenizer, "<|user|>", {.parse_special = true}), ElementsAre(P(0)));
}

TEST(SpmTest, Pieces) {
  const auto tokenizer = Make(MakeSpmGguf({{"▁a▁"}, {"z", 0, kUnusedType}}));
  EXPECT_EQ(tokenizer->Piece(P(0), false), " a ");
  EXPECT_EQ(tokenizer->Piece(P(1), false), "");
  EXPECT_EQ(tokenizer->Piece(Byte(0xC3), false), "\xC3");
  EXPECT_EQ(tokenizer->Piece(1, false), "");
  EXPECT_EQ(tokenizer->Piece(1, true), "<s>");
  EXPECT_EQ(tokenizer->Piece(0, false), "");
}

TEST(BpeTest, EarliestMergeFirstThenLeftmost) {
  // Ids from 256: ab, bc, abc, aa.
  const std::vector<TestPiece> pieces = {{"ab"}, {"bc"}, {"abc"}, {"aa"}};
  const auto ab_first = Make(MakeBpeGguf("gpt-2", pieces, {"a b", "b c", "ab c"}));
  EXPECT_THAT(Encode(*ab_first, "abc"), ElementsAre(258));
  const auto bc_first = Make(MakeBpeGguf("gpt-2", pieces, {"b c", "a b", "ab c", "a a"}));
  EXPECT_THAT(Encode(*bc_first, "abc"), ElementsAre('a', 257));  // no merge "a bc"
  EXPECT_THAT(Encode(*bc_first, "aaa"), ElementsAre(259, 'a'));
}

TEST(BpeTest, WordsBoundMerges) {
  const auto tokenizer = Make(MakeBpeGguf("gpt-2", {{"aĠ"}, {"Ġa"}}, {"a Ġ", "Ġ a"}));
  EXPECT_THAT(Encode(*tokenizer, "a a"), ElementsAre('a', 257));
}

TEST(BpeTest, WholeWordsOnlyWhereThePreTokenizerSaysSo) {
  const std::vector<TestPiece> pieces = {{"abc"}};  // no merge leads there
  EXPECT_THAT(Encode(*Make(MakeBpeGguf("gpt-2", pieces, {})), "abc"), ElementsAre('a', 'b', 'c'));
  EXPECT_THAT(Encode(*Make(MakeBpeGguf("llama-bpe", pieces, {})), "abc"), ElementsAre(256));
}

TEST(BpeTest, EveryByteIsItsOwnToken) {
  const auto tokenizer = Make(MakeBpeGguf("", {}, {}));  // no pre: the default one
  for (int byte = 0; byte < 256; ++byte) {
    const std::string text(1, static_cast<char>(byte));
    EXPECT_THAT(Encode(*tokenizer, text), ElementsAre(byte));
    EXPECT_EQ(tokenizer->Piece(byte, false), text);
  }
}

TEST(BpeTest, Specials) {
  const auto tokenizer = Make(MakeBpeGguf("gpt-2",
                                          {{"<|im_end|>", 0, kControlType},
                                           {"<think>", 0, kUserDefinedType},
                                           {"<think>x", 0, kControlType}},
                                          {}));
  const std::vector<int32_t> plain = Encode(*tokenizer, "<|im_end|><think>");
  EXPECT_THAT(plain, testing::SizeIs(11));  // ten bytes and the user-defined piece
  EXPECT_EQ(plain.back(), 257);
  EXPECT_THAT(Encode(*tokenizer, "a<|im_end|><think>x<think>y", {.parse_special = true}),
              ElementsAre('a', 256, 258, 257, 'y'));
  EXPECT_EQ(tokenizer->Piece(256, false), "");
  EXPECT_EQ(tokenizer->Piece(256, true), "<|im_end|>");
  EXPECT_EQ(tokenizer->Piece(257, false), "<think>");
  EXPECT_TRUE(tokenizer->IsEndOfGeneration(256));
}

TEST(BpeTest, MissingBytesBecomeUnknownOrNothing) {
  TestGguf gguf;
  gguf.Set("tokenizer.ggml.model", "gpt2")
      .Set("tokenizer.ggml.tokens", std::vector<std::string>{"a", "?"})
      .Set("tokenizer.ggml.merges", std::vector<std::string>{});
  EXPECT_THAT(Encode(*Make(gguf), "ab"), ElementsAre(0));
  gguf.Set("tokenizer.ggml.unknown_token_id", 1u);
  EXPECT_THAT(Encode(*Make(gguf), "ab"), ElementsAre(0, 1));
}

TEST(DetokenizerTest, HoldsBackIncompleteCharacters) {
  const auto tokenizer = Make(MakeBpeGguf("gpt-2", {}, {}));
  Detokenizer detokenizer(tokenizer.get(), /*at_start=*/true);
  EXPECT_EQ(detokenizer.Push('x'), "x");
  EXPECT_EQ(detokenizer.Push(0xF0), "");
  EXPECT_EQ(detokenizer.Push(0x9F), "");
  EXPECT_EQ(detokenizer.Push(0xA6), "");
  EXPECT_EQ(detokenizer.Push(0x99), "🦙");
  EXPECT_EQ(detokenizer.Flush(), "");
}

TEST(DetokenizerTest, ReplacesHopelessBytes) {
  const auto tokenizer = Make(MakeBpeGguf("gpt-2", {}, {}));
  Detokenizer detokenizer(tokenizer.get(), true);
  EXPECT_EQ(detokenizer.Push(0xFF), "\uFFFD");
  EXPECT_EQ(detokenizer.Push(0xE2), "");
  EXPECT_EQ(detokenizer.Push(0x82), "");
  EXPECT_EQ(detokenizer.Push('x'), "\uFFFDx");
  EXPECT_EQ(detokenizer.Push(0xE2), "");
  EXPECT_EQ(detokenizer.Push(0xC3), "\uFFFD");
  EXPECT_EQ(detokenizer.Flush(), "\uFFFD");
  EXPECT_EQ(detokenizer.Flush(), "");
}

TEST(DetokenizerTest, DropsOneSpaceAtTheStartOnly) {
  const auto tokenizer = Make(MakeSpmGguf({{"▁a"}, {"▁▁"}}));
  Detokenizer at_start(tokenizer.get(), true);
  EXPECT_EQ(at_start.Push(1), "");  // <s> does not count
  EXPECT_EQ(at_start.Push(P(1)), " ");
  EXPECT_EQ(at_start.Push(P(0)), " a");
  Detokenizer continued(tokenizer.get(), false);
  EXPECT_EQ(continued.Push(P(0)), " a");
  Detokenizer special(tokenizer.get(), true, /*render_special=*/true);
  EXPECT_EQ(special.Push(1), "<s>");
  EXPECT_EQ(special.Push(P(0)), " a");
}

TEST(DetokenizerTest, StreamsWhatDecodeGives) {
  const auto tokenizer = Make(MakeSpmGguf({{"▁", -1}, {"e", -1}, {"▁e", 0}}));
  for (uint32_t seed = 0; seed < 100; ++seed) {
    const std::string text = RandomText(seed, 30);
    Detokenizer detokenizer(tokenizer.get(), true);
    std::string streamed;
    for (const int32_t id : Encode(*tokenizer, text)) streamed += detokenizer.Push(id);
    ASSERT_EQ(streamed + detokenizer.Flush(), text);
  }
}

}  // namespace
}  // namespace stagecoach
