// Vocabularies made in memory, for tests and fuzzing.
#ifndef STAGECOACH_MODEL_TOKENIZER_TEST_VOCAB_H_
#define STAGECOACH_MODEL_TOKENIZER_TEST_VOCAB_H_

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "model/gguf.h"
#include "model/gguf_image.h"
#include "model/tokenizer.h"

namespace stagecoach {

// The metadata of a GGUF file without tensors.
class TestGguf {
 public:
  TestGguf& Set(const std::string& key, std::string_view value);
  TestGguf& Set(const std::string& key, const char* value) {
    return Set(key, std::string_view(value));
  }
  TestGguf& Set(const std::string& key, uint32_t value);
  TestGguf& Set(const std::string& key, bool value);
  TestGguf& Set(const std::string& key, const std::vector<std::string>& values);
  TestGguf& Set(const std::string& key, const std::vector<float>& values);
  TestGguf& Set(const std::string& key, const std::vector<int32_t>& values);

  absl::StatusOr<GgufFile> Parse() const;
  absl::StatusOr<std::unique_ptr<Tokenizer>> MakeTokenizer() const;

 private:
  GgufImage image_;
};

// Values of tokenizer.ggml.token_type.
inline constexpr int32_t kNormalType = 1;
inline constexpr int32_t kUnknownType = 2;
inline constexpr int32_t kControlType = 3;
inline constexpr int32_t kUserDefinedType = 4;
inline constexpr int32_t kUnusedType = 5;
inline constexpr int32_t kByteType = 6;

struct TestPiece {
  std::string text;
  float score = 0;
  int32_t type = kNormalType;
};

// The first ids of the "llama" vocabularies below: <unk> 0, <s> 1, </s> 2, <0x00> 3 ... <0xFF> 258.
inline constexpr int32_t kTestFirstByteId = 3;
inline constexpr int32_t kTestFirstPieceId = kTestFirstByteId + 256;

// tokenizer.ggml.model = "llama"; `pieces` get the ids from kTestFirstPieceId on.
TestGguf MakeSpmGguf(const std::vector<TestPiece>& pieces);

// tokenizer.ggml.model = "gpt2" with the 256 byte pieces, byte b having id b, then `pieces` from
// 256 on. `pre` empty: no such key.
TestGguf MakeBpeGguf(std::string_view pre, const std::vector<TestPiece>& pieces,
                     const std::vector<std::string>& merges);

// How a byte-level vocabulary writes `bytes`.
std::string ToByteAlphabet(std::string_view bytes);

// Random text, always valid UTF-8: letters of several scripts, digits, spaces, punctuation, emoji
// and any other character except U+2581.
std::string RandomText(uint32_t seed, size_t characters);

}  // namespace stagecoach

#endif  // STAGECOACH_MODEL_TOKENIZER_TEST_VOCAB_H_
