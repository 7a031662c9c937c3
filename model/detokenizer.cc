// Tokens back into text: Tokenizer::Decode and Detokenizer.
#include <string>
#include <string_view>
#include <utility>

#include "fmt/format.h"
#include "model/tokenizer.h"
#include "model/unicode.h"

namespace stagecoach {
namespace {

// The piece of `id`, without its leading space if it is the first of a text to show anything.
std::string PieceInText(const Tokenizer& tokenizer, int32_t id, bool render_special,
                        bool* at_start) {
  std::string piece = tokenizer.Piece(id, render_special);
  if (piece.empty() || !*at_start) return piece;
  *at_start = false;
  if (piece[0] == ' ') piece.erase(0, 1);
  return piece;
}

}  // namespace

absl::StatusOr<std::string> Tokenizer::Decode(std::span<const int32_t> ids,
                                              bool render_special) const {
  std::string text;
  bool at_start = strip_leading_space_;
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= vocab_size()) {
      return absl::OutOfRangeError(
          fmt::format("token {} at position {} in a vocabulary of {}", ids[i], i, vocab_size()));
    }
    text += PieceInText(*this, ids[i], render_special, &at_start);
  }
  return text;
}

Detokenizer::Detokenizer(const Tokenizer* tokenizer, bool at_start, bool render_special)
    : tokenizer_(tokenizer),
      at_start_(at_start && tokenizer->strips_leading_space()),
      render_special_(render_special) {}

std::string Detokenizer::Push(int32_t id) {
  held_ += PieceInText(*tokenizer_, id, render_special_, &at_start_);
  std::string text;
  std::string_view rest = held_;
  while (!rest.empty()) {
    const Utf8Character character = FirstUtf8Character(rest);
    if (character.status == Utf8Status::kIncomplete) break;
    text += character.status == Utf8Status::kValid ? rest.substr(0, character.length)
                                                   : kReplacementCharacter;
    rest.remove_prefix(character.length);
  }
  held_.erase(0, held_.size() - rest.size());
  return text;
}

std::string Detokenizer::Flush() {
  const bool incomplete = !std::exchange(held_, "").empty();
  return incomplete ? std::string(kReplacementCharacter) : std::string();
}

}  // namespace stagecoach
