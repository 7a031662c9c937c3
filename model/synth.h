// Model files with random weights in the shapes of real models: for benchmarks and load tests where
// speed and memory matter and the text does not.
#ifndef STAGECOACH_MODEL_SYNTH_H_
#define STAGECOACH_MODEL_SYNTH_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"

namespace stagecoach {

// Names are case-insensitive.
struct SynthSpec {
  std::string shape = "tiny";    // one of SynthShapeNames()
  std::string types = "q4_k_m";  // one of SynthTypeNames()
  uint64_t seed = 1;             // the same spec gives the same bytes
};

// "llama3-8b", "tinyllama-1.1b", ...
std::vector<std::string_view> SynthShapeNames();

// A tensor type ("q4_k", "f16"), which all matrices then have, or a mix ("q4_k_m", "q5_k_m",
// "q4_k_s"), in which the output matrix and some layers' attn_v and ffn_down have more bits. A
// matrix whose rows are not whole K-quant blocks gets the next larger legacy type.
std::vector<std::string_view> SynthTypeNames();

// Writes a valid `llama` GGUF file with a small SentencePiece-style vocabulary. Weights have mean 0
// and a standard deviation of about 1/sqrt(columns), so that activations keep their scale; norm
// weights are near 1. Memory stays below 64 MiB, whatever the model's size. The file appears at
// `path` only when it is complete.
// Errors: INVALID_ARGUMENT for an unknown name, listing those that exist; kIo, RESOURCE_EXHAUSTED
// (disk full).
absl::Status WriteSyntheticModel(const std::string& path, const SynthSpec& spec);

}  // namespace stagecoach

#endif  // STAGECOACH_MODEL_SYNTH_H_
