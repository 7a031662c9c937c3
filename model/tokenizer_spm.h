// SentencePiece BPE (tokenizer.ggml.model = "llama"). Private to the tokenisers.
#ifndef STAGECOACH_MODEL_TOKENIZER_SPM_H_
#define STAGECOACH_MODEL_TOKENIZER_SPM_H_

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "model/gguf.h"
#include "model/tokenizer.h"
#include "model/tokenizer_merge.h"
#include "model/tokenizer_vocab.h"

namespace stagecoach {

// The algorithm of SentencePiece's BPE model (Kudo and Richardson 2018; bpe_model.cc): spaces
// become U+2581, one is put in front; user-defined pieces are cut out whole; of all adjacent pairs
// that make a piece, the one with the highest score is merged first; what is no piece in the end
// becomes its bytes.
class SpmTokenizer final : public Tokenizer {
 public:
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Create(const GgufFile& gguf);

  absl::StatusOr<std::vector<int32_t>> Encode(std::string_view text,
                                              const EncodeOptions& options) const override;
  std::string Piece(int32_t id, bool render_special) const override;

 private:
  class Resegmenter;
  SpmTokenizer(Vocab vocab, bool add_space_prefix);
  absl::Status CheckCoversEveryByte() const;
  // Encodes text without control pieces; `text` is escaped already.
  void EncodeEscaped(std::string_view text, std::vector<int32_t>* ids) const;
  std::vector<Symbol> SplitSymbols(std::string_view text) const;
  void AppendPieceOrBytes(std::string_view text, std::vector<int32_t>* ids) const;

  Vocab vocab_;
  std::vector<int32_t> ranks_;  // [n] position of a token's score among all scores, highest first
  size_t longest_piece_ = 0;    // bytes
  std::array<int32_t, 256> byte_ids_;  // -1 = no such piece
  PieceMatcher control_;
  PieceMatcher user_defined_;  // spaces escaped
};

}  // namespace stagecoach

#endif  // STAGECOACH_MODEL_TOKENIZER_SPM_H_
