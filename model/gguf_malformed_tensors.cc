#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "model/gguf_malformed_cases.h"
#include "model/tensor_type.h"

namespace stagecoach {

std::vector<MalformedCase> RequiredKeyCases() {
  std::vector<MalformedCase> cases;
  const std::string required[] = {"general.architecture",
                                  "llama.block_count",
                                  "llama.embedding_length",
                                  "llama.feed_forward_length",
                                  "llama.attention.head_count",
                                  "llama.context_length",
                                  "llama.attention.layer_norm_rms_epsilon"};
  for (const std::string& key : required) {
    cases.push_back(Changed("23_without_" + key, ModelError::kMissingKey, key,
                            [key](GgufImage& image) { image.RemoveKey(key); }));
    cases.push_back(Changed("24_array_" + key, ModelError::kBadType, key, [key](GgufImage& image) {
      image.Set(key, kGgufArray, RawArray(kGgufU32, 1, RawU32(2)));
    }));
    if (key == "general.architecture") continue;
    cases.push_back(Changed("24_string_" + key, ModelError::kBadType, key,
                            [key](GgufImage& image) { image.SetString(key, "2"); }));
    const bool wants_float = key.ends_with("epsilon");
    cases.push_back(Changed("24_number_" + key, ModelError::kBadType, key,
                            [key, wants_float](GgufImage& image) {
                              wants_float ? image.SetU32(key, 1) : image.SetF32(key, 2.0f);
                            }));
  }
  cases.push_back(Changed("23_all_missing_are_named", ModelError::kMissingKey,
                          "llama.block_count, llama.embedding_length, llama.attention.head_count, "
                          "llama.feed_forward_length, llama.context_length, "
                          "llama.attention.layer_norm_rms_epsilon",
                          [](GgufImage& image) { image.keys.clear(); }));
  for (const std::string arch : {"", "falcon", "LLAMA", "llama2", "../llama"}) {
    cases.push_back(Changed(Join("25_architecture_", cases.size()), ModelError::kUnsupportedArch,
                            "general.architecture", [arch](GgufImage& image) {
                              image.SetString("general.architecture", arch);
                            }));
  }
  cases.push_back(Changed("25_experts", ModelError::kUnsupportedArch, "llama.expert_count",
                          [](GgufImage& image) { image.SetU32("llama.expert_count", 8); }));
  return cases;
}

namespace {

struct BadNumber {
  const char* key;
  uint32_t value;
};

}  // namespace

std::vector<MalformedCase> HparamCases() {
  std::vector<MalformedCase> cases;
  const BadNumber numbers[] = {
      {"llama.block_count", 0},
      {"llama.block_count", 513},
      {"llama.block_count", 0xffffffff},
      {"llama.block_count", 1},
      {"llama.block_count", 3},
      {"llama.block_count", 512},
      {"llama.attention.head_count", 0},
      {"llama.attention.head_count", 3},
      {"llama.attention.head_count", 16},
      {"llama.attention.head_count", 0xffffffff},
      {"llama.attention.head_count_kv", 0},
      {"llama.attention.head_count_kv", 3},
      {"llama.attention.head_count_kv", 0x80000000},
      {"llama.attention.key_length", 0},
      {"llama.attention.value_length", 0xffffffff},
      {"llama.embedding_length", 0},
      {"llama.embedding_length", 0xffffffff},
      {"llama.feed_forward_length", 0},
      {"llama.feed_forward_length", 0x80000000},
      {"llama.rope.dimension_count", 0},
      {"llama.rope.dimension_count", 3},
      {"llama.rope.dimension_count", 6},
      {"llama.rope.dimension_count", 0xfffffffe},
  };
  for (const BadNumber& bad : numbers) {
    cases.push_back(Changed(std::string("26_") + bad.key + "_" + std::to_string(bad.value),
                            ModelError::kBadHparam, bad.key,
                            [bad](GgufImage& image) { image.SetU32(bad.key, bad.value); }));
  }
  cases.push_back(Changed("27_kv_heads_do_not_divide", ModelError::kBadHparam, "head_count_kv",
                          [](GgufImage& image) {
                            image.SetU32("llama.attention.head_count", 8);
                            image.SetU32("llama.attention.head_count_kv", 3);
                          }));
  for (const uint32_t context : {0u, 1u << 31, 0xffffffffu, (1u << 22) + 1}) {
    cases.push_back(
        Changed(Join("28_context_", context), ModelError::kLimit, "llama.context_length",
                [context](GgufImage& image) { image.SetU32("llama.context_length", context); }));
  }
  const float bad_floats[] = {0.0f, -0.0f, -1.0f, NAN, INFINITY, -INFINITY};
  const char* const float_keys[] = {"llama.rope.freq_base", "llama.rope.scaling.factor",
                                    "llama.rope.scale_linear",
                                    "llama.attention.layer_norm_rms_epsilon"};
  for (const char* const key : float_keys) {
    for (const float value : bad_floats) {
      cases.push_back(Changed(std::string("29_") + key + "_" + std::to_string(cases.size()),
                              ModelError::kBadHparam, key,
                              [key, value](GgufImage& image) { image.SetF32(key, value); }));
    }
  }
  for (const char* const type : {"yarn", "longrope", "ntk", ""}) {
    cases.push_back(Changed(
        Join("29_scaling_", cases.size()), ModelError::kUnsupported, "llama.rope.scaling.type",
        [type](GgufImage& image) { image.SetString("llama.rope.scaling.type", type); }));
  }
  cases.push_back(
      Changed("29_linear_without_factor", ModelError::kMissingKey, "scaling.factor",
              [](GgufImage& image) { image.SetString("llama.rope.scaling.type", "linear"); }));
  return cases;
}

namespace {

MalformedCase BadTensor(std::string name, ModelError expected, std::string mentions,
                        std::function<void(GgufImage::Tensor&)> change) {
  return Changed(std::move(name), expected, std::move(mentions),
                 [change](GgufImage& image) { change(image.tensor("blk.0.attn_k.weight")); });
}

}  // namespace

std::vector<MalformedCase> TensorNameAndShapeCases() {
  std::vector<MalformedCase> cases;
  using Tensor = GgufImage::Tensor;
  for (const uint64_t length : {kMax64, kTwo63, uint64_t{64}, uint64_t{0}}) {
    cases.push_back(BadTensor(Join("31_name_length_", length), ModelError::kBadName, "length",
                              [length](Tensor& t) { t.name_length = length; }));
  }
  const std::string bad_names[] = {"\xff\xfe", "../../etc/passwd",     "/etc/passwd",
                                   "a\\b",     std::string("a\0b", 3), "a\nb",
                                   "..",       std::string(64, 'x')};
  for (const std::string& name : bad_names) {
    cases.push_back(BadTensor(Join("31_name_", cases.size()), ModelError::kBadName, "byte",
                              [name](Tensor& t) { t.name = name; }));
  }
  cases.push_back(BadTensor("32_same_name", ModelError::kDuplicate, "'blk.0.attn_v.weight'",
                            [](Tensor& t) { t.name = "blk.0.attn_v.weight"; }));
  for (const uint32_t count : {0u, 5u, 0xffffffffu, 1u << 31}) {
    cases.push_back(BadTensor(Join("33_dim_count_", count), ModelError::kBadShape,
                              "'blk.0.attn_k.weight' at byte",
                              [count](Tensor& t) { t.dim_count = count; }));
  }
  const std::vector<uint64_t> bad_dims[] = {
      {0, 4}, {8, 0}, {0}, {8, 4, 1, 0}, {kTwo63, 1}, {8, kMax64}, {1, kTwo63 + 1}};
  for (const std::vector<uint64_t>& dims : bad_dims) {
    cases.push_back(BadTensor(Join("34_dims_", cases.size()), ModelError::kBadShape, "dimension",
                              [dims](Tensor& t) { t.dims = dims; }));
  }
  const std::vector<uint64_t> wrapping[] = {
      {uint64_t{1} << 32, uint64_t{1} << 32},  // elements wrap to 0
      {kTwo63 - 1, 3},                         // to something
      {uint64_t{1} << 62, 1, 2},               // elements fit, bytes wrap
      {uint64_t{1} << 62},                     // bytes wrap to 0
      {8, (uint64_t{1} << 61) / 8 * 2 + 1},    // to a little
      {1 << 16, 1 << 16, 1 << 16, 1 << 16},    // four dims
  };
  for (const std::vector<uint64_t>& dims : wrapping) {
    cases.push_back(BadTensor(Join("36_wraps_", cases.size()), ModelError::kOverflow,
                              "'blk.0.attn_k.weight' at byte",
                              [dims](Tensor& t) { t.dims = dims; }));
  }
  for (const TensorTypeInfo& info : AllTensorTypes()) {
    if (info.block_elements == 1) continue;
    cases.push_back(BadTensor("38_row_of_" + std::string(info.name), ModelError::kBadShape,
                              std::string(info.name), [&info](Tensor& t) {
                                t.type = static_cast<uint32_t>(info.type);
                                t.dims = {info.block_elements + 8, info.block_elements};
                              }));
  }
  for (const uint32_t type : {4u, 5u, 9u, 16u, 24u, 31u, 39u, 77u, 0xffffffffu}) {
    cases.push_back(BadTensor(Join("39_type_", type), ModelError::kUnsupportedType,
                              "'blk.0.attn_k.weight' at byte",
                              [type](Tensor& t) { t.type = type; }));
  }
  return cases;
}

std::vector<MalformedCase> TensorPlaceCases() {
  using Tensor = GgufImage::Tensor;
  std::vector<MalformedCase> cases = {
      BadTensor("40_offset_plus_1", ModelError::kBadOffset, "alignment",
                [](Tensor& t) { t.offset += 1; }),
      BadTensor("40_offset_plus_16", ModelError::kBadOffset, "alignment",
                [](Tensor& t) { t.offset += 16; }),
      BadTensor("40_offset_wraps_the_base", ModelError::kOverflow, "wraps",
                [](Tensor& t) { t.offset = kMax64 - 31; }),
      BadTensor("40_offset_wraps_the_end", ModelError::kTruncated, "end of the file",
                [](Tensor& t) { t.offset = kTwo63; }),
      BadTensor("41_offset_far_away", ModelError::kTruncated, "end of the file",
                [](Tensor& t) { t.offset = 1 << 20; }),
      BadTensor("41_larger_than_the_file", ModelError::kTruncated, "end of the file",
                [](Tensor& t) {
                  t.dims = {8, 1 << 20};
                }),
      Changed("42_same_place", ModelError::kOverlap, "overlaps",
              [](GgufImage& image) {
                image.tensor("blk.1.attn_v.weight").offset =
                    image.tensor("blk.1.attn_k.weight").offset;
              }),
      Changed("42_one_row_too_many", ModelError::kOverlap, "overlaps",
              [](GgufImage& image) {
                image.tensor("blk.1.attn_k.weight").dims = {8, 5};
              }),
      Changed("42_inside_another", ModelError::kOverlap, "overlaps",
              [](GgufImage& image) {
                image.tensor("blk.1.ffn_norm.weight").offset =
                    image.tensor("blk.0.ffn_up.weight").offset + 64;
              }),
      Changed("43_gap_is_accepted", std::nullopt, "",
              [](GgufImage& image) {
                image.tensor("output.weight").offset += 4096;
                image.data.resize(image.data.size() + 4096);
              }),
      Changed("43_shuffled_is_accepted", std::nullopt, "",
              [](GgufImage& image) {
                std::swap(image.tensor("blk.0.attn_k.weight").offset,
                          image.tensor("blk.1.attn_v.weight").offset);
                std::swap(image.tensors.front(), image.tensors.back());
              }),
      Changed("43_trailing_bytes_are_accepted", std::nullopt, "",
              [](GgufImage& image) { image.data += "trailer"; }),
  };
  for (const size_t cut : {1, 31, 127, 128}) {  // of output.weight's 128 bytes
    cases.push_back(Patched(Join("41_file_cut_by_", cut), ModelError::kTruncated, "output.weight",
                            [cut](std::string& bytes) { bytes.resize(bytes.size() - cut); }));
  }
  return cases;
}

std::vector<MalformedCase> ModelCases() {
  std::vector<MalformedCase> cases;
  const std::pair<std::string, std::vector<uint64_t>> shapes[] = {
      {"blk.0.attn_q.weight", {8, 4}},    {"blk.1.attn_k.weight", {4, 8}},
      {"blk.1.attn_v.weight", {32}},      {"blk.0.attn_output.weight", {4, 8, 2}},
      {"blk.1.ffn_down.weight", {8, 16}}, {"blk.0.ffn_norm.weight", {4, 2}},
      {"output_norm.weight", {4}},        {"output.weight", {8, 3}},
      {"token_embd.weight", {8, 3}},      {"token_embd.weight", {4, 8}},
  };
  for (const auto& [tensor, dims] : shapes) {
    cases.push_back(Changed(
        Join("44_" + tensor + "_", cases.size()), ModelError::kShapeMismatch,
        "'" + tensor + "' at byte",
        [tensor = tensor, dims = dims](GgufImage& image) { image.tensor(tensor).dims = dims; }));
  }
  cases.push_back(Changed("44_trailing_ones_are_accepted", std::nullopt, "", [](GgufImage& image) {
    image.tensor("blk.0.attn_q.weight").dims = {8, 8, 1, 1};
  }));
  for (const GgufImage::Tensor& tensor : TinyLlamaImage().tensors) {
    if (tensor.name == "output.weight") continue;  // tied embeddings, then
    cases.push_back(Changed("45_without_" + tensor.name, ModelError::kMissingTensor, tensor.name,
                            [name = tensor.name](GgufImage& image) { image.RemoveTensor(name); }));
  }
  cases.push_back(Changed("45_without_output", std::nullopt, "",
                          [](GgufImage& image) { image.RemoveTensor("output.weight"); }));
  cases.push_back(Changed("45_stray_layer_is_accepted", std::nullopt, "", [](GgufImage& image) {
    image.AddF32("blk.99.attn_q.weight", {8, 8});
  }));
  cases.push_back(Changed(
      "46_fewer_tokens_than_vocab", ModelError::kBadVocab, "'tokenizer.ggml.tokens' at byte",
      [](GgufImage& image) { image.Set("tokenizer.ggml.tokens", kGgufArray, RawStrings({"a"})); }));
  cases.push_back(Changed(
      "46_tokens_are_bytes", ModelError::kBadVocab, "tokenizer.ggml.tokens", [](GgufImage& image) {
        image.Set("tokenizer.ggml.tokens", kGgufArray, RawArray(kGgufU8, 4, "abcd"));
      }));
  for (const float factor : {0.0f, -1.0f, NAN, INFINITY}) {
    cases.push_back(Changed(Join("29_rope_factor_", cases.size()), ModelError::kBadHparam,
                            "'rope_freqs.weight'", [factor](GgufImage& image) {
                              image.AddF32("rope_freqs.weight", {2});
                              image.data.replace(image.tensors.back().offset, 8,
                                                 RawF32(1) + RawF32(factor));
                            }));
  }
  cases.push_back(Changed("44_rope_factors_shape", ModelError::kShapeMismatch, "rope_freqs.weight",
                          [](GgufImage& image) { image.AddF32("rope_freqs.weight", {3}); }));
  return cases;
}

namespace {

// A model in two parts, the first with all metadata, after a change to either.
MalformedCase Split(std::string name, std::optional<ModelError> expected, std::string mentions,
                    std::function<void(GgufImage&, GgufImage&)> change) {
  const auto parts = [change = std::move(change)] {
    GgufImage first = TinyLlamaImage(), second;
    const uint32_t total = static_cast<uint32_t>(first.tensors.size());
    first.RemoveTensor("output.weight");
    second.AddF32("output.weight", {8, 4});
    for (GgufImage* part : {&first, &second}) {
      part->Set("split.no", kGgufU16, std::string(part == &first ? "\0\0" : "\1\0", 2));
      part->Set("split.count", kGgufU16, std::string("\2\0", 2));
      part->Set("split.tensors.count", kGgufI32, RawU32(total));
    }
    change(first, second);
    return std::vector<std::string>{first.Bytes(), second.Bytes()};
  };
  return {std::move(name), parts, expected, std::move(mentions)};
}

}  // namespace

std::vector<MalformedCase> SplitCases() {
  return {
      Split("48_split_model_opens", std::nullopt, "", [](GgufImage&, GgufImage&) {}),
      Split("48_split_counts_disagree", ModelError::kCorrupt, "'split.count' at byte",
            [](GgufImage&, GgufImage& second) { second.SetU32("split.count", 3); }),
      Split("48_split_count_absent", ModelError::kCorrupt, "split.count",
            [](GgufImage& first, GgufImage&) { first.RemoveKey("split.count"); }),
      Split("48_split_count_wrong_type", ModelError::kBadType, "split.count",
            [](GgufImage& first, GgufImage&) { first.SetString("split.count", "2"); }),
      Split("48_split_same_part_twice", ModelError::kCorrupt, "'split.no' at byte",
            [](GgufImage&, GgufImage& second) { second.SetU32("split.no", 0); }),
      Split("48_split_tensor_count", ModelError::kCorrupt, "'split.tensors.count' at byte",
            [](GgufImage& first, GgufImage&) { first.SetU32("split.tensors.count", 7); }),
      Split("48_split_architectures", ModelError::kCorrupt, "'general.architecture' at byte",
            [](GgufImage&, GgufImage& second) {
              second.SetString("general.architecture", "falcon");
            }),
      Split("48_split_tensor_in_both", ModelError::kDuplicate, "'output.weight' at byte",
            [](GgufImage& first, GgufImage& second) {
              first.AddF32("output.weight", {8, 4});
              for (GgufImage* part : {&first, &second}) part->SetU32("split.tensors.count", 22);
            }),
      Split("48_split_second_part_cut", ModelError::kTruncated, "'output.weight' at byte",
            [](GgufImage&, GgufImage& second) { second.data.resize(64); }),
      Changed("48_one_part_of_two", ModelError::kCorrupt, "split.count",
              [](GgufImage& image) { image.SetU32("split.count", 2); }),
  };
}

}  // namespace stagecoach
