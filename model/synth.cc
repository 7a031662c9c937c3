#include "model/synth.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <cmath>
#include <map>
#include <memory>
#include <numbers>
#include <optional>
#include <span>
#include <utility>

#include "fmt/format.h"
#include "fmt/ranges.h"
#include "model/gguf_writer.h"
#include "model/random_blocks.h"
#include "model/status_macros.h"
#include "model/synth_vocab.h"
#include "model/tensor_type.h"
#include "model/type_mix.h"

namespace stagecoach {
namespace {

struct SynthShape {
  std::string_view name;
  uint32_t layers;
  uint32_t d_model;
  uint32_t heads;
  uint32_t kv_heads;
  uint32_t ffn_length;
  uint32_t vocab_size;
  uint32_t context_length;
  float rope_freq_base = 10000.0f;
  bool tied_embeddings = false;
  bool llama3_rope = false;  // has rope_freqs.weight
};

// The published configurations of the models named; "demo" is the bundled model's, "tiny" is for
// tests.
constexpr auto kShapes = std::to_array<SynthShape>({
    {"tiny", 2, 256, 4, 2, 512, 512, 512},
    {"demo", 32, 256, 4, 2, 512, 1024, 1024},
    {"smollm-135m", 30, 576, 9, 3, 1536, 49152, 2048, 10000.0f, true},
    {"tinyllama-1.1b", 22, 2048, 32, 4, 5632, 32000, 2048},
    {"llama3.2-1b", 16, 2048, 32, 8, 8192, 128256, 131072, 500000.0f, true, true},
    {"llama2-7b", 32, 4096, 32, 32, 11008, 32000, 4096},
    {"mistral-7b", 32, 4096, 32, 8, 14336, 32000, 32768, 1000000.0f},
    {"llama3-8b", 32, 4096, 32, 8, 14336, 128256, 8192, 500000.0f},
    {"llama2-13b", 40, 5120, 40, 40, 13824, 32000, 4096},
    {"llama2-70b", 80, 8192, 64, 8, 28672, 32000, 4096},
});

// About this many bytes of random blocks are made for each type and row length; tensors are cut
// from them at random places.
constexpr size_t kPoolBytes = 4 << 20;
constexpr size_t kMaxPools = 12;  // 48 MiB

std::string Lower(std::string_view text) {
  std::string lower(text);
  for (char& c : lower) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return lower;
}

// The type for rows of `columns` elements: `wanted`, or where its blocks do not fit what
// llama.cpp's quantiser falls back to (Q4_0 for the types whose fallback this project does not
// support).
TensorType FittingType(TensorType wanted, uint64_t columns) {
  if (columns % GetTensorTypeInfo(wanted).block_elements == 0) return wanted;
  TensorType legacy = wanted;
  if (wanted == TensorType::kQ2_K || wanted == TensorType::kQ3_K) legacy = TensorType::kQ4_0;
  if (wanted == TensorType::kQ4_K) legacy = TensorType::kQ5_0;
  if (wanted == TensorType::kQ5_K) legacy = TensorType::kQ5_1;
  if (wanted == TensorType::kQ6_K) legacy = TensorType::kQ8_0;
  return columns % GetTensorTypeInfo(legacy).block_elements == 0 ? legacy : TensorType::kF16;
}

class SynthModel {
 public:
  SynthModel(const SynthShape& shape, const TypeMix& mix, uint64_t seed)
      : shape_(shape), mix_(mix), seed_(seed), random_(seed) {}

  absl::Status Write(const std::string& path) {
    STAGECOACH_ASSIGN_OR_RETURN(writer_, GgufWriter::Create(path));
    AddMetadata();
    PlanTensors();
    for (const Tensor& tensor : tensors_) {
      STAGECOACH_RETURN_IF_ERROR(writer_->AddTensor(tensor.name, tensor.type, tensor.dims));
    }
    STAGECOACH_RETURN_IF_ERROR(writer_->WriteHeader());
    for (const Tensor& tensor : tensors_) STAGECOACH_RETURN_IF_ERROR(WriteTensor(tensor));
    return writer_->Finish();
  }

 private:
  enum class Content { kMatrix, kNorm, kRopeFactors };
  struct Tensor {
    std::string name;
    TensorType type;
    std::vector<uint64_t> dims;
    Content content;
  };

  void AddMetadata();
  void PlanTensors();
  void PlanLayer(uint32_t layer);
  void PlanMatrix(std::string name, TensorType type, uint64_t columns, uint64_t rows) {
    tensors_.push_back(
        {std::move(name), FittingType(type, columns), {columns, rows}, Content::kMatrix});
  }
  void PlanVector(std::string name, uint64_t size, Content content) {
    tensors_.push_back({std::move(name), TensorType::kF32, {size}, content});
  }
  absl::Status WriteTensor(const Tensor& tensor);
  absl::Status WriteMatrix(const Tensor& tensor);
  const std::vector<std::byte>& Pool(TensorType type, uint64_t columns);

  const SynthShape& shape_;
  const TypeMix mix_;
  const uint64_t seed_;
  FastRandom random_;
  std::unique_ptr<GgufWriter> writer_;
  std::vector<Tensor> tensors_;
  std::map<std::pair<TensorType, uint64_t>, std::vector<std::byte>> pools_;  // by type and columns
};

void SynthModel::AddMetadata() {
  const uint32_t head_length = shape_.d_model / shape_.heads;
  writer_->AddString("general.architecture", "llama");
  writer_->AddString("general.name", fmt::format("synthetic {} {}", shape_.name, mix_.name));
  writer_->AddUint32("general.quantization_version", 2);
  writer_->AddUint32("llama.block_count", shape_.layers);
  writer_->AddUint32("llama.context_length", shape_.context_length);
  writer_->AddUint32("llama.embedding_length", shape_.d_model);
  writer_->AddUint32("llama.feed_forward_length", shape_.ffn_length);
  writer_->AddUint32("llama.attention.head_count", shape_.heads);
  writer_->AddUint32("llama.attention.head_count_kv", shape_.kv_heads);
  writer_->AddFloat32("llama.attention.layer_norm_rms_epsilon", 1e-5f);
  writer_->AddUint32("llama.rope.dimension_count", head_length);
  writer_->AddFloat32("llama.rope.freq_base", shape_.rope_freq_base);
  writer_->AddUint32("llama.vocab_size", shape_.vocab_size);
  AddSyntheticVocab(shape_.vocab_size, *writer_);
}

void SynthModel::PlanTensors() {
  const uint64_t d_model = shape_.d_model;
  const bool tied = shape_.tied_embeddings;
  PlanMatrix("token_embd.weight", tied ? mix_.output : mix_.base, d_model, shape_.vocab_size);
  if (shape_.llama3_rope) {
    PlanVector("rope_freqs.weight", d_model / shape_.heads / 2, Content::kRopeFactors);
  }
  for (uint32_t layer = 0; layer < shape_.layers; ++layer) PlanLayer(layer);
  PlanVector("output_norm.weight", d_model, Content::kNorm);
  if (!tied) PlanMatrix("output.weight", mix_.output, d_model, shape_.vocab_size);
}

void SynthModel::PlanLayer(uint32_t layer) {
  const uint64_t d_model = shape_.d_model;
  const uint64_t kv_length = d_model / shape_.heads * shape_.kv_heads;
  const TensorType v_and_down =
      mix_.VAndDown(static_cast<int>(layer), static_cast<int>(shape_.layers));
  const auto name = [&](std::string_view part) {
    return fmt::format("blk.{}.{}.weight", layer, part);
  };
  PlanVector(name("attn_norm"), d_model, Content::kNorm);
  PlanMatrix(name("attn_q"), mix_.base, d_model, d_model);
  PlanMatrix(name("attn_k"), mix_.base, d_model, kv_length);
  PlanMatrix(name("attn_v"), v_and_down, d_model, kv_length);
  PlanMatrix(name("attn_output"), mix_.base, d_model, d_model);
  PlanVector(name("ffn_norm"), d_model, Content::kNorm);
  PlanMatrix(name("ffn_gate"), mix_.base, d_model, shape_.ffn_length);
  PlanMatrix(name("ffn_up"), mix_.base, d_model, shape_.ffn_length);
  PlanMatrix(name("ffn_down"), v_and_down, shape_.ffn_length, d_model);
}

// Llama 3's RoPE scaling (factor 32, low and high frequency factors 1 and 4, original context
// 8192): wave lengths over 8192 positions are stretched by 32, those under 8192 / 4 are left alone,
// with a smooth ramp between.
std::vector<float> Llama3RopeFactors(size_t count, float freq_base) {
  constexpr double kFactor = 32, kLow = 1, kHigh = 4, kOriginalContext = 8192;
  std::vector<float> factors(count);
  for (size_t i = 0; i < count; ++i) {
    const double frequency = std::pow(freq_base, -static_cast<double>(i) / count);
    const double turns = kOriginalContext * frequency / (2 * std::numbers::pi);
    const double ramp = std::clamp((turns - kLow) / (kHigh - kLow), 0.0, 1.0);
    factors[i] = static_cast<float>(1 / ((1 - ramp) / kFactor + ramp));
  }
  return factors;
}

absl::Status SynthModel::WriteTensor(const Tensor& tensor) {
  if (tensor.content == Content::kMatrix) return WriteMatrix(tensor);
  std::vector<float> values(tensor.dims[0]);
  if (tensor.content == Content::kRopeFactors) {
    values = Llama3RopeFactors(values.size(), shape_.rope_freq_base);
  } else {
    for (float& value : values) value = random_.Uniform(0.9f, 1.1f);
  }
  return writer_->WriteData(std::as_bytes(std::span(values)));
}

const std::vector<std::byte>& SynthModel::Pool(TensorType type, uint64_t columns) {
  std::vector<std::byte>& pool = pools_[{type, columns}];
  if (!pool.empty()) return pool;
  // An odd number of blocks, so that the pool's end does not fall on the same place of a row each
  // time and rows do not repeat.
  const size_t blocks = kPoolBytes / GetTensorTypeInfo(type).block_bytes | 1;
  FastRandom random(seed_ ^ (columns << 8 | static_cast<uint32_t>(type)));
  pool = MakeRandomBlocks(type, blocks, 1 / std::sqrt(static_cast<float>(columns)), random);
  return pool;
}

absl::Status SynthModel::WriteMatrix(const Tensor& tensor) {
  const uint64_t columns = tensor.dims[0];
  if (pools_.size() >= kMaxPools && pools_.count({tensor.type, columns}) == 0) pools_.clear();
  const std::span<const std::byte> pool = Pool(tensor.type, columns);
  STAGECOACH_ASSIGN_OR_RETURN(const uint64_t row_bytes, RowBytes(tensor.type, columns));
  const uint32_t block_bytes = GetTensorTypeInfo(tensor.type).block_bytes;
  size_t at = random_.Next() % (pool.size() / block_bytes) * block_bytes;
  for (uint64_t left = row_bytes * tensor.dims[1]; left > 0;) {
    const size_t n = std::min<uint64_t>(left, pool.size() - at);
    STAGECOACH_RETURN_IF_ERROR(writer_->WriteData(pool.subspan(at, n)));
    left -= n;
    at = 0;
  }
  return absl::OkStatus();
}

}  // namespace

std::vector<std::string_view> SynthShapeNames() {
  std::vector<std::string_view> names;
  for (const SynthShape& shape : kShapes) names.push_back(shape.name);
  return names;
}

std::vector<std::string_view> SynthTypeNames() {
  std::vector<std::string_view> names;
  for (const TypeMix& mix : TypeMixes()) names.push_back(mix.name);
  for (const TensorTypeInfo& info : AllTensorTypes()) names.push_back(info.name);
  return names;
}

absl::Status WriteSyntheticModel(const std::string& path, const SynthSpec& spec) {
  const std::string shape_name = Lower(spec.shape);
  const auto shape = std::find_if(kShapes.begin(), kShapes.end(),
                                  [&](const SynthShape& s) { return s.name == shape_name; });
  if (shape == kShapes.end()) {
    return absl::InvalidArgumentError(fmt::format("no shape is called '{}'; there are {}",
                                                  spec.shape, fmt::join(SynthShapeNames(), ", ")));
  }
  const std::optional<TypeMix> mix = FindTypeMix(spec.types);
  if (!mix) {
    return absl::InvalidArgumentError(fmt::format("no types are called '{}'; there are {}",
                                                  spec.types, fmt::join(SynthTypeNames(), ", ")));
  }
  return SynthModel(*shape, *mix, spec.seed).Write(path);
}

}  // namespace stagecoach
