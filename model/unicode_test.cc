#include "model/unicode.h"

#include <string>

#include "gtest/gtest.h"

namespace stagecoach {
namespace {

bool IsScalar(uint32_t code) { return code < 0xD800 || (code > 0xDFFF && code <= 0x10FFFF); }

TEST(UnicodeTest, EveryScalarValueRoundTrips) {
  for (uint32_t code = 0; code <= 0x10FFFF; ++code) {
    if (!IsScalar(code)) continue;
    std::string text;
    AppendUtf8(code, &text);
    const Utf8Character character = FirstUtf8Character(text + "x");
    ASSERT_EQ(character.status, Utf8Status::kValid) << code;
    ASSERT_EQ(character.length, text.size()) << code;
    ASSERT_EQ(character.code, code);
    for (size_t cut = 1; cut < text.size(); ++cut) {
      const Utf8Character part = FirstUtf8Character(text.substr(0, cut));
      ASSERT_EQ(part.status, Utf8Status::kIncomplete) << code;
      ASSERT_EQ(part.length, cut) << code;
    }
  }
}

TEST(UnicodeTest, KnownEncodings) {
  std::string text;
  for (uint32_t code : {0x24u, 0xA3u, 0x20ACu, 0x1F999u}) AppendUtf8(code, &text);
  EXPECT_EQ(text, "$£€🦙");
}

TEST(UnicodeTest, InvalidBytesTakeTheirMaximalSubpart) {
  struct Case {
    std::string text;
    size_t length;
  };
  for (const Case& c : {
           Case{"\x80", 1},              // a continuation byte alone
           Case{"\xC0\xAF", 1},          // over-long
           Case{"\xC1\xBF", 1},          //
           Case{"\xE0\x80\xAF", 1},      // over-long, three bytes
           Case{"\xED\xA0\x80", 1},      // a surrogate
           Case{"\xF4\x90\x80\x80", 1},  // above U+10FFFF
           Case{"\xF5\x80\x80\x80", 1},  //
           Case{"\xFF", 1},              //
           Case{"\xE2\x82x", 2},         // a character broken off by another
           Case{"\xF0\x9F\xA6x", 3},     //
           Case{"\xC3x", 1},             //
       }) {
    const Utf8Character character = FirstUtf8Character(c.text);
    EXPECT_EQ(character.status, Utf8Status::kInvalid) << c.text;
    EXPECT_EQ(character.length, c.length) << c.text;
  }
}

TEST(UnicodeTest, ValidPrefixEndsAtTheFirstBadByte) {
  EXPECT_EQ(ValidUtf8Prefix(""), 0u);
  EXPECT_EQ(ValidUtf8Prefix("héllo"), 6u);
  EXPECT_EQ(ValidUtf8Prefix("h\xC3\xA9\xFFo"), 3u);
  EXPECT_EQ(ValidUtf8Prefix("ab\xE2\x82"), 2u);
}

TEST(UnicodeTest, ReplaceAll) {
  EXPECT_EQ(ReplaceAll(" a  b ", " ", kEscapedSpace), "▁a▁▁b▁");
  EXPECT_EQ(ReplaceAll("▁a▁▁b▁", kEscapedSpace, " "), " a  b ");
  EXPECT_EQ(ReplaceAll("", "x", "y"), "");
  EXPECT_EQ(ReplaceAll("aaa", "aa", "b"), "ba");
}

}  // namespace
}  // namespace stagecoach
