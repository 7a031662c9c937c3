// A model as the pipeline sees it: hyper-parameters, and for each unit the tensors it is made of.
#ifndef STAGECOACH_MODEL_MODEL_FILE_H_
#define STAGECOACH_MODEL_MODEL_FILE_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "model/direct_file.h"
#include "model/file.h"
#include "model/gguf.h"
#include "model/manifest.h"

namespace stagecoach {

inline constexpr int kMaxLayers = 512;
inline constexpr int64_t kMaxContextLength = 1 << 22;

// Hyper-parameters of the `llama` architecture. All counts are >= 1 and consistent with each other.
struct ModelParams {
  std::string architecture;  // "llama"
  std::string name;
  int layers = 0;
  int d_model = 0;
  int heads = 0;
  int kv_heads = 0;      // divides heads
  int key_length = 0;    // per head
  int value_length = 0;  // per head
  int rope_dims = 0;     // even, <= key_length
  int ffn_length = 0;
  int vocab_size = 0;
  int context_length = 0;  // trained
  float norm_epsilon = 0;
  float rope_freq_base = 10000.0f;
  float rope_freq_scale = 1.0f;          // 1 / linear scaling factor
  std::vector<float> rope_freq_factors;  // [rope_dims / 2], llama3 scaling; empty = all 1
  bool tied_embeddings = false;          // the head uses the embedding matrix
};

// The part a tensor plays. One name in the file per (role, layer).
enum class TensorRole {
  kTokenEmbedding,  // [vocab][d_model]
  kOutputNorm,      // [d_model]
  kOutput,          // [vocab][d_model]
  kAttnNorm,        // [d_model]
  kAttnQ,           // [heads * key_length][d_model]
  kAttnK,           // [kv_heads * key_length][d_model]
  kAttnV,           // [kv_heads * value_length][d_model]
  kAttnOutput,      // [d_model][heads * value_length]
  kAttnQBias,       // optional [heads * key_length], likewise below
  kAttnKBias,
  kAttnVBias,
  kAttnOutputBias,
  kFfnNorm,  // [d_model]
  kFfnGate,  // [ffn_length][d_model]
  kFfnUp,    // [ffn_length][d_model]
  kFfnDown,  // [d_model][ffn_length]
};
std::string_view TensorRoleName(TensorRole role);

// What the layer store loads at once: the token embedding, one layer, or the head (output norm and
// output matrix; with tied embeddings the embedding matrix under the role kOutput).
struct Unit {
  enum class Kind { kEmbedding, kLayer, kHead };
  Kind kind = Kind::kLayer;
  int layer = 0;  // kLayer only
  friend bool operator==(const Unit&, const Unit&) = default;
};
std::string UnitName(const Unit& unit);  // "embedding", "layer 7", "head"

struct UnitTensor {
  TensorRole role;
  const TensorInfo* tensor;  // owned by the ModelFile
};

struct ModelOptions {
  ReadMode read_mode = ReadMode::kBuffered;
  std::string manifest = {};  // path of a manifest to check tensors against; empty = none
};

// Immutable after Open; const members are thread-safe. Tensor data is read by the caller through
// file(tensor.file_index).
class ModelFile {
 public:
  // Opens a GGUF file, or a split model by the path of any of its parts
  // (name-00001-of-0000N.gguf: all parts are opened and must agree). Checks everything that can be
  // checked without reading tensor data, for all layers. Errors: NOT_FOUND, PERMISSION_DENIED or
  // any ModelError; parts that disagree are kCorrupt. Tensors of layers that block_count does not
  // count are unused if a gap separates them from the others (blk.99), else kBadHparam.
  // A manifest that is not of this model is kCorrupt.
  static absl::StatusOr<std::shared_ptr<const ModelFile>> Open(const std::string& path,
                                                               const ModelOptions& options = {});
  // The same over given files (part 1 first; at least one).
  static absl::StatusOr<std::shared_ptr<const ModelFile>> FromFiles(
      std::vector<std::unique_ptr<RandomAccessFile>> files,
      std::optional<Manifest> manifest = std::nullopt);

  const ModelParams& params() const { return params_; }
  const GgufFile& gguf() const { return gguf_.front(); }  // metadata of the first part
  const std::vector<GgufFile>& parts() const { return gguf_; }
  const RandomAccessFile& file(int file_index) const { return *files_[file_index]; }

  // Tensors of `unit` in the order in which they are used. Unit must exist in this model.
  const std::vector<UnitTensor>& UnitTensors(const Unit& unit) const;
  uint64_t UnitBytes(const Unit& unit) const;

  // What every tensor's bytes should be; nullptr if none was given.
  const Manifest* manifest() const { return manifest_ ? &*manifest_ : nullptr; }

  // Identity of the model for all processes: xxh3-128 over the header hashes and file sizes.
  const std::string& hash() const { return hash_; }
  // Tensors in the file that the architecture does not use (kept for a warning).
  const std::vector<std::string>& unused_tensors() const { return unused_tensors_; }
  // kChanged if any part is no longer the file that was opened.
  absl::Status CheckUnchanged() const;

 private:
  ModelFile() = default;
  absl::Status ReadParts();    // files_ -> gguf_, identities_, hash_
  absl::Status BindTensors();  // gguf_ -> params_ and the units
  ModelParams params_;
  std::vector<std::unique_ptr<RandomAccessFile>> files_;
  std::vector<FileIdentity> identities_;
  std::vector<GgufFile> gguf_;
  std::vector<UnitTensor> embedding_, head_;
  std::vector<std::vector<UnitTensor>> layers_;
  std::vector<std::string> unused_tensors_;
  std::string hash_;
  std::optional<Manifest> manifest_;
};

// Units of the stage that holds layers [first, last), in execution order. The first stage has the
// embedding, the last one the head.
std::vector<Unit> StageUnits(const ModelParams& params, int first_layer, int last_layer);

}  // namespace stagecoach

#endif  // STAGECOACH_MODEL_MODEL_FILE_H_
