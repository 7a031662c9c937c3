// Byte-level BPE (tokenizer.ggml.model = "gpt2"). Private to the tokenisers.
#ifndef STAGECOACH_MODEL_TOKENIZER_BPE_H_
#define STAGECOACH_MODEL_TOKENIZER_BPE_H_

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "absl/status/statusor.h"
#include "model/gguf.h"
#include "model/tokenizer.h"
#include "model/tokenizer_merge.h"
#include "model/tokenizer_split.h"
#include "model/tokenizer_vocab.h"

namespace stagecoach {

// The algorithm of GPT-2 (Radford et al. 2019): user-defined pieces are cut out whole, a pattern
// cuts the rest into words, each word starts as its bytes, and of all adjacent pairs in the list of
// merges the one that stands first there is merged first. In the file each byte is written as one
// printable character. A byte that the vocabulary lacks becomes the unknown token, or nothing if
// there is none.
class BpeTokenizer final : public Tokenizer {
 public:
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Create(const GgufFile& gguf);

  absl::StatusOr<std::vector<int32_t>> Encode(std::string_view text,
                                              const EncodeOptions& options) const override;
  std::string Piece(int32_t id, bool render_special) const override;

 private:
  BpeTokenizer(Vocab vocab, std::unique_ptr<const PreTokenizer> pre_tokenizer);
  absl::Status ReadMerges(const GgufFile& gguf);
  // Encodes text without special pieces.
  absl::Status EncodeText(std::string_view text, std::vector<int32_t>* ids) const;
  void EncodeWord(std::string_view word, std::vector<Symbol>* scratch,
                  std::vector<int32_t>* ids) const;

  Vocab vocab_;
  std::unique_ptr<const PreTokenizer> pre_tokenizer_;
  std::vector<std::string> bytes_;                          // [n] what each token stands for
  std::array<int32_t, 256> byte_ids_;                       // -1 = no such piece
  std::unordered_map<std::string_view, int32_t> word_ids_;  // bytes -> id; views into bytes_
  std::unordered_map<uint64_t, Merge> merges_;              // by PairKey(left id, right id)
  PieceMatcher user_defined_;
  PieceMatcher user_defined_and_control_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_MODEL_TOKENIZER_BPE_H_
