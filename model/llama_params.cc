#include "model/llama_params.h"

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "fmt/format.h"
#include "fmt/ranges.h"
#include "model/model_error.h"
#include "model/status_macros.h"

namespace stagecoach {
namespace {

constexpr std::string_view kArchitecture = "llama";

// Bounds that no model reaches; they keep products of two of them far from overflow.
constexpr uint64_t kMaxWidth = 1 << 20;
constexpr uint64_t kMaxHeadLength = 4096;
constexpr uint64_t kMaxVocabSize = kMaxArrayElements;

class LlamaParamsReader {
 public:
  LlamaParamsReader(const GgufFile& gguf, const TensorInfo* embedding)
      : gguf_(gguf), embedding_(embedding) {}

  absl::StatusOr<ModelParams> Run() {
    STAGECOACH_RETURN_IF_ERROR(ReadArchitecture());
    STAGECOACH_RETURN_IF_ERROR(ReadRequired());
    STAGECOACH_RETURN_IF_ERROR(ReadHeads());
    STAGECOACH_RETURN_IF_ERROR(ReadRope());
    STAGECOACH_RETURN_IF_ERROR(ReadRopeScaling());
    STAGECOACH_RETURN_IF_ERROR(ReadVocabSize());
    return std::move(params_);
  }

 private:
  absl::Status ReadArchitecture();
  absl::Status ReadRequired();
  absl::Status ReadHeads();
  absl::Status ReadRope();
  absl::Status ReadRopeScaling();
  absl::Status ReadVocabSize();

  static std::string Key(std::string_view suffix) {
    return fmt::format("{}.{}", kArchitecture, suffix);
  }

  absl::Status Fail(ModelError error, const std::string& key, const std::string& problem) const {
    return MakeModelError(
        error, fmt::format("key '{}' at byte {}: {}", key, gguf_.KeyOffset(key), problem));
  }

  // Checks `value` of `key` against [1, max].
  absl::Status Store(const std::string& key, uint64_t value, uint64_t max, int* out) const {
    if (value == 0 || value > max) {
      return Fail(ModelError::kBadHparam, key, fmt::format("{} is not within 1 to {}", value, max));
    }
    *out = static_cast<int>(value);
    return absl::OkStatus();
  }

  absl::Status StoreOr(const std::string& key, int fallback, uint64_t max, int* out) const {
    STAGECOACH_ASSIGN_OR_RETURN(const std::optional<uint64_t> value, gguf_.Uint(key));
    return Store(key, value.value_or(fallback), max, out);
  }

  // A float that must be finite and above 0 even as float32.
  absl::Status StorePositive(const std::string& key, double value, float* out) const {
    const float narrowed = static_cast<float>(value);
    if (!std::isfinite(narrowed) || !(narrowed > 0)) {
      return Fail(ModelError::kBadHparam, key, fmt::format("{} is not a positive number", value));
    }
    *out = narrowed;
    return absl::OkStatus();
  }

  // Notes `key` as missing if it is absent and then gives 0.
  absl::StatusOr<uint64_t> RequiredUint(const std::string& key) {
    STAGECOACH_ASSIGN_OR_RETURN(const std::optional<uint64_t> value, gguf_.Uint(key));
    if (!value) missing_.push_back(key);
    return value.value_or(0);
  }

  const GgufFile& gguf_;
  const TensorInfo* const embedding_;
  ModelParams params_;
  std::vector<std::string> missing_;
};

absl::Status LlamaParamsReader::ReadArchitecture() {
  constexpr char kKey[] = "general.architecture";
  STAGECOACH_ASSIGN_OR_RETURN(const std::optional<std::string> architecture, gguf_.String(kKey));
  if (!architecture) {
    missing_.push_back(kKey);  // reported with the other missing keys
  } else if (*architecture != kArchitecture) {
    return Fail(ModelError::kUnsupportedArch, kKey,
                fmt::format("architecture '{}' is not supported; '{}' is",
                            absl::Utf8SafeCEscape(architecture->substr(0, 64)), kArchitecture));
  }
  params_.architecture = kArchitecture;
  STAGECOACH_ASSIGN_OR_RETURN(std::optional<std::string> name, gguf_.String("general.name"));
  params_.name = std::move(name).value_or("");
  const std::string expert_key = Key("expert_count");
  STAGECOACH_ASSIGN_OR_RETURN(const std::optional<uint64_t> experts, gguf_.Uint(expert_key));
  if (experts.value_or(0) > 0) {
    return Fail(
        ModelError::kUnsupportedArch, expert_key,
        fmt::format("a mixture of {} experts is not supported; use a dense model", *experts));
  }
  return absl::OkStatus();
}

absl::Status LlamaParamsReader::ReadRequired() {
  struct Field {
    std::string_view suffix;
    uint64_t max;
    int* out;
  };
  const Field fields[] = {
      {"block_count", kMaxLayers, &params_.layers},
      {"embedding_length", kMaxWidth, &params_.d_model},
      {"attention.head_count", kMaxWidth, &params_.heads},
      {"feed_forward_length", kMaxWidth, &params_.ffn_length},
  };
  std::vector<uint64_t> values;
  for (const Field& field : fields) {
    STAGECOACH_ASSIGN_OR_RETURN(values.emplace_back(), RequiredUint(Key(field.suffix)));
  }
  const std::string context_key = Key("context_length");
  STAGECOACH_ASSIGN_OR_RETURN(const uint64_t context, RequiredUint(context_key));
  const std::string epsilon_key = Key("attention.layer_norm_rms_epsilon");
  STAGECOACH_ASSIGN_OR_RETURN(const std::optional<double> epsilon, gguf_.Float(epsilon_key));
  if (!epsilon) missing_.push_back(epsilon_key);
  if (!missing_.empty()) {
    return MakeModelError(
        ModelError::kMissingKey,
        fmt::format("the metadata, which ends at byte {}, lacks: {}",
                    gguf_.KeyOffset(missing_.front()), fmt::join(missing_, ", ")));
  }
  for (size_t i = 0; i < values.size(); ++i) {
    STAGECOACH_RETURN_IF_ERROR(
        Store(Key(fields[i].suffix), values[i], fields[i].max, fields[i].out));
  }
  if (context == 0 || context > kMaxContextLength) {
    return Fail(ModelError::kLimit, context_key,
                fmt::format("a context of {} is not within 1 to {}", context, kMaxContextLength));
  }
  params_.context_length = static_cast<int>(context);
  return StorePositive(epsilon_key, *epsilon, &params_.norm_epsilon);
}

absl::Status LlamaParamsReader::ReadHeads() {
  const int heads = params_.heads;
  if (params_.d_model % heads != 0) {
    return Fail(
        ModelError::kBadHparam, Key("attention.head_count"),
        fmt::format("embedding length {} is not a multiple of {} heads", params_.d_model, heads));
  }
  const std::string kv_key = Key("attention.head_count_kv");
  STAGECOACH_RETURN_IF_ERROR(StoreOr(kv_key, heads, heads, &params_.kv_heads));
  if (heads % params_.kv_heads != 0) {
    return Fail(ModelError::kBadHparam, kv_key,
                fmt::format("{} heads are not a multiple of {}", heads, params_.kv_heads));
  }
  const int head_length = params_.d_model / heads;
  STAGECOACH_RETURN_IF_ERROR(
      StoreOr(Key("attention.key_length"), head_length, kMaxHeadLength, &params_.key_length));
  return StoreOr(Key("attention.value_length"), head_length, kMaxHeadLength, &params_.value_length);
}

absl::Status LlamaParamsReader::ReadRope() {
  const std::string dims_key = Key("rope.dimension_count");
  STAGECOACH_RETURN_IF_ERROR(
      StoreOr(dims_key, params_.key_length, params_.key_length, &params_.rope_dims));
  if (params_.rope_dims % 2 != 0) {
    return Fail(ModelError::kBadHparam, dims_key,
                fmt::format("{} rotated dimensions are not pairs", params_.rope_dims));
  }
  const std::string base_key = Key("rope.freq_base");
  STAGECOACH_ASSIGN_OR_RETURN(const std::optional<double> base, gguf_.Float(base_key));
  return base ? StorePositive(base_key, *base, &params_.rope_freq_base) : absl::OkStatus();
}

// Linear scaling divides positions by a factor. Without a type, a factor means linear.
absl::Status LlamaParamsReader::ReadRopeScaling() {
  const std::string type_key = Key("rope.scaling.type");
  const std::string old_key = Key("rope.scale_linear");
  std::string factor_key = Key("rope.scaling.factor");
  STAGECOACH_ASSIGN_OR_RETURN(const std::optional<std::string> type, gguf_.String(type_key));
  STAGECOACH_ASSIGN_OR_RETURN(std::optional<double> factor, gguf_.Float(factor_key));
  if (!factor) {
    STAGECOACH_ASSIGN_OR_RETURN(factor, gguf_.Float(old_key));
    if (factor) factor_key = old_key;
  }
  if (type && *type != "none" && *type != "linear") {
    return Fail(ModelError::kUnsupported, type_key,
                fmt::format("RoPE scaling '{}' is not supported; 'none' and 'linear' are",
                            absl::Utf8SafeCEscape(type->substr(0, 64))));
  }
  float divisor = 1.0f;
  if (factor) STAGECOACH_RETURN_IF_ERROR(StorePositive(factor_key, *factor, &divisor));
  if (type == "none") return absl::OkStatus();
  if (type == "linear" && !factor) {
    return MakeModelError(ModelError::kMissingKey,
                          fmt::format("'{}', which the linear RoPE scaling at byte {} needs",
                                      factor_key, gguf_.KeyOffset(type_key)));
  }
  return StorePositive(factor_key, 1.0 / divisor, &params_.rope_freq_scale);
}

absl::Status LlamaParamsReader::ReadVocabSize() {
  const std::string size_key = Key("vocab_size");
  constexpr char kTokensKey[] = "tokenizer.ggml.tokens";
  STAGECOACH_ASSIGN_OR_RETURN(const std::optional<uint64_t> size, gguf_.Uint(size_key));
  const absl::StatusOr<const std::vector<std::string>*> tokens = gguf_.StringArray(kTokensKey);
  if (!tokens.ok()) {
    return Fail(ModelError::kBadVocab, kTokensKey, "the vocabulary is not an array of strings");
  }
  if (size && *tokens != nullptr && *size != (*tokens)->size()) {
    return Fail(ModelError::kBadVocab, kTokensKey,
                fmt::format("{} tokens, but {} says {}", (*tokens)->size(), size_key, *size));
  }
  if (size) return Store(size_key, *size, kMaxVocabSize, &params_.vocab_size);
  if (*tokens != nullptr) {
    return Store(kTokensKey, (*tokens)->size(), kMaxVocabSize, &params_.vocab_size);
  }
  if (embedding_ == nullptr) {
    return MakeModelError(ModelError::kMissingTensor,
                          fmt::format("token_embd.weight is not in the file, whose header ends at "
                                      "byte {}",
                                      gguf_.data_offset()));
  }
  return Store(size_key, embedding_->rows(), kMaxVocabSize, &params_.vocab_size);
}

}  // namespace

absl::StatusOr<ModelParams> ReadLlamaParams(const GgufFile& gguf, const TensorInfo* embedding) {
  return LlamaParamsReader(gguf, embedding).Run();
}

}  // namespace stagecoach
