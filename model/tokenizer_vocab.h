// The vocabulary in a GGUF file, read and checked: what both kinds of tokeniser start from. Private
// to the tokenisers.
#ifndef STAGECOACH_MODEL_TOKENIZER_VOCAB_H_
#define STAGECOACH_MODEL_TOKENIZER_VOCAB_H_

#include <bitset>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "model/gguf.h"
#include "model/tokenizer.h"

namespace stagecoach {

inline constexpr std::string_view kTokensKey = "tokenizer.ggml.tokens";
inline constexpr std::string_view kScoresKey = "tokenizer.ggml.scores";
inline constexpr std::string_view kTokenTypeKey = "tokenizer.ggml.token_type";
inline constexpr std::string_view kMergesKey = "tokenizer.ggml.merges";

// Longer pieces are refused: no real one comes near, and the cost of a look-up is its length.
inline constexpr size_t kMaxPieceBytes = 64 << 10;

// What differs between the kinds of tokeniser when a key is absent. An id holds only if that token
// is a control token, or the unknown token.
struct VocabDefaults {
  bool required_scores_and_types = false;
  int32_t bos_id = -1;
  int32_t eos_id = -1;
  int32_t unknown_id = -1;
  bool add_bos = false;
};

// [n] arrays are indexed by token id.
struct Vocab {
  std::vector<std::string> pieces;  // [n] as in the file
  std::vector<float> scores;        // [n], or empty if the file has none; no NaN
  std::vector<TokenKind> kinds;     // [n]
  // Piece -> id for what plain text may become: normal, user-defined and unused pieces. Views into
  // `pieces`, so a Vocab must not be copied while they are in use (moving is fine).
  std::unordered_map<std::string_view, int32_t> text_ids;
  int32_t bos_id = -1;  // -1 = none, here and below
  int32_t eos_id = -1;
  int32_t unknown_id = -1;
  std::vector<int32_t> end_ids;  // sorted; the tokens that end a generation
  bool add_bos = false;
  bool add_eos = false;

  Vocab() = default;
  Vocab(Vocab&&) = default;
  Vocab& operator=(Vocab&&) = default;
  Vocab(const Vocab&) = delete;
  Vocab& operator=(const Vocab&) = delete;

  int size() const { return static_cast<int>(pieces.size()); }
  int32_t FindText(std::string_view piece) const {  // -1 = no such piece
    const auto it = text_ids.find(piece);
    return it == text_ids.end() ? -1 : it->second;
  }
};

// Errors: kMissingKey, kBadVocab naming the key and the index. A user-defined piece that looks like
// a chat marker ("<|user|>", "</s>") is taken as control, so that plain text cannot forge it.
absl::StatusOr<Vocab> ReadVocab(const GgufFile& gguf, const VocabDefaults& defaults);

// A file whose array is of another type than wanted (kBadType) has a bad vocabulary; other errors
// stay as they are.
absl::Status AsBadVocab(const absl::Status& status);

// "<0x0A>" -> 10; nullopt if `piece` is not of that form.
std::optional<uint8_t> ParseBytePiece(std::string_view piece);

// A set of pieces that are found in a text as they stand.
class PieceMatcher {
 public:
  PieceMatcher() = default;
  // Pairs of text and id, in any order; no text is empty.
  explicit PieceMatcher(std::vector<std::pair<std::string, int32_t>> pieces);

  struct Match {
    size_t length;
    int32_t id;
  };
  // The longest piece with which `text` starts.
  std::optional<Match> LongestPrefix(std::string_view text) const;

 private:
  std::vector<std::pair<std::string, int32_t>> pieces_;  // sorted by text
  std::bitset<256> first_bytes_;
};

// The pieces of `vocab` whose kind is in `kinds`, as they stand in the file.
PieceMatcher MakePieceMatcher(const Vocab& vocab, std::vector<TokenKind> kinds);

}  // namespace stagecoach

#endif  // STAGECOACH_MODEL_TOKENIZER_VOCAB_H_
