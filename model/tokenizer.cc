#include "model/tokenizer.h"

#include <algorithm>
#include <optional>

#include "fmt/format.h"
#include "model/model_error.h"
#include "model/status_macros.h"
#include "model/tokenizer_bpe.h"
#include "model/tokenizer_spm.h"
#include "model/tokenizer_vocab.h"

namespace stagecoach {

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Create(const GgufFile& gguf) {
  STAGECOACH_ASSIGN_OR_RETURN(const std::optional<std::string> key,
                              gguf.String("tokenizer.ggml.model"));
  const std::string model = key.value_or("");
  if (model == "llama") return SpmTokenizer::Create(gguf);
  if (model == "gpt2") return BpeTokenizer::Create(gguf);
  if (model.empty()) {
    return MakeModelError(ModelError::kMissingKey,
                          "tokenizer.ggml.model: the file does not say what its tokeniser is");
  }
  return MakeModelError(
      ModelError::kUnsupported,
      fmt::format("tokeniser '{}' (key tokenizer.ggml.model) is not supported; those that are: "
                  "llama, gpt2",
                  model));
}

Tokenizer::Tokenizer(const Vocab& vocab, bool strip_leading_space)
    : kinds_(vocab.kinds),
      end_ids_(vocab.end_ids),
      bos_id_(vocab.bos_id),
      eos_id_(vocab.eos_id),
      add_bos_(vocab.add_bos),
      add_eos_(vocab.add_eos),
      strip_leading_space_(strip_leading_space) {}

absl::Status Tokenizer::CheckEncodeSize(std::string_view text) {
  if (text.size() <= kMaxEncodeBytes) return absl::OkStatus();
  return absl::InvalidArgumentError(
      fmt::format("a text of {} bytes is longer than the limit of {}; shorten it", text.size(),
                  kMaxEncodeBytes));
}

bool Tokenizer::IsEndOfGeneration(int32_t id) const {
  return std::binary_search(end_ids_.begin(), end_ids_.end(), id);
}

}  // namespace stagecoach
