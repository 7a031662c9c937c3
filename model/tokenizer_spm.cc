#include "model/tokenizer_spm.h"

#include <algorithm>
#include <functional>
#include <unordered_map>
#include <utility>

#include "fmt/format.h"
#include "model/model_error.h"
#include "model/status_macros.h"
#include "model/unicode.h"

namespace stagecoach {
namespace {

// Dense ranks of the scores: 0 for the highest, equal scores share one.
std::vector<int32_t> RankScores(const std::vector<float>& scores) {
  std::vector<float> sorted = scores;
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  sorted.erase(std::unique(sorted.begin(), sorted.end()), sorted.end());
  std::vector<int32_t> ranks(scores.size());
  for (size_t i = 0; i < scores.size(); ++i) {
    const auto it = std::lower_bound(sorted.begin(), sorted.end(), scores[i], std::greater<>());
    ranks[i] = static_cast<int32_t>(it - sorted.begin());
  }
  return ranks;
}

PieceMatcher MatchUserDefined(const Vocab& vocab) {
  std::vector<std::pair<std::string, int32_t>> pieces;
  for (int32_t id = 0; id < vocab.size(); ++id) {
    if (vocab.kinds[id] != TokenKind::kUserDefined || vocab.pieces[id].empty()) continue;
    pieces.emplace_back(ReplaceAll(vocab.pieces[id], " ", kEscapedSpace), id);
  }
  return PieceMatcher(std::move(pieces));
}

}  // namespace

// Remembers how unused pieces came about, so that one left in the result can be taken apart again:
// unused pieces serve only as a step towards longer ones.
class SpmTokenizer::Resegmenter {
 public:
  explicit Resegmenter(const SpmTokenizer& tokenizer) : tokenizer_(tokenizer) {}

  void Remember(std::string_view piece, size_t left_length) { splits_[piece] = left_length; }

  void Append(std::string_view text, std::vector<int32_t>* ids) const {
    std::vector<std::string_view> pending = {text};  // a stack: the leftmost is on top
    while (!pending.empty()) {
      const std::string_view piece = pending.back();
      pending.pop_back();
      const auto split = splits_.find(piece);
      if (split == splits_.end()) {
        tokenizer_.AppendPieceOrBytes(piece, ids);
      } else {
        pending.push_back(piece.substr(split->second));
        pending.push_back(piece.substr(0, split->second));
      }
    }
  }

 private:
  const SpmTokenizer& tokenizer_;
  std::unordered_map<std::string_view, size_t> splits_;
};

absl::StatusOr<std::unique_ptr<Tokenizer>> SpmTokenizer::Create(const GgufFile& gguf) {
  // What SentencePiece's trainer writes when it is not told otherwise, and llama.cpp assumes.
  const VocabDefaults defaults = {.required_scores_and_types = true,
                                  .bos_id = 1,
                                  .eos_id = 2,
                                  .unknown_id = 0,
                                  .add_bos = true};
  STAGECOACH_ASSIGN_OR_RETURN(Vocab vocab, ReadVocab(gguf, defaults));
  STAGECOACH_ASSIGN_OR_RETURN(const std::optional<bool> prefix,
                              gguf.Bool("tokenizer.ggml.add_space_prefix"));
  std::unique_ptr<SpmTokenizer> tokenizer(
      new SpmTokenizer(std::move(vocab), prefix.value_or(true)));
  STAGECOACH_RETURN_IF_ERROR(tokenizer->CheckCoversEveryByte());
  return tokenizer;
}

SpmTokenizer::SpmTokenizer(Vocab vocab, bool add_space_prefix)
    : Tokenizer(vocab, add_space_prefix), vocab_(std::move(vocab)) {
  ranks_ = RankScores(vocab_.scores);
  byte_ids_.fill(-1);
  for (int32_t id = 0; id < vocab_.size(); ++id) {
    if (vocab_.kinds[id] == TokenKind::kByte) {
      byte_ids_[*ParseBytePiece(vocab_.pieces[id])] = id;
    }
  }
  for (const auto& [piece, id] : vocab_.text_ids) {
    longest_piece_ = std::max(longest_piece_, piece.size());
  }
  control_ = MakePieceMatcher(vocab_, {TokenKind::kControl, TokenKind::kUnknown});
  user_defined_ = MatchUserDefined(vocab_);
}

absl::Status SpmTokenizer::CheckCoversEveryByte() const {
  if (vocab_.unknown_id >= 0) return absl::OkStatus();
  for (size_t byte = 0; byte < byte_ids_.size(); ++byte) {
    if (byte_ids_[byte] >= 0) continue;
    return MakeModelError(
        ModelError::kBadVocab,
        fmt::format("{}: neither a piece <0x{:02X}> nor an unknown token, so that not every text "
                    "can be encoded; the file is damaged or was badly converted: get it anew",
                    kTokensKey, byte));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<int32_t>> SpmTokenizer::Encode(std::string_view text,
                                                          const EncodeOptions& options) const {
  STAGECOACH_RETURN_IF_ERROR(CheckEncodeSize(text));
  std::vector<int32_t> ids;
  if (options.add_special && add_bos_) ids.push_back(bos_id_);
  // As llama.cpp: a text gets its space in front at the start and after each control piece.
  const auto append_text = [&](std::string_view part) {
    if (part.empty()) return;
    const std::string escaped = ReplaceAll(part, " ", kEscapedSpace);
    EncodeEscaped(strip_leading_space_ ? std::string(kEscapedSpace) + escaped : escaped, &ids);
  };
  size_t begin = 0;
  for (size_t pos = 0; options.parse_special && pos < text.size();) {
    const std::optional<PieceMatcher::Match> match = control_.LongestPrefix(text.substr(pos));
    if (!match) {
      ++pos;
      continue;
    }
    append_text(text.substr(begin, pos - begin));
    ids.push_back(match->id);
    pos += match->length;
    begin = pos;
  }
  append_text(text.substr(begin));
  if (options.add_special && add_eos_) ids.push_back(eos_id_);
  return ids;
}

void SpmTokenizer::EncodeEscaped(std::string_view text, std::vector<int32_t>* ids) const {
  std::vector<Symbol> symbols = SplitSymbols(text);
  Resegmenter resegmenter(*this);
  MergeSymbols(
      [&](const Symbol& left, const Symbol& right) -> std::optional<Merge> {
        const size_t length = size_t{left.length} + right.length;
        if (length > longest_piece_) return std::nullopt;
        const std::string_view piece = text.substr(left.begin, length);
        const int32_t id = vocab_.FindText(piece);
        if (id < 0) return std::nullopt;
        if (vocab_.kinds[id] == TokenKind::kUnused) resegmenter.Remember(piece, left.length);
        return Merge{ranks_[id], id};
      },
      &symbols);
  for (int32_t i = 0; i >= 0; i = symbols[i].next) {
    const std::string_view piece = text.substr(symbols[i].begin, symbols[i].length);
    if (symbols[i].frozen) {
      ids->push_back(symbols[i].id);
    } else {
      resegmenter.Append(piece, ids);
    }
  }
}

// User-defined pieces, else single characters, else single bytes.
std::vector<Symbol> SpmTokenizer::SplitSymbols(std::string_view text) const {
  std::vector<Symbol> symbols;
  for (size_t pos = 0; pos < text.size();) {
    const std::string_view rest = text.substr(pos);
    size_t length;
    if (const auto match = user_defined_.LongestPrefix(rest)) {
      length = match->length;
      AppendSymbol(static_cast<uint32_t>(length), match->id, /*frozen=*/true, &symbols);
    } else {
      const Utf8Character character = FirstUtf8Character(rest);
      length = character.status == Utf8Status::kValid ? character.length : 1;
      AppendSymbol(static_cast<uint32_t>(length), -1, /*frozen=*/false, &symbols);
    }
    pos += length;
  }
  return symbols;
}

void SpmTokenizer::AppendPieceOrBytes(std::string_view text, std::vector<int32_t>* ids) const {
  const int32_t id = vocab_.FindText(text);
  if (id >= 0) {
    ids->push_back(id);
    return;
  }
  const bool all_bytes = std::all_of(text.begin(), text.end(), [this](char byte) {
    return byte_ids_[static_cast<uint8_t>(byte)] >= 0;
  });
  if (!all_bytes) {
    ids->push_back(vocab_.unknown_id);
    return;
  }
  for (const char byte : text) ids->push_back(byte_ids_[static_cast<uint8_t>(byte)]);
}

std::string SpmTokenizer::Piece(int32_t id, bool render_special) const {
  const std::string& piece = vocab_.pieces[id];
  switch (vocab_.kinds[id]) {
    case TokenKind::kNormal:
    case TokenKind::kUserDefined:
      return ReplaceAll(piece, kEscapedSpace, " ");
    case TokenKind::kByte:
      return std::string(1, static_cast<char>(*ParseBytePiece(piece)));
    case TokenKind::kControl:
    case TokenKind::kUnknown:
      return render_special ? piece : "";
    case TokenKind::kUnused:
      return "";
  }
  return "";
}

}  // namespace stagecoach
