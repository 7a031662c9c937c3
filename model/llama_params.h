// Hyper-parameters of the `llama` architecture from a file's metadata.
#ifndef STAGECOACH_MODEL_LLAMA_PARAMS_H_
#define STAGECOACH_MODEL_LLAMA_PARAMS_H_

#include "absl/status/statusor.h"
#include "model/gguf.h"
#include "model/model_file.h"

namespace stagecoach {

// Reads and checks all of ModelParams but rope_freq_factors and tied_embeddings, which depend on
// tensors. `embedding` is the tensor token_embd.weight of any part, or nullptr; its rows give the
// vocabulary size if no key does.
// Errors: kMissingKey naming every missing key, kBadType, kUnsupportedArch, kUnsupported (RoPE
// scaling), kBadHparam, kLimit (context length), kBadVocab, kMissingTensor.
absl::StatusOr<ModelParams> ReadLlamaParams(const GgufFile& gguf, const TensorInfo* embedding);

}  // namespace stagecoach

#endif  // STAGECOACH_MODEL_LLAMA_PARAMS_H_
