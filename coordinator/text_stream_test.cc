#include "coordinator/text_stream.h"

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "gtest/gtest.h"
#include "model/tokenizer_test_vocab.h"

namespace stagecoach {
namespace {

// Byte-level: the id of a byte is the byte. 256 is a control token.
class TextStreamTest : public testing::Test {
 protected:
  TextStreamTest() {
    auto tokenizer = MakeBpeGguf("gpt-2", {{"<|im_end|>", 0, kControlType}}, {}).MakeTokenizer();
    EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
    tokenizer_ = *std::move(tokenizer);
  }

  static std::string PushAll(TextStream* stream, std::string_view bytes) {
    std::string shown;
    for (const char byte : bytes) shown += stream->Push(static_cast<uint8_t>(byte)).text;
    return shown;
  }

  std::unique_ptr<Tokenizer> tokenizer_;
};

TEST_F(TextStreamTest, WholeCharactersAndStops) {
  TextStream stream(tokenizer_.get(), {.stops = {"🦙🦙", "END"}});
  EXPECT_EQ(PushAll(&stream, "a🔥"), "a🔥");
  EXPECT_EQ(PushAll(&stream, "🦙"), "");  // may be the start of a stop
  EXPECT_EQ(PushAll(&stream, "E"), "🦙");
  EXPECT_EQ(PushAll(&stream, "N"), "");
  const TextStream::Output last = stream.Push('D');
  EXPECT_EQ(last.text, "");
  EXPECT_EQ(last.stop_index, 1u);
  EXPECT_EQ(PushAll(&stream, "more"), "");
  EXPECT_EQ(stream.Flush().text, "");
}

TEST_F(TextStreamTest, IncludeStop) {
  TextStream stream(tokenizer_.get(), {.stops = {"END"}, .include_stop = true});
  EXPECT_EQ(PushAll(&stream, "xEND"), "xEND");
}

TEST_F(TextStreamTest, FlushGivesWhatWasHeldBack) {
  TextStream stream(tokenizer_.get(), {.stops = {"END"}});
  EXPECT_EQ(PushAll(&stream, "xEN\xF0\x9F"), "x");
  const TextStream::Output last = stream.Flush();
  EXPECT_EQ(last.text, "EN\uFFFD");
  EXPECT_EQ(last.stop_index, std::nullopt);
}

TEST_F(TextStreamTest, ABrokenCharacterMayCompleteAStop) {
  TextStream stream(tokenizer_.get(), {.stops = {"x\uFFFD"}});
  EXPECT_EQ(PushAll(&stream, "ax\xF0"), "a");
  const TextStream::Output last = stream.Flush();
  EXPECT_EQ(last.text, "");
  EXPECT_EQ(last.stop_index, 0u);
}

TEST_F(TextStreamTest, ControlTokensShowOnRequest) {
  TextStream hidden(tokenizer_.get(), {});
  EXPECT_EQ(hidden.Push(256).text, "");
  TextStream shown(tokenizer_.get(), {.render_special = true});
  EXPECT_EQ(shown.Push(256).text, "<|im_end|>");
}

}  // namespace
}  // namespace stagecoach
