// A made-up SentencePiece-style vocabulary of any size.
#ifndef STAGECOACH_MODEL_SYNTH_VOCAB_H_
#define STAGECOACH_MODEL_SYNTH_VOCAB_H_

#include <cstdint>

#include "model/gguf_writer.h"

namespace stagecoach {

inline constexpr uint32_t kMinSynthVocab = 512;

// Adds the tokenizer.ggml.* keys of a vocabulary of exactly `size` (at least kMinSynthVocab)
// pieces: <unk>, <s>, </s>, a byte token for each byte, the printable ASCII characters, and made-up
// letter groups, with and without a space in front. Every text can be encoded.
void AddSyntheticVocab(uint32_t size, GgufWriter& writer);

}  // namespace stagecoach

#endif  // STAGECOACH_MODEL_SYNTH_VOCAB_H_
