#include "model/model_file.h"

#include <xxhash.h>

#include <algorithm>
#include <array>
#include <cassert>
#include <charconv>
#include <cmath>
#include <set>
#include <span>
#include <unordered_map>
#include <utility>

#include "fmt/format.h"
#include "fmt/ranges.h"
#include "model/llama_params.h"
#include "model/model_error.h"
#include "model/status_macros.h"

namespace stagecoach {
namespace {

constexpr char kEmbeddingName[] = "token_embd.weight";
constexpr char kOutputName[] = "output.weight";
constexpr char kRopeFactorsName[] = "rope_freqs.weight";
constexpr int kMaxParts = 1024;
constexpr size_t kMissingNamesShown = 8;

using TensorIndex = std::unordered_map<std::string_view, const TensorInfo*>;

// A tensor that the architecture wants: rows == 0 for a vector.
struct TensorSpec {
  TensorRole role;
  std::string name;
  uint64_t columns;
  uint64_t rows;
  bool optional = false;
};

std::vector<TensorSpec> LayerSpecs(const ModelParams& p, int layer) {
  const auto name = [&](std::string_view suffix) {
    return fmt::format("blk.{}.{}", layer, suffix);
  };
  const uint64_t d_model = p.d_model;
  const uint64_t ffn = p.ffn_length;
  const uint64_t q_rows = uint64_t{1} * p.heads * p.key_length;
  const uint64_t k_rows = uint64_t{1} * p.kv_heads * p.key_length;
  const uint64_t v_rows = uint64_t{1} * p.kv_heads * p.value_length;
  const uint64_t mixed = uint64_t{1} * p.heads * p.value_length;
  return {
      {TensorRole::kAttnNorm, name("attn_norm.weight"), d_model, 0},
      {TensorRole::kAttnQ, name("attn_q.weight"), d_model, q_rows},
      {TensorRole::kAttnQBias, name("attn_q.bias"), q_rows, 0, true},
      {TensorRole::kAttnK, name("attn_k.weight"), d_model, k_rows},
      {TensorRole::kAttnKBias, name("attn_k.bias"), k_rows, 0, true},
      {TensorRole::kAttnV, name("attn_v.weight"), d_model, v_rows},
      {TensorRole::kAttnVBias, name("attn_v.bias"), v_rows, 0, true},
      {TensorRole::kAttnOutput, name("attn_output.weight"), mixed, d_model},
      {TensorRole::kAttnOutputBias, name("attn_output.bias"), d_model, 0, true},
      {TensorRole::kFfnNorm, name("ffn_norm.weight"), d_model, 0},
      {TensorRole::kFfnGate, name("ffn_gate.weight"), d_model, ffn},
      {TensorRole::kFfnUp, name("ffn_up.weight"), d_model, ffn},
      {TensorRole::kFfnDown, name("ffn_down.weight"), ffn, d_model},
  };
}

absl::Status CheckShape(const TensorSpec& spec, const TensorInfo& tensor) {
  std::vector<uint64_t> wanted = {spec.columns};
  if (spec.rows != 0) wanted.push_back(spec.rows);
  std::vector<uint64_t> dims = tensor.dims;
  while (dims.size() > wanted.size() && dims.back() == 1) dims.pop_back();
  if (dims == wanted) return absl::OkStatus();
  return MakeModelError(
      ModelError::kShapeMismatch,
      fmt::format("tensor '{}' at byte {} is [{}], but the metadata asks for [{}]", tensor.name,
                  tensor.record_offset, fmt::join(tensor.dims, ", "), fmt::join(wanted, ", ")));
}

// Finds the tensors of a unit and remembers which were used and which are missing.
class TensorBinder {
 public:
  // `header_end` is for messages about missing tensors.
  TensorBinder(const TensorIndex& index, uint64_t header_end)
      : index_(index), header_end_(header_end) {}

  const TensorInfo* Find(std::string_view name) {
    const auto it = index_.find(name);
    if (it == index_.end()) return nullptr;
    used_.insert(it->first);
    return it->second;
  }

  absl::Status Bind(const std::vector<TensorSpec>& specs, std::vector<UnitTensor>* unit) {
    for (const TensorSpec& spec : specs) {
      const TensorInfo* tensor = Find(spec.name);
      if (tensor == nullptr) {
        if (!spec.optional) missing_.push_back(spec.name);
        continue;
      }
      STAGECOACH_RETURN_IF_ERROR(CheckShape(spec, *tensor));
      unit->push_back({spec.role, tensor});
    }
    return absl::OkStatus();
  }

  absl::Status CheckNothingMissing() const {
    if (missing_.empty()) return absl::OkStatus();
    const size_t shown = std::min(missing_.size(), kMissingNamesShown);
    return MakeModelError(
        ModelError::kMissingTensor,
        fmt::format("{} tensors are not in the file, whose header ends at byte {}: {}{}",
                    missing_.size(), header_end_,
                    fmt::join(missing_.begin(), missing_.begin() + shown, ", "),
                    shown < missing_.size() ? ", ..." : ""));
  }

  bool IsUsed(std::string_view name) const { return used_.count(name) != 0; }

 private:
  const TensorIndex& index_;
  const uint64_t header_end_;
  std::set<std::string_view> used_;
  std::vector<std::string> missing_;
};

std::optional<int> LayerOfName(std::string_view name) {
  constexpr std::string_view kPrefix = "blk.";
  if (!name.starts_with(kPrefix)) return std::nullopt;
  int layer = 0;
  const char* const end = name.data() + name.size();
  const auto [rest, error] = std::from_chars(name.data() + kPrefix.size(), end, layer);
  if (error != std::errc() || rest == end || *rest != '.' || layer < 0) return std::nullopt;
  return layer;
}

// A block count that stops short of the file's layers, or goes on after the last of them. A gap
// or a single missing tensor is left to TensorBinder; a stray layer after a gap is merely unused.
absl::Status CheckBlockCount(const GgufFile& gguf, const ModelParams& params,
                             const TensorIndex& index) {
  std::set<int> layers;
  for (const auto& [name, tensor] : index) {
    if (const std::optional<int> layer = LayerOfName(name)) layers.insert(*layer);
  }
  if (layers.empty()) return absl::OkStatus();
  int contiguous = 0;
  while (layers.count(contiguous) != 0) ++contiguous;
  if (contiguous <= params.layers && *layers.rbegin() >= params.layers - 1) return absl::OkStatus();
  constexpr char kKey[] = "llama.block_count";
  return MakeModelError(ModelError::kBadHparam,
                        fmt::format("key '{}' at byte {} says {} layers, but the file has tensors "
                                    "of layers 0 to {}",
                                    kKey, gguf.KeyOffset(kKey), params.layers, *layers.rbegin()));
}

// Factors of llama3 RoPE scaling: F32 [rope_dims / 2], each finite and above 0.
absl::StatusOr<std::vector<float>> ReadRopeFactors(const RandomAccessFile& file,
                                                   const TensorInfo& tensor, int rope_dims) {
  if (tensor.type != TensorType::kF32) {
    return MakeModelError(ModelError::kUnsupportedType,
                          fmt::format("tensor '{}' at byte {} is {}; F32 is supported", tensor.name,
                                      tensor.record_offset, GetTensorTypeInfo(tensor.type).name));
  }
  const uint64_t count = rope_dims / 2;
  STAGECOACH_RETURN_IF_ERROR(CheckShape({TensorRole::kAttnQ, tensor.name, count, 0}, tensor));
  std::vector<float> factors(count);
  STAGECOACH_RETURN_IF_ERROR(
      ReadFully(file, tensor.offset, std::as_writable_bytes(std::span(factors))));
  for (size_t i = 0; i < factors.size(); ++i) {
    if (!std::isfinite(factors[i]) || !(factors[i] > 0)) {
      return MakeModelError(
          ModelError::kBadHparam,
          fmt::format("tensor '{}': element {} at byte {} is {}, not a positive "
                      "number",
                      tensor.name, i, tensor.offset + i * sizeof(float), factors[i]));
    }
  }
  return factors;
}

// The common part of "name-00002-of-00003.gguf" and the number of parts.
struct SplitName {
  std::string stem;  // "name"
  int parts = 0;
};

std::optional<SplitName> ParseSplitName(const std::string& path) {
  // "-00001-of-00003.gguf"
  constexpr std::string_view kPattern = "-#####-of-#####.gguf";
  if (path.size() < kPattern.size()) return std::nullopt;
  const std::string_view suffix = std::string_view(path).substr(path.size() - kPattern.size());
  for (size_t i = 0; i < kPattern.size(); ++i) {
    const bool matches =
        kPattern[i] == '#' ? suffix[i] >= '0' && suffix[i] <= '9' : suffix[i] == kPattern[i];
    if (!matches) return std::nullopt;
  }
  SplitName split{.stem = path.substr(0, path.size() - kPattern.size())};
  std::from_chars(suffix.data() + 10, suffix.data() + 15, split.parts);
  if (split.parts < 1) return std::nullopt;
  return split;
}

absl::Status SplitError(const std::string& problem) {
  return MakeModelError(ModelError::kCorrupt, problem +
                                                  "; give all parts of one model their names "
                                                  "<name>-<part>-of-<parts>.gguf in one folder");
}

// Part `index` of `gguf.size()` says of itself what the others say.
absl::Status CheckPart(const std::vector<GgufFile>& parts, size_t index, size_t tensor_count) {
  const GgufFile& part = parts[index];
  STAGECOACH_ASSIGN_OR_RETURN(const std::optional<uint64_t> count, part.Uint("split.count"));
  STAGECOACH_ASSIGN_OR_RETURN(const std::optional<uint64_t> number, part.Uint("split.no"));
  STAGECOACH_ASSIGN_OR_RETURN(const std::optional<uint64_t> tensors,
                              part.Uint("split.tensors.count"));
  STAGECOACH_ASSIGN_OR_RETURN(const std::optional<std::string> architecture,
                              part.String("general.architecture"));
  if (count.value_or(1) != parts.size()) {
    return SplitError(fmt::format("key 'split.count' at byte {} says {} parts, but there are {}",
                                  part.KeyOffset("split.count"), count.value_or(1), parts.size()));
  }
  if (number.value_or(0) != index) {
    return SplitError(fmt::format("key 'split.no' at byte {} says part {}, but it is part {}",
                                  part.KeyOffset("split.no"), number.value_or(0), index));
  }
  if (tensors.value_or(tensor_count) != tensor_count) {
    return SplitError(
        fmt::format("key 'split.tensors.count' at byte {} says {} tensors, but the parts have {}",
                    part.KeyOffset("split.tensors.count"), *tensors, tensor_count));
  }
  const auto& metadata = parts.front().metadata();
  const auto first = metadata.find("general.architecture");
  if (architecture && (first == metadata.end() || first->second != GgufValue(*architecture))) {
    return SplitError(
        fmt::format("key 'general.architecture' at byte {} is not what it is in the first part",
                    part.KeyOffset("general.architecture")));
  }
  return absl::OkStatus();
}

absl::StatusOr<TensorIndex> IndexTensors(const std::vector<GgufFile>& parts) {
  TensorIndex index;
  for (const GgufFile& part : parts) {
    for (const TensorInfo& tensor : part.tensors()) {
      if (!index.emplace(tensor.name, &tensor).second) {
        return MakeModelError(
            ModelError::kDuplicate,
            fmt::format("tensor '{}' at byte {} of part {} is in another part too", tensor.name,
                        tensor.record_offset, tensor.file_index));
      }
    }
  }
  return index;
}

}  // namespace

std::string_view TensorRoleName(TensorRole role) {
  static constexpr auto kNames = std::to_array<std::string_view>({
      "token_embedding",
      "output_norm",
      "output",
      "attn_norm",
      "attn_q",
      "attn_k",
      "attn_v",
      "attn_output",
      "attn_q_bias",
      "attn_k_bias",
      "attn_v_bias",
      "attn_output_bias",
      "ffn_norm",
      "ffn_gate",
      "ffn_up",
      "ffn_down",
  });
  static_assert(kNames.size() == static_cast<size_t>(TensorRole::kFfnDown) + 1);
  return kNames[static_cast<size_t>(role)];
}

std::string UnitName(const Unit& unit) {
  switch (unit.kind) {
    case Unit::Kind::kEmbedding:
      return "embedding";
    case Unit::Kind::kHead:
      return "head";
    case Unit::Kind::kLayer:
      break;
  }
  return fmt::format("layer {}", unit.layer);
}

std::vector<Unit> StageUnits(const ModelParams& params, int first_layer, int last_layer) {
  std::vector<Unit> units;
  if (first_layer == 0) units.push_back({Unit::Kind::kEmbedding});
  for (int layer = first_layer; layer < last_layer; ++layer) {
    units.push_back({Unit::Kind::kLayer, layer});
  }
  if (last_layer == params.layers) units.push_back({Unit::Kind::kHead});
  return units;
}

absl::StatusOr<std::shared_ptr<const ModelFile>> ModelFile::Open(const std::string& path,
                                                                 const ModelOptions& options) {
  std::optional<Manifest> manifest;
  if (!options.manifest.empty()) {
    STAGECOACH_ASSIGN_OR_RETURN(manifest, Manifest::Load(options.manifest));
  }
  std::vector<std::unique_ptr<RandomAccessFile>> files;
  const std::optional<SplitName> split = ParseSplitName(path);
  if (split && split->parts > kMaxParts) {
    return MakeModelError(ModelError::kLimit, fmt::format("'{}' is one of {} parts; at most {} are "
                                                          "allowed",
                                                          path, split->parts, kMaxParts));
  }
  for (int part = 1; split && part <= split->parts; ++part) {
    STAGECOACH_ASSIGN_OR_RETURN(
        files.emplace_back(),
        OpenFile(fmt::format("{}-{:05}-of-{:05}.gguf", split->stem, part, split->parts),
                 options.read_mode));
  }
  if (!split) {
    STAGECOACH_ASSIGN_OR_RETURN(files.emplace_back(), OpenFile(path, options.read_mode));
  }
  return FromFiles(std::move(files), std::move(manifest));
}

absl::StatusOr<std::shared_ptr<const ModelFile>> ModelFile::FromFiles(
    std::vector<std::unique_ptr<RandomAccessFile>> files, std::optional<Manifest> manifest) {
  assert(!files.empty());
  std::shared_ptr<ModelFile> model(new ModelFile);
  model->files_ = std::move(files);
  STAGECOACH_RETURN_IF_ERROR(model->ReadParts());
  if (absl::Status status = model->BindTensors(); !status.ok()) {
    return WithPath(status, model->files_.front()->path());
  }
  if (manifest) STAGECOACH_RETURN_IF_ERROR(manifest->CheckModel(*model));
  model->manifest_ = std::move(manifest);
  return std::shared_ptr<const ModelFile>(std::move(model));
}

absl::Status ModelFile::ReadParts() {
  size_t tensor_count = 0;
  std::string identity;  // of the model: header hash and size of every part
  for (size_t i = 0; i < files_.size(); ++i) {
    STAGECOACH_ASSIGN_OR_RETURN(identities_.emplace_back(), files_[i]->Identity());
    STAGECOACH_ASSIGN_OR_RETURN(GgufFile part, GgufFile::Parse(*files_[i], static_cast<int>(i)));
    tensor_count += part.tensors().size();
    identity += fmt::format("{} {}\n", part.header_hash(), files_[i]->size());
    gguf_.push_back(std::move(part));
  }
  for (size_t i = 0; i < gguf_.size(); ++i) {
    if (absl::Status status = CheckPart(gguf_, i, tensor_count); !status.ok()) {
      return WithPath(status, files_[i]->path());
    }
  }
  const XXH128_hash_t digest = XXH3_128bits(identity.data(), identity.size());
  hash_ = fmt::format("{:016x}{:016x}", digest.high64, digest.low64);
  return absl::OkStatus();
}

absl::Status ModelFile::BindTensors() {
  STAGECOACH_ASSIGN_OR_RETURN(const TensorIndex index, IndexTensors(gguf_));
  TensorBinder binder(index, gguf().data_offset());
  STAGECOACH_ASSIGN_OR_RETURN(params_, ReadLlamaParams(gguf(), binder.Find(kEmbeddingName)));
  STAGECOACH_RETURN_IF_ERROR(CheckBlockCount(gguf(), params_, index));
  const uint64_t d_model = params_.d_model;
  const uint64_t vocab = params_.vocab_size;
  params_.tied_embeddings = index.count(kOutputName) == 0;
  STAGECOACH_RETURN_IF_ERROR(
      binder.Bind({{TensorRole::kTokenEmbedding, kEmbeddingName, d_model, vocab}}, &embedding_));
  for (int layer = 0; layer < params_.layers; ++layer) {
    STAGECOACH_RETURN_IF_ERROR(binder.Bind(LayerSpecs(params_, layer), &layers_.emplace_back()));
  }
  const char* const output = params_.tied_embeddings ? kEmbeddingName : kOutputName;
  STAGECOACH_RETURN_IF_ERROR(
      binder.Bind({{TensorRole::kOutputNorm, "output_norm.weight", d_model, 0},
                   {TensorRole::kOutput, output, d_model, vocab}},
                  &head_));
  STAGECOACH_RETURN_IF_ERROR(binder.CheckNothingMissing());
  if (const TensorInfo* factors = binder.Find(kRopeFactorsName)) {
    STAGECOACH_ASSIGN_OR_RETURN(
        params_.rope_freq_factors,
        ReadRopeFactors(*files_[factors->file_index], *factors, params_.rope_dims));
  }
  for (const auto& [name, tensor] : index) {
    if (!binder.IsUsed(name)) unused_tensors_.emplace_back(name);
  }
  std::sort(unused_tensors_.begin(), unused_tensors_.end());
  return absl::OkStatus();
}

const std::vector<UnitTensor>& ModelFile::UnitTensors(const Unit& unit) const {
  if (unit.kind == Unit::Kind::kEmbedding) return embedding_;
  if (unit.kind == Unit::Kind::kHead) return head_;
  assert(unit.layer >= 0 && unit.layer < params_.layers);
  return layers_[unit.layer];
}

uint64_t ModelFile::UnitBytes(const Unit& unit) const {
  uint64_t bytes = 0;
  for (const UnitTensor& tensor : UnitTensors(unit)) bytes += tensor.tensor->bytes;
  return bytes;
}

absl::Status ModelFile::CheckUnchanged() const {
  for (size_t i = 0; i < files_.size(); ++i) {
    STAGECOACH_ASSIGN_OR_RETURN(const FileIdentity now, files_[i]->Identity());
    if (now != identities_[i]) {
      return MakeModelError(ModelError::kChanged,
                            fmt::format("'{}' is no longer the file that was opened ({} bytes, now "
                                        "{}); restart with the new file",
                                        files_[i]->path(), identities_[i].size, now.size));
    }
  }
  return absl::OkStatus();
}

}  // namespace stagecoach
