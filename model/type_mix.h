// Which types the matrices of a quantised model have, as llama.cpp's quantiser chooses them.
#ifndef STAGECOACH_MODEL_TYPE_MIX_H_
#define STAGECOACH_MODEL_TYPE_MIX_H_

#include <optional>
#include <span>
#include <string_view>

#include "model/tensor_type.h"

namespace stagecoach {

// `base`, but `output` for the output matrix and `more` for attn_v and ffn_down of some layers.
struct TypeMix {
  std::string_view name;
  TensorType base;
  TensorType more;
  TensorType output;
  bool half_of_layers;  // more: about half of the layers; else the first eighth

  // Of attn_v and ffn_down in layer [0, layers).
  TensorType VAndDown(int layer, int layers) const;
};

// "q4_k_s", "q4_k_m", "q5_k_m".
std::span<const TypeMix> TypeMixes();

// One of these or of a tensor type alone, in any case of letters; nothing for another name.
std::optional<TypeMix> FindTypeMix(std::string_view name);

}  // namespace stagecoach

#endif  // STAGECOACH_MODEL_TYPE_MIX_H_
