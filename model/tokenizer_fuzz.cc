// Encodes arbitrary bytes: with fixed vocabularies, where the text must come back, and with
// vocabularies made of arbitrary pieces, where nothing may break.
#include <fuzzer/FuzzedDataProvider.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "model/tokenizer.h"
#include "model/tokenizer_test_vocab.h"
#include "model/unicode.h"

namespace stagecoach {
namespace {

void Require(bool condition) {
  if (!condition) std::abort();
}

const std::vector<std::unique_ptr<Tokenizer>>& FixedTokenizers() {
  static const auto* all = [] {
    auto* tokenizers = new std::vector<std::unique_ptr<Tokenizer>>;
    tokenizers->push_back(*MakeSpmGguf({{"▁", -9},
                                        {"a", -9},
                                        {"▁a", -1},
                                        {"aa", -2},
                                        {"▁▁", -3},
                                        {"e", -9},
                                        {"aae", -1, kUnusedType},
                                        {"aaea", -4},
                                        {"[t]", 0, kUserDefinedType}})
                               .MakeTokenizer());
    for (const char* pre : {"default", "gpt-2", "llama-bpe", "qwen2", "smollm", "tekken", "gpt-4o",
                            "falcon", "deepseek-llm", "deepseek-coder"}) {
      tokenizers->push_back(
          *MakeBpeGguf(pre, {{"aa"}, {"aaaa"}, {"ĠĠ"}, {"Ġa"}, {"[t]", 0, kUserDefinedType}},
                       {"a a", "Ġ Ġ", "aa aa", "Ġ a"})
               .MakeTokenizer());
    }
    return tokenizers;
  }();
  return *all;
}

// Encodes and decodes; the streamed text must be that of Decode wherever this is valid UTF-8.
std::string RoundTrip(const Tokenizer& tokenizer, const std::string& text, EncodeOptions options) {
  const absl::StatusOr<std::vector<int32_t>> ids = tokenizer.Encode(text, options);
  if (!ids.ok()) return text;
  const absl::StatusOr<std::string> decoded = tokenizer.Decode(*ids, options.parse_special);
  Require(decoded.ok());
  Detokenizer detokenizer(&tokenizer, /*at_start=*/true, options.parse_special);
  std::string streamed;
  for (const int32_t id : *ids) streamed += detokenizer.Push(id);
  streamed += detokenizer.Flush();
  Require(ValidUtf8Prefix(streamed) == streamed.size());
  if (ValidUtf8Prefix(*decoded) == decoded->size()) Require(streamed == *decoded);
  return *decoded;
}

void FuzzFixedVocabulary(FuzzedDataProvider* data) {
  const std::vector<std::unique_ptr<Tokenizer>>& all = FixedTokenizers();
  const Tokenizer& tokenizer = *all[data->ConsumeIntegralInRange<size_t>(0, all.size() - 1)];
  const EncodeOptions options = {.add_special = data->ConsumeBool(),
                                 .parse_special = data->ConsumeBool()};
  const std::string text = data->ConsumeRemainingBytesAsString();
  const std::string decoded = RoundTrip(tokenizer, text, options);
  if (options.parse_special) return;
  // SentencePiece cannot tell U+2581 from a space.
  const bool spm = tokenizer.strips_leading_space();
  Require(decoded == (spm ? ReplaceAll(text, kEscapedSpace, " ") : text));
}

void FuzzVocabulary(FuzzedDataProvider* data) {
  std::vector<TestPiece> pieces(data->ConsumeIntegralInRange<size_t>(0, 12));
  for (TestPiece& piece : pieces) {
    piece.text = data->ConsumeRandomLengthString(12);
    piece.score = data->ConsumeFloatingPoint<float>();
    piece.type = data->ConsumeIntegralInRange<int32_t>(-1, 7);
  }
  std::vector<std::string> merges(data->ConsumeIntegralInRange<size_t>(0, 8));
  for (std::string& merge : merges) merge = data->ConsumeRandomLengthString(12);
  TestGguf gguf = data->ConsumeBool()
                      ? MakeSpmGguf(pieces)
                      : MakeBpeGguf(data->ConsumeRandomLengthString(12), pieces, merges);
  if (data->ConsumeBool()) {
    gguf.Set("tokenizer.ggml.bos_token_id", data->ConsumeIntegralInRange<uint32_t>(0, 300));
  }
  const absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = gguf.MakeTokenizer();
  if (!tokenizer.ok()) return;
  for (const bool special : {false, true}) {
    RoundTrip(**tokenizer, data->ConsumeRandomLengthString(200),
              {.add_special = special, .parse_special = special});
  }
}

}  // namespace
}  // namespace stagecoach

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  FuzzedDataProvider data(bytes, size);
  if (data.ConsumeBool()) {
    stagecoach::FuzzFixedVocabulary(&data);
  } else {
    stagecoach::FuzzVocabulary(&data);
  }
  return 0;
}
