#include "model/gguf_image.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <utility>

namespace stagecoach {
namespace {

template <typename T>
std::string Raw(T value) {
  std::string bytes(sizeof(T), '\0');
  std::memcpy(bytes.data(), &value, sizeof(T));
  return bytes;
}

void PadTo(uint64_t alignment, std::string* bytes) {
  while (bytes->size() % alignment != 0) bytes->push_back('\0');
}

}  // namespace

std::string RawU8(uint8_t value) { return Raw(value); }
std::string RawU32(uint32_t value) { return Raw(value); }
std::string RawU64(uint64_t value) { return Raw(value); }
std::string RawF32(float value) { return Raw(value); }

std::string RawString(std::string_view text) { return RawU64(text.size()) + std::string(text); }

std::string RawArray(uint32_t element_type, uint64_t count, std::string_view elements) {
  return RawU32(element_type) + RawU64(count) + std::string(elements);
}

std::string RawStrings(const std::vector<std::string>& values) {
  std::string elements;
  for (const std::string& value : values) elements += RawString(value);
  return RawArray(kGgufString, values.size(), elements);
}

std::string GgufImage::HeaderBytes() const {
  std::string out = magic + RawU32(version) + RawU64(tensor_count.value_or(tensors.size())) +
                    RawU64(key_count.value_or(keys.size()));
  for (const Key& key : keys) {
    out += RawU64(key.name_length.value_or(key.name.size())) + key.name;
    out += RawU32(key.type) + key.value;
  }
  for (const Tensor& tensor : tensors) {
    out += RawU64(tensor.name_length.value_or(tensor.name.size())) + tensor.name;
    out += RawU32(tensor.dim_count.value_or(tensor.dims.size()));
    for (const uint64_t dim : tensor.dims) out += RawU64(dim);
    out += RawU32(tensor.type) + RawU64(tensor.offset);
  }
  return out;
}

std::string GgufImage::Bytes() const {
  std::string out = HeaderBytes();
  PadTo(alignment, &out);
  return out + data;
}

GgufImage::Key& GgufImage::key(std::string_view name) {
  const auto it =
      std::find_if(keys.begin(), keys.end(), [&](const Key& key) { return key.name == name; });
  assert(it != keys.end());
  return *it;
}

GgufImage::Tensor& GgufImage::tensor(std::string_view name) {
  const auto it = std::find_if(tensors.begin(), tensors.end(),
                               [&](const Tensor& tensor) { return tensor.name == name; });
  assert(it != tensors.end());
  return *it;
}

void GgufImage::Set(const std::string& name, uint32_t type, std::string value) {
  RemoveKey(name);
  keys.push_back({name, type, std::move(value)});
}

void GgufImage::RemoveKey(std::string_view name) {
  std::erase_if(keys, [&](const Key& key) { return key.name == name; });
}

void GgufImage::RemoveTensor(std::string_view name) {
  std::erase_if(tensors, [&](const Tensor& tensor) { return tensor.name == name; });
}

void GgufImage::AddF32(const std::string& name, std::vector<uint64_t> dims) {
  uint64_t bytes = sizeof(float);
  for (const uint64_t dim : dims) bytes *= dim;
  tensors.push_back({name, std::move(dims), 0, data.size()});
  data.resize(data.size() + bytes);
  PadTo(alignment, &data);
}

GgufImage TinyLlamaImage() {
  GgufImage image;
  image.SetString("general.architecture", "llama");
  image.SetString("general.name", "tiny");
  image.SetU32("llama.block_count", 2);
  image.SetU32("llama.context_length", 64);
  image.SetU32("llama.embedding_length", 8);
  image.SetU32("llama.feed_forward_length", 16);
  image.SetU32("llama.attention.head_count", 2);
  image.SetU32("llama.attention.head_count_kv", 1);
  image.SetF32("llama.attention.layer_norm_rms_epsilon", 1e-5f);
  image.SetU32("llama.rope.dimension_count", 4);
  image.SetF32("llama.rope.freq_base", 10000.0f);
  image.SetU32("llama.vocab_size", 4);
  image.Set("tokenizer.ggml.tokens", kGgufArray, RawStrings({"<unk>", "<s>", "</s>", "a"}));
  image.AddF32("token_embd.weight", {8, 4});
  for (int layer = 0; layer < 2; ++layer) {
    const std::string prefix = "blk." + std::to_string(layer) + ".";
    image.AddF32(prefix + "attn_norm.weight", {8});
    image.AddF32(prefix + "attn_q.weight", {8, 8});
    image.AddF32(prefix + "attn_k.weight", {8, 4});
    image.AddF32(prefix + "attn_v.weight", {8, 4});
    image.AddF32(prefix + "attn_output.weight", {8, 8});
    image.AddF32(prefix + "ffn_norm.weight", {8});
    image.AddF32(prefix + "ffn_gate.weight", {8, 16});
    image.AddF32(prefix + "ffn_up.weight", {8, 16});
    image.AddF32(prefix + "ffn_down.weight", {16, 8});
  }
  image.AddF32("output_norm.weight", {8});
  image.AddF32("output.weight", {8, 4});
  return image;
}

}  // namespace stagecoach
