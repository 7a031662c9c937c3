// UTF-8 as the tokenisers need it: one character at a time out of bytes that may be anything.
#ifndef STAGECOACH_MODEL_UNICODE_H_
#define STAGECOACH_MODEL_UNICODE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace stagecoach {

inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";  // U+FFFD
inline constexpr std::string_view kEscapedSpace = "\xE2\x96\x81";          // U+2581

enum class Utf8Status {
  kValid,
  kInvalid,     // no continuation can make these bytes a character
  kIncomplete,  // the text ends inside a character that is valid so far
};

struct Utf8Character {
  Utf8Status status = Utf8Status::kInvalid;
  // Bytes used, >= 1. kInvalid: the "maximal subpart" of the Unicode standard (section 3.9), which
  // one U+FFFD replaces. kIncomplete: all that is left of the text.
  size_t length = 1;
  uint32_t code = 0;  // kValid only
};

// The first character of `text`, which must not be empty. Surrogates, over-long forms and codes
// above U+10FFFF are invalid (Unicode standard, table 3-7).
Utf8Character FirstUtf8Character(std::string_view text);

// Bytes of the longest valid prefix of `text`.
size_t ValidUtf8Prefix(std::string_view text);

// Appends the UTF-8 form of `code`, which must be a Unicode scalar value.
void AppendUtf8(uint32_t code, std::string* out);

// Every occurrence of `from` (not empty) in `text` replaced by `to`.
std::string ReplaceAll(std::string_view text, std::string_view from, std::string_view to);

}  // namespace stagecoach

#endif  // STAGECOACH_MODEL_UNICODE_H_
