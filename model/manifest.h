// Hashes of every tensor of a model, in a text file: what a worker checks the bytes it reads
// against. One record a line, fields apart by one space:
//   stagecoach-manifest 1
//   model <ModelFile::hash()>
//   <xxh3-64 of the tensor's bytes, 16 hex digits> <bytes> <tensor's name>
#ifndef STAGECOACH_MODEL_MANIFEST_H_
#define STAGECOACH_MODEL_MANIFEST_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace stagecoach {

class ModelFile;
struct TensorInfo;

inline constexpr uint64_t kMaxManifestBytes = 64 << 20;

uint64_t HashTensorBytes(std::span<const std::byte> bytes);  // xxh3-64

// Immutable after it was made; const members are thread-safe.
class Manifest {
 public:
  // Reads every tensor of every part once.
  static absl::StatusOr<Manifest> OfModel(const ModelFile& model);
  // Errors: kBadType for what is no manifest, kDuplicate, naming the line.
  static absl::StatusOr<Manifest> Parse(std::string_view text);
  // NOT_FOUND, PERMISSION_DENIED, kIo, kLimit and those of Parse, with the path.
  static absl::StatusOr<Manifest> Load(const std::string& path);

  std::string ToText() const;
  const std::string& model_hash() const { return model_hash_; }

  // kCorrupt, saying what differs, unless the manifest is of `model` and has all its tensors.
  absl::Status CheckModel(const ModelFile& model) const;
  // kCorrupt if the hash of the tensor's bytes is not the one noted.
  absl::Status CheckTensor(const TensorInfo& tensor, uint64_t hash) const;

 private:
  struct Record {
    uint64_t hash = 0;
    uint64_t bytes = 0;
  };
  std::string model_hash_;
  std::map<std::string, Record, std::less<>> tensors_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_MODEL_MANIFEST_H_
