#include "model/unicode.h"

namespace stagecoach {
namespace {

// What a lead byte announces: how many bytes follow, and the range of the first of them (the ranges
// are what keeps out over-long forms, surrogates and codes above U+10FFFF).
struct Lead {
  size_t following;
  uint8_t low;
  uint8_t high;
};

bool FindLead(uint8_t byte, Lead* lead) {
  if (byte >= 0xC2 && byte <= 0xDF) {
    *lead = {1, 0x80, 0xBF};
  } else if (byte >= 0xE0 && byte <= 0xEF) {
    *lead = {2, static_cast<uint8_t>(byte == 0xE0 ? 0xA0 : 0x80),
             static_cast<uint8_t>(byte == 0xED ? 0x9F : 0xBF)};
  } else if (byte >= 0xF0 && byte <= 0xF4) {
    *lead = {3, static_cast<uint8_t>(byte == 0xF0 ? 0x90 : 0x80),
             static_cast<uint8_t>(byte == 0xF4 ? 0x8F : 0xBF)};
  } else {
    return false;
  }
  return true;
}

}  // namespace

Utf8Character FirstUtf8Character(std::string_view text) {
  const uint8_t first = static_cast<uint8_t>(text[0]);
  if (first < 0x80) return {Utf8Status::kValid, 1, first};
  Lead lead;
  if (!FindLead(first, &lead)) return {Utf8Status::kInvalid, 1, 0};
  uint32_t code = first & (0x3Fu >> lead.following);
  for (size_t i = 1; i <= lead.following; ++i) {
    if (i == text.size()) return {Utf8Status::kIncomplete, i, 0};
    const uint8_t byte = static_cast<uint8_t>(text[i]);
    const uint8_t low = i == 1 ? lead.low : 0x80;
    const uint8_t high = i == 1 ? lead.high : 0xBF;
    if (byte < low || byte > high) return {Utf8Status::kInvalid, i, 0};
    code = code << 6 | (byte & 0x3F);
  }
  return {Utf8Status::kValid, lead.following + 1, code};
}

size_t ValidUtf8Prefix(std::string_view text) {
  size_t pos = 0;
  while (pos < text.size()) {
    const Utf8Character character = FirstUtf8Character(text.substr(pos));
    if (character.status != Utf8Status::kValid) break;
    pos += character.length;
  }
  return pos;
}

void AppendUtf8(uint32_t code, std::string* out) {
  if (code < 0x80) {
    out->push_back(static_cast<char>(code));
    return;
  }
  const int following = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
  out->push_back(static_cast<char>((0xFF00 >> (following + 1)) | (code >> (6 * following))));
  for (int i = following - 1; i >= 0; --i) {
    out->push_back(static_cast<char>(0x80 | ((code >> (6 * i)) & 0x3F)));
  }
}

std::string ReplaceAll(std::string_view text, std::string_view from, std::string_view to) {
  std::string result;
  result.reserve(text.size());
  size_t pos = 0;
  for (size_t hit; (hit = text.find(from, pos)) != std::string_view::npos;
       pos = hit + from.size()) {
    result.append(text.substr(pos, hit - pos)).append(to);
  }
  return result.append(text.substr(pos));
}

}  // namespace stagecoach
