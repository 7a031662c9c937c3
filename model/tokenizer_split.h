// Pre-tokenisers of byte-level BPE: the patterns that cut a text into the words inside which merges
// happen. Private to the tokenisers.
#ifndef STAGECOACH_MODEL_TOKENIZER_SPLIT_H_
#define STAGECOACH_MODEL_TOKENIZER_SPLIT_H_

#include <memory>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace stagecoach {

// Immutable; thread-safe.
class PreTokenizer {
 public:
  // By the value of tokenizer.ggml.pre. Errors: kUnsupported naming it and those that exist.
  static absl::StatusOr<std::unique_ptr<const PreTokenizer>> Create(std::string_view name);
  ~PreTokenizer();
  PreTokenizer(const PreTokenizer&) = delete;
  PreTokenizer& operator=(const PreTokenizer&) = delete;

  // The words of `text` in order, without gap. Each pattern in turn cuts the words that the one
  // before has left: a match is a word, and so is what lies between two matches. Each stretch of
  // invalid UTF-8 is a word and the text on its two sides is cut separately. Errors: INTERNAL if
  // the pattern engine reaches its limits.
  absl::StatusOr<std::vector<std::string_view>> Split(std::string_view text) const;

  // A word that is a piece is taken whole, without looking at merges.
  bool whole_words() const { return whole_words_; }
  // Models with this pre-tokeniser start with BOS unless the file says otherwise.
  bool adds_bos() const { return adds_bos_; }

 private:
  class Pattern;
  PreTokenizer(std::vector<std::unique_ptr<Pattern>> patterns, bool whole_words, bool adds_bos);

  const std::vector<std::unique_ptr<Pattern>> patterns_;
  const bool whole_words_;
  const bool adds_bos_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_MODEL_TOKENIZER_SPLIT_H_
