#include "model/synth_vocab.h"

#include <cassert>
#include <string>
#include <string_view>
#include <vector>

#include "fmt/format.h"

namespace stagecoach {
namespace {

constexpr std::string_view kSpace = "\xE2\x96\x81";  // U+2581, SentencePiece's space

// Token types of tokenizer.ggml.token_type.
constexpr int32_t kNormal = 1;
constexpr int32_t kUnknown = 2;
constexpr int32_t kControl = 3;
constexpr int32_t kByte = 6;

// a, b, ..., z, aa, ab, ...: the next after `word`.
void NextWord(std::string* word) {
  for (size_t i = word->size(); i-- > 0;) {
    if ((*word)[i] != 'z') {
      ++(*word)[i];
      return;
    }
    (*word)[i] = 'a';
  }
  word->insert(word->begin(), 'a');
}

}  // namespace

void AddSyntheticVocab(uint32_t size, GgufWriter& writer) {
  assert(size >= kMinSynthVocab);
  std::vector<std::string> pieces = {"<unk>", "<s>", "</s>"};
  std::vector<int32_t> types = {kUnknown, kControl, kControl};
  pieces.reserve(size + 2);
  for (int byte = 0; byte < 256; ++byte) pieces.push_back(fmt::format("<0x{:02X}>", byte));
  types.resize(pieces.size(), kByte);
  pieces.emplace_back(kSpace);
  for (char c = '!'; c <= '~'; ++c) pieces.emplace_back(1, c);
  std::string word = "a";  // the single letters are there already
  while (pieces.size() < size) {
    pieces.push_back(std::string(kSpace) + word);
    if (word.size() > 1) pieces.push_back(word);
    NextWord(&word);
  }
  pieces.resize(size);
  types.resize(size, kNormal);
  // Earlier pieces are the better merges, as a trained vocabulary has them.
  std::vector<float> scores(size, 0.0f);
  for (uint32_t i = 3 + 256; i < size; ++i) scores[i] = -static_cast<float>(i);
  writer.AddString("tokenizer.ggml.model", "llama");
  writer.AddStrings("tokenizer.ggml.tokens", pieces);
  writer.AddFloats("tokenizer.ggml.scores", scores);
  writer.AddInts("tokenizer.ggml.token_type", types);
  writer.AddUint32("tokenizer.ggml.unknown_token_id", 0);
  writer.AddUint32("tokenizer.ggml.bos_token_id", 1);
  writer.AddUint32("tokenizer.ggml.eos_token_id", 2);
  writer.AddBool("tokenizer.ggml.add_bos_token", true);
  writer.AddBool("tokenizer.ggml.add_eos_token", false);
}

}  // namespace stagecoach
