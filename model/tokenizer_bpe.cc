#include "model/tokenizer_bpe.h"

#include <optional>
#include <utility>

#include "fmt/format.h"
#include "model/model_error.h"
#include "model/status_macros.h"
#include "model/unicode.h"

namespace stagecoach {
namespace {

// GPT-2's way to write bytes: printable ones of Latin-1 as themselves, the other 68 as U+0100 and
// up, in order.
constexpr uint32_t kFirstStandIn = 0x100;
constexpr uint32_t kAlphabetEnd = kFirstStandIn + 68;

bool WrittenAsItself(uint32_t byte) {
  return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

std::array<uint32_t, 256> MakeByteToCharacter() {
  std::array<uint32_t, 256> table;
  uint32_t stand_in = kFirstStandIn;
  for (uint32_t byte = 0; byte < 256; ++byte) {
    table[byte] = WrittenAsItself(byte) ? byte : stand_in++;
  }
  return table;
}

// Inverse of the above; nullopt for a character that no byte is written as.
std::optional<uint8_t> CharacterToByte(uint32_t code) {
  static const std::array<std::optional<uint8_t>, kAlphabetEnd> table = [] {
    std::array<std::optional<uint8_t>, kAlphabetEnd> inverse = {};
    const std::array<uint32_t, 256> forward = MakeByteToCharacter();
    for (size_t byte = 0; byte < 256; ++byte) inverse[forward[byte]] = static_cast<uint8_t>(byte);
    return inverse;
  }();
  return code < table.size() ? table[code] : std::nullopt;
}

// The bytes that `piece` stands for; nullopt if it is not written in GPT-2's alphabet.
std::optional<std::string> DecodePiece(std::string_view piece) {
  std::string bytes;
  while (!piece.empty()) {
    const Utf8Character character = FirstUtf8Character(piece);
    if (character.status != Utf8Status::kValid) return std::nullopt;
    const std::optional<uint8_t> byte = CharacterToByte(character.code);
    if (!byte) return std::nullopt;
    bytes.push_back(static_cast<char>(*byte));
    piece.remove_prefix(character.length);
  }
  return bytes;
}

uint64_t PairKey(int32_t left, int32_t right) {
  return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
}

absl::Status BadMerge(size_t index, const std::string& what) {
  return MakeModelError(ModelError::kBadVocab,
                        fmt::format("{}[{}]: {}; the file is damaged or was badly converted: get "
                                    "it anew",
                                    kMergesKey, index, what));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> BpeTokenizer::Create(const GgufFile& gguf) {
  STAGECOACH_ASSIGN_OR_RETURN(const std::optional<std::string> pre,
                              gguf.String("tokenizer.ggml.pre"));
  STAGECOACH_ASSIGN_OR_RETURN(std::unique_ptr<const PreTokenizer> pre_tokenizer,
                              PreTokenizer::Create(pre.value_or("default")));
  STAGECOACH_ASSIGN_OR_RETURN(Vocab vocab, ReadVocab(gguf, {.add_bos = pre_tokenizer->adds_bos()}));
  std::unique_ptr<BpeTokenizer> tokenizer(
      new BpeTokenizer(std::move(vocab), std::move(pre_tokenizer)));
  STAGECOACH_RETURN_IF_ERROR(tokenizer->ReadMerges(gguf));
  return tokenizer;
}

BpeTokenizer::BpeTokenizer(Vocab vocab, std::unique_ptr<const PreTokenizer> pre_tokenizer)
    : Tokenizer(vocab, /*strip_leading_space=*/false),
      vocab_(std::move(vocab)),
      pre_tokenizer_(std::move(pre_tokenizer)),
      bytes_(vocab_.pieces.size()) {
  byte_ids_.fill(-1);
  for (int32_t id = 0; id < vocab_.size(); ++id) {
    const std::string& piece = vocab_.pieces[id];
    if (vocab_.kinds[id] == TokenKind::kByte) {
      bytes_[id] = std::string(1, static_cast<char>(*ParseBytePiece(piece)));
    } else if (vocab_.kinds[id] != TokenKind::kNormal) {
      bytes_[id] = piece;
    } else if (std::optional<std::string> bytes = DecodePiece(piece)) {
      bytes_[id] = *std::move(bytes);
      word_ids_.emplace(bytes_[id], id);
      if (bytes_[id].size() == 1) byte_ids_[static_cast<uint8_t>(bytes_[id][0])] = id;
    } else {
      bytes_[id] = piece;  // shown as it stands; no text becomes it
    }
  }
  user_defined_ = MakePieceMatcher(vocab_, {TokenKind::kUserDefined});
  user_defined_and_control_ =
      MakePieceMatcher(vocab_, {TokenKind::kUserDefined, TokenKind::kControl, TokenKind::kUnknown});
}

absl::Status BpeTokenizer::ReadMerges(const GgufFile& gguf) {
  const absl::StatusOr<const std::vector<std::string>*> merges = gguf.StringArray(kMergesKey);
  if (!merges.ok()) return AsBadVocab(merges.status());
  if (*merges == nullptr) return MakeModelError(ModelError::kMissingKey, std::string(kMergesKey));
  merges_.reserve((*merges)->size());
  for (size_t i = 0; i < (*merges)->size(); ++i) {
    const std::string_view merge = (**merges)[i];
    const size_t space = merge.find(' ', 1);
    if (space == std::string_view::npos) return BadMerge(i, "not two pieces with a space between");
    const std::string_view left = merge.substr(0, space);
    const std::string_view right = merge.substr(space + 1);
    const std::string whole = std::string(left) + std::string(right);
    for (const std::string_view piece : {left, right, std::string_view(whole)}) {
      if (vocab_.FindText(piece) < 0) return BadMerge(i, "names a piece that is no token");
    }
    merges_.emplace(PairKey(vocab_.FindText(left), vocab_.FindText(right)),
                    Merge{static_cast<int32_t>(i), vocab_.FindText(whole)});
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<int32_t>> BpeTokenizer::Encode(std::string_view text,
                                                          const EncodeOptions& options) const {
  STAGECOACH_RETURN_IF_ERROR(CheckEncodeSize(text));
  std::vector<int32_t> ids;
  if (options.add_special && add_bos_) ids.push_back(bos_id_);
  const PieceMatcher& special = options.parse_special ? user_defined_and_control_ : user_defined_;
  size_t begin = 0;
  for (size_t pos = 0; pos < text.size();) {
    const std::optional<PieceMatcher::Match> match = special.LongestPrefix(text.substr(pos));
    if (!match) {
      ++pos;
      continue;
    }
    STAGECOACH_RETURN_IF_ERROR(EncodeText(text.substr(begin, pos - begin), &ids));
    ids.push_back(match->id);
    pos += match->length;
    begin = pos;
  }
  STAGECOACH_RETURN_IF_ERROR(EncodeText(text.substr(begin), &ids));
  if (options.add_special && add_eos_) ids.push_back(eos_id_);
  return ids;
}

absl::Status BpeTokenizer::EncodeText(std::string_view text, std::vector<int32_t>* ids) const {
  STAGECOACH_ASSIGN_OR_RETURN(const std::vector<std::string_view> words,
                              pre_tokenizer_->Split(text));
  std::vector<Symbol> scratch;
  for (const std::string_view word : words) EncodeWord(word, &scratch, ids);
  return absl::OkStatus();
}

void BpeTokenizer::EncodeWord(std::string_view word, std::vector<Symbol>* scratch,
                              std::vector<int32_t>* ids) const {
  if (pre_tokenizer_->whole_words()) {
    const auto whole = word_ids_.find(word);
    if (whole != word_ids_.end()) {
      ids->push_back(whole->second);
      return;
    }
  }
  scratch->clear();
  for (const char byte : word) {
    AppendSymbol(1, byte_ids_[static_cast<uint8_t>(byte)], /*frozen=*/false, scratch);
  }
  MergeSymbols(
      [this](const Symbol& left, const Symbol& right) -> std::optional<Merge> {
        const auto merge = merges_.find(PairKey(left.id, right.id));
        if (merge == merges_.end()) return std::nullopt;
        return merge->second;
      },
      scratch);
  for (int32_t i = 0; i >= 0; i = (*scratch)[i].next) {
    const int32_t id = (*scratch)[i].id >= 0 ? (*scratch)[i].id : vocab_.unknown_id;
    if (id >= 0) ids->push_back(id);
  }
}

std::string BpeTokenizer::Piece(int32_t id, bool render_special) const {
  switch (vocab_.kinds[id]) {
    case TokenKind::kNormal:
    case TokenKind::kUserDefined:
    case TokenKind::kByte:
      return bytes_[id];
    case TokenKind::kControl:
    case TokenKind::kUnknown:
      return render_special ? bytes_[id] : "";
    case TokenKind::kUnused:
      return "";
  }
  return "";
}

}  // namespace stagecoach
