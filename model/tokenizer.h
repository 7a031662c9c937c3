// Text <-> token ids by the vocabulary in the GGUF file.
#ifndef STAGECOACH_MODEL_TOKENIZER_H_
#define STAGECOACH_MODEL_TOKENIZER_H_

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "model/gguf.h"

namespace stagecoach {

struct Vocab;

enum class TokenKind { kNormal, kUnknown, kControl, kUserDefined, kUnused, kByte };

struct EncodeOptions {
  bool add_special = false;    // BOS/EOS as the vocabulary asks for
  bool parse_special = false;  // control pieces in the text become their ids; never for user text
                               // (user-defined pieces always do, as SentencePiece has it)
};

// Immutable; thread-safe.
class Tokenizer {
 public:
  // tokenizer.ggml.model "llama" (SentencePiece BPE) or "gpt2" (byte-level BPE). Errors: kBadVocab,
  // kMissingKey, kBadType; kUnsupported for another model or pre-tokeniser, naming it.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Create(const GgufFile& gguf);
  virtual ~Tokenizer() = default;

  // Any bytes are valid input: what is not valid UTF-8 is encoded byte by byte or as unknown.
  // Errors: INVALID_ARGUMENT over kMaxEncodeBytes, INTERNAL if the pattern engine gives up.
  virtual absl::StatusOr<std::vector<int32_t>> Encode(std::string_view text,
                                                      const EncodeOptions& options) const = 0;

  // Bytes that `id` stands for, in the middle of a text (may be part of a UTF-8 character).
  // Control pieces give "" unless render_special. Requires 0 <= id < vocab_size().
  virtual std::string Piece(int32_t id, bool render_special) const = 0;

  // Whole-list decoding; drops the space that the encoder put in front. The bytes of invalid UTF-8
  // come out as they are. Errors: OUT_OF_RANGE.
  absl::StatusOr<std::string> Decode(std::span<const int32_t> ids, bool render_special) const;

  int vocab_size() const { return static_cast<int>(kinds_.size()); }
  TokenKind kind(int32_t id) const { return kinds_[id]; }
  int32_t bos_id() const { return bos_id_; }  // -1 = none
  int32_t eos_id() const { return eos_id_; }
  bool IsEndOfGeneration(int32_t id) const;  // eos, eot and the like
  bool adds_bos() const { return add_bos_; }
  // The encoder puts a space in front of a text, so decoding from the start drops one.
  bool strips_leading_space() const { return strip_leading_space_; }

 protected:
  Tokenizer(const Vocab& vocab, bool strip_leading_space);
  static absl::Status CheckEncodeSize(std::string_view text);

  const std::vector<TokenKind> kinds_;  // [n]
  const std::vector<int32_t> end_ids_;  // sorted
  const int32_t bos_id_;
  const int32_t eos_id_;
  const bool add_bos_;
  const bool add_eos_;
  const bool strip_leading_space_;
};

inline constexpr size_t kMaxEncodeBytes = 16 << 20;

// Streaming detokeniser of one sequence: holds back bytes until they form whole UTF-8 characters;
// bytes that never can are replaced by U+FFFD. Not thread-safe; `tokenizer` must outlive it.
class Detokenizer {
 public:
  // at_start: the first piece starts a text (a leading space put there by the encoder is dropped).
  Detokenizer(const Tokenizer* tokenizer, bool at_start, bool render_special = false);
  // Text that became certain with `id`; may be empty. Requires 0 <= id < vocab_size().
  std::string Push(int32_t id);
  // What is held back, with U+FFFD for an incomplete character.
  std::string Flush();

 private:
  const Tokenizer* tokenizer_;
  bool at_start_;
  bool render_special_;
  std::string held_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_MODEL_TOKENIZER_H_
