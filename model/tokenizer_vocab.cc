#include "model/tokenizer_vocab.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "fmt/format.h"
#include "model/model_error.h"
#include "model/status_macros.h"

namespace stagecoach {
namespace {

// Control pieces that end a turn or a text in the models that people run.
constexpr std::array<std::string_view, 9> kEndPieces = {
    "</s>",          "<|eot_id|>",      "<|eom_id|>",    "<|im_end|>",           "<|end|>",
    "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "<｜end▁of▁sentence｜>"};

absl::Status BadVocab(const std::string& message) {
  return MakeModelError(ModelError::kBadVocab,
                        message + "; the file is damaged or was badly converted: get it anew");
}

absl::Status ReadPieces(const GgufFile& gguf, Vocab* vocab) {
  const absl::StatusOr<const std::vector<std::string>*> tokens = gguf.StringArray(kTokensKey);
  if (!tokens.ok()) return AsBadVocab(tokens.status());
  if (*tokens == nullptr) {
    return MakeModelError(ModelError::kMissingKey,
                          fmt::format("{}: the file has no vocabulary", kTokensKey));
  }
  if ((*tokens)->empty()) return BadVocab(fmt::format("{}: no entries", kTokensKey));
  for (size_t i = 0; i < (*tokens)->size(); ++i) {
    const size_t bytes = (**tokens)[i].size();
    if (bytes > kMaxPieceBytes) {
      return BadVocab(fmt::format("{}[{}]: a piece of {} bytes, more than the limit of {}",
                                  kTokensKey, i, bytes, kMaxPieceBytes));
    }
  }
  vocab->pieces = **tokens;
  return absl::OkStatus();
}

absl::Status CheckCount(std::string_view key, size_t count, size_t tokens) {
  if (count == tokens) return absl::OkStatus();
  return BadVocab(fmt::format("{}: {} entries for {} tokens", key, count, tokens));
}

absl::Status ReadScores(const GgufFile& gguf, bool required, Vocab* vocab) {
  const absl::StatusOr<const std::vector<float>*> scores = gguf.FloatArray(kScoresKey);
  if (!scores.ok()) return AsBadVocab(scores.status());
  if (*scores == nullptr) {
    if (!required) return absl::OkStatus();
    return MakeModelError(ModelError::kMissingKey, fmt::format("{}", kScoresKey));
  }
  STAGECOACH_RETURN_IF_ERROR(CheckCount(kScoresKey, (*scores)->size(), vocab->pieces.size()));
  for (size_t i = 0; i < (*scores)->size(); ++i) {
    if (std::isnan((**scores)[i])) return BadVocab(fmt::format("{}[{}]: NaN", kScoresKey, i));
  }
  vocab->scores = **scores;
  return absl::OkStatus();
}

bool IsEndPiece(std::string_view piece) {
  return std::find(kEndPieces.begin(), kEndPieces.end(), piece) != kEndPieces.end();
}

bool LooksLikeMarker(std::string_view piece) {
  return IsEndPiece(piece) ||
         (piece.size() > 4 && piece.substr(0, 2) == "<|" && piece.substr(piece.size() - 2) == "|>");
}

// The numbers are those of the GGUF specification; 0 is "undefined".
std::optional<TokenKind> ToTokenKind(int64_t type) {
  constexpr std::array kKinds = {TokenKind::kUnused,  TokenKind::kNormal,      TokenKind::kUnknown,
                                 TokenKind::kControl, TokenKind::kUserDefined, TokenKind::kUnused,
                                 TokenKind::kByte};
  if (type < 0 || type >= static_cast<int64_t>(kKinds.size())) return std::nullopt;
  return kKinds[static_cast<size_t>(type)];
}

absl::Status ReadKinds(const GgufFile& gguf, bool required, Vocab* vocab) {
  const absl::StatusOr<std::optional<std::vector<int64_t>>> types = gguf.IntArray(kTokenTypeKey);
  if (!types.ok()) return AsBadVocab(types.status());
  vocab->kinds.assign(vocab->pieces.size(), TokenKind::kNormal);
  if (!types->has_value()) {
    if (!required) return absl::OkStatus();
    return MakeModelError(ModelError::kMissingKey, fmt::format("{}", kTokenTypeKey));
  }
  const std::vector<int64_t>& values = **types;
  STAGECOACH_RETURN_IF_ERROR(CheckCount(kTokenTypeKey, values.size(), vocab->pieces.size()));
  for (size_t i = 0; i < values.size(); ++i) {
    const std::optional<TokenKind> kind = ToTokenKind(values[i]);
    if (!kind) {
      return BadVocab(fmt::format("{}[{}]: {} is not a token type", kTokenTypeKey, i, values[i]));
    }
    const bool forgeable = *kind == TokenKind::kUserDefined && LooksLikeMarker(vocab->pieces[i]);
    vocab->kinds[i] = forgeable ? TokenKind::kControl : *kind;
    if (*kind == TokenKind::kByte && !ParseBytePiece(vocab->pieces[i])) {
      return BadVocab(fmt::format("{}[{}]: a byte token must be written <0xXX>", kTokensKey, i));
    }
  }
  return absl::OkStatus();
}

// Two pieces that the same text could mean are an error; a control piece and a normal one are told
// apart by EncodeOptions::parse_special. Empty pieces never match a text.
absl::Status IndexPieces(Vocab* vocab) {
  std::unordered_map<std::string_view, int32_t> special_ids;
  for (int32_t id = 0; id < vocab->size(); ++id) {
    const std::string_view piece = vocab->pieces[id];
    const TokenKind kind = vocab->kinds[id];
    if (piece.empty()) continue;
    const bool from_text =
        kind == TokenKind::kNormal || kind == TokenKind::kUserDefined || kind == TokenKind::kUnused;
    const auto [it, is_new] = (from_text ? vocab->text_ids : special_ids).emplace(piece, id);
    if (!is_new) {
      return BadVocab(
          fmt::format("{}[{}]: the same piece as that of token {}", kTokensKey, id, it->second));
    }
  }
  return absl::OkStatus();
}

// The token id under `key`; if the key is absent `fallback`, provided that this token is of `kind`.
absl::Status ReadTokenId(const GgufFile& gguf, std::string_view key, int32_t fallback,
                         TokenKind kind, const Vocab& vocab, int32_t* id) {
  const absl::StatusOr<std::optional<uint64_t>> value = gguf.Uint(key);
  if (!value.ok()) return AsBadVocab(value.status());
  if (!value->has_value()) {
    const bool fits = fallback >= 0 && fallback < vocab.size() && vocab.kinds[fallback] == kind;
    *id = fits ? fallback : -1;
    return absl::OkStatus();
  }
  if (**value >= static_cast<uint64_t>(vocab.size())) {
    return BadVocab(fmt::format("{}: token {} in a vocabulary of {}", key, **value, vocab.size()));
  }
  *id = static_cast<int32_t>(**value);
  return absl::OkStatus();
}

absl::Status ReadSpecialIds(const GgufFile& gguf, const VocabDefaults& defaults, Vocab* vocab) {
  int32_t end_of_turn = -1;
  int32_t end_of_message = -1;
  struct Entry {
    std::string_view key;
    int32_t fallback;
    TokenKind fallback_kind;
    int32_t* id;
  };
  const Entry entries[] = {
      {"tokenizer.ggml.bos_token_id", defaults.bos_id, TokenKind::kControl, &vocab->bos_id},
      {"tokenizer.ggml.eos_token_id", defaults.eos_id, TokenKind::kControl, &vocab->eos_id},
      {"tokenizer.ggml.unknown_token_id", defaults.unknown_id, TokenKind::kUnknown,
       &vocab->unknown_id},
      {"tokenizer.ggml.eot_token_id", -1, TokenKind::kControl, &end_of_turn},
      {"tokenizer.ggml.eom_token_id", -1, TokenKind::kControl, &end_of_message},
  };
  for (const Entry& entry : entries) {
    STAGECOACH_RETURN_IF_ERROR(
        ReadTokenId(gguf, entry.key, entry.fallback, entry.fallback_kind, *vocab, entry.id));
  }
  for (const int32_t id : {vocab->eos_id, end_of_turn, end_of_message}) {
    if (id >= 0) vocab->end_ids.push_back(id);
  }
  for (int32_t id = 0; id < vocab->size(); ++id) {
    if (vocab->kinds[id] == TokenKind::kControl && IsEndPiece(vocab->pieces[id])) {
      vocab->end_ids.push_back(id);
    }
  }
  std::sort(vocab->end_ids.begin(), vocab->end_ids.end());
  vocab->end_ids.erase(std::unique(vocab->end_ids.begin(), vocab->end_ids.end()),
                       vocab->end_ids.end());
  return absl::OkStatus();
}

// Whether to add the token `id`: as `key` says, else `fallback` if there is such a token.
absl::Status ReadAddFlag(const GgufFile& gguf, std::string_view key, bool fallback, int32_t id,
                         bool* add) {
  const absl::StatusOr<std::optional<bool>> value = gguf.Bool(key);
  if (!value.ok()) return AsBadVocab(value.status());
  *add = value->value_or(fallback && id >= 0);
  if (*add && id < 0) {
    return BadVocab(fmt::format("{}: true, but the file names no such token", key));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Vocab> ReadVocab(const GgufFile& gguf, const VocabDefaults& defaults) {
  Vocab vocab;
  const bool required = defaults.required_scores_and_types;
  STAGECOACH_RETURN_IF_ERROR(ReadPieces(gguf, &vocab));
  STAGECOACH_RETURN_IF_ERROR(ReadScores(gguf, required, &vocab));
  STAGECOACH_RETURN_IF_ERROR(ReadKinds(gguf, required, &vocab));
  STAGECOACH_RETURN_IF_ERROR(IndexPieces(&vocab));
  STAGECOACH_RETURN_IF_ERROR(ReadSpecialIds(gguf, defaults, &vocab));
  STAGECOACH_RETURN_IF_ERROR(ReadAddFlag(gguf, "tokenizer.ggml.add_bos_token", defaults.add_bos,
                                         vocab.bos_id, &vocab.add_bos));
  STAGECOACH_RETURN_IF_ERROR(
      ReadAddFlag(gguf, "tokenizer.ggml.add_eos_token", false, vocab.eos_id, &vocab.add_eos));
  return vocab;
}

absl::Status AsBadVocab(const absl::Status& status) {
  if (GetModelError(status) != ModelError::kBadType) return status;
  const absl::string_view message = status.message();
  return BadVocab(std::string(message.data(), message.size()));
}

std::optional<uint8_t> ParseBytePiece(std::string_view piece) {
  if (piece.size() != 6 || piece.substr(0, 3) != "<0x" || piece[5] != '>') return std::nullopt;
  unsigned value = 0;
  for (const char digit : piece.substr(3, 2)) {
    value *= 16;
    if (digit >= '0' && digit <= '9') {
      value += digit - '0';
    } else if (digit >= 'A' && digit <= 'F') {
      value += digit - 'A' + 10;
    } else if (digit >= 'a' && digit <= 'f') {
      value += digit - 'a' + 10;
    } else {
      return std::nullopt;
    }
  }
  return static_cast<uint8_t>(value);
}

PieceMatcher::PieceMatcher(std::vector<std::pair<std::string, int32_t>> pieces)
    : pieces_(std::move(pieces)) {
  std::sort(pieces_.begin(), pieces_.end());
  for (const auto& [text, id] : pieces_) first_bytes_.set(static_cast<uint8_t>(text[0]));
}

std::optional<PieceMatcher::Match> PieceMatcher::LongestPrefix(std::string_view text) const {
  if (text.empty() || !first_bytes_[static_cast<uint8_t>(text[0])]) return std::nullopt;
  std::optional<Match> best;
  // Invariant: [first, last) are the pieces that agree with text in the first `length` bytes.
  auto first = pieces_.begin();
  auto last = pieces_.end();
  for (size_t length = 0;; ++length) {
    for (; first != last && first->first.size() == length; ++first) {
      best = Match{length, first->second};
    }
    if (first == last || length == text.size()) return best;
    const auto byte_of = [length](const auto& piece) {
      return static_cast<uint8_t>(piece.first[length]);
    };
    const uint8_t byte = static_cast<uint8_t>(text[length]);
    first = std::partition_point(first, last, [&](const auto& p) { return byte_of(p) < byte; });
    last = std::partition_point(first, last, [&](const auto& p) { return byte_of(p) == byte; });
  }
}

PieceMatcher MakePieceMatcher(const Vocab& vocab, std::vector<TokenKind> kinds) {
  std::vector<std::pair<std::string, int32_t>> pieces;
  for (int32_t id = 0; id < vocab.size(); ++id) {
    if (vocab.pieces[id].empty()) continue;
    if (std::find(kinds.begin(), kinds.end(), vocab.kinds[id]) == kinds.end()) continue;
    pieces.emplace_back(vocab.pieces[id], id);
  }
  return PieceMatcher(std::move(pieces));
}

}  // namespace stagecoach
