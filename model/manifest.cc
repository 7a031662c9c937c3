#include "model/manifest.h"

#include <algorithm>
#include <charconv>
#include <memory>
#include <utility>
#include <vector>

#include "fmt/format.h"
#include "model/file.h"
#include "model/model_error.h"
#include "model/model_file.h"
#include "model/status_macros.h"
#include "xxhash.h"

namespace stagecoach {
namespace {

constexpr std::string_view kFirstLine = "stagecoach-manifest 1";
constexpr std::string_view kModelPrefix = "model ";
constexpr size_t kHashDigits = 16;
constexpr size_t kHashChunkBytes = 4 << 20;

// The tensor's bytes, read and hashed chunk by chunk.
absl::StatusOr<uint64_t> HashTensor(const RandomAccessFile& file, const TensorInfo& tensor) {
  const std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> state(XXH3_createState(),
                                                                       &XXH3_freeState);
  if (state == nullptr) return absl::ResourceExhaustedError("no memory to hash in");
  XXH3_64bits_reset(state.get());
  std::vector<std::byte> chunk(std::min<uint64_t>(kHashChunkBytes, tensor.bytes));
  for (uint64_t done = 0; done < tensor.bytes;) {
    const std::span<std::byte> out(chunk.data(),
                                   std::min<uint64_t>(chunk.size(), tensor.bytes - done));
    STAGECOACH_RETURN_IF_ERROR(ReadFully(file, tensor.offset + done, out));
    XXH3_64bits_update(state.get(), out.data(), out.size());
    done += out.size();
  }
  return XXH3_64bits_digest(state.get());
}

// Takes the text up to `end` (or all of it) from the front of `text`.
std::string_view TakeUntil(std::string_view& text, char end) {
  const size_t at = text.find(end);
  const std::string_view taken = text.substr(0, at);
  text.remove_prefix(at == std::string_view::npos ? text.size() : at + 1);
  return taken;
}

template <typename Int>
bool ParseWhole(std::string_view text, int base, Int* value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *value, base);
  return error == std::errc() && end == text.data() + text.size();
}

absl::Status Mismatch(const std::string& problem) {
  return MakeModelError(ModelError::kCorrupt,
                        problem +
                            "; fetch the model file again, or make a new manifest with "
                            "'stagecoach inspect --hash' if it is meant to be different");
}

}  // namespace

uint64_t HashTensorBytes(std::span<const std::byte> bytes) {
  return XXH3_64bits(bytes.data(), bytes.size());
}

absl::StatusOr<Manifest> Manifest::OfModel(const ModelFile& model) {
  Manifest manifest;
  manifest.model_hash_ = model.hash();
  for (const GgufFile& part : model.parts()) {
    for (const TensorInfo& tensor : part.tensors()) {
      STAGECOACH_ASSIGN_OR_RETURN(const uint64_t hash,
                                  HashTensor(model.file(tensor.file_index), tensor));
      manifest.tensors_[tensor.name] = {hash, tensor.bytes};
    }
  }
  return manifest;
}

absl::StatusOr<Manifest> Manifest::Parse(std::string_view text) {
  Manifest manifest;
  if (TakeUntil(text, '\n') != kFirstLine || !text.starts_with(kModelPrefix)) {
    return MakeModelError(ModelError::kBadType,
                          fmt::format("not a manifest: its first lines are '{}' and 'model ...'; "
                                      "make one with 'stagecoach inspect --hash'",
                                      kFirstLine));
  }
  text.remove_prefix(kModelPrefix.size());
  manifest.model_hash_ = TakeUntil(text, '\n');
  for (int line_number = 3; !text.empty(); ++line_number) {
    std::string_view line = TakeUntil(text, '\n');
    const std::string_view hash = TakeUntil(line, ' ');
    const std::string_view bytes = TakeUntil(line, ' ');
    Record record;
    if (hash.size() != kHashDigits || !ParseWhole(hash, 16, &record.hash) ||
        !ParseWhole(bytes, 10, &record.bytes) || line.empty()) {
      return MakeModelError(ModelError::kBadType,
                            fmt::format("line {} of the manifest is not '<16 hex digits> <bytes> "
                                        "<tensor name>'",
                                        line_number));
    }
    if (!manifest.tensors_.emplace(line, record).second) {
      return MakeModelError(
          ModelError::kDuplicate,
          fmt::format("line {} of the manifest names a tensor for the second time", line_number));
    }
  }
  return manifest;
}

absl::StatusOr<Manifest> Manifest::Load(const std::string& path) {
  STAGECOACH_ASSIGN_OR_RETURN(const auto file, OpenFile(path));
  if (file->size() > kMaxManifestBytes) {
    return MakeModelError(ModelError::kLimit,
                          fmt::format("'{}' has {} bytes; a manifest has at most {}", path,
                                      file->size(), kMaxManifestBytes));
  }
  std::string text(file->size(), '\0');
  STAGECOACH_RETURN_IF_ERROR(ReadFully(*file, 0, std::as_writable_bytes(std::span<char>(text))));
  absl::StatusOr<Manifest> manifest = Parse(text);
  if (!manifest.ok()) return WithPath(manifest.status(), path);
  return manifest;
}

std::string Manifest::ToText() const {
  std::string text = fmt::format("{}\n{}{}\n", kFirstLine, kModelPrefix, model_hash_);
  for (const auto& [name, record] : tensors_) {
    text += fmt::format("{:016x} {} {}\n", record.hash, record.bytes, name);
  }
  return text;
}

absl::Status Manifest::CheckModel(const ModelFile& model) const {
  if (model_hash_ != model.hash()) {
    return Mismatch(fmt::format("the manifest is of model {}, but '{}' is model {}", model_hash_,
                                model.file(0).path(), model.hash()));
  }
  for (const GgufFile& part : model.parts()) {
    for (const TensorInfo& tensor : part.tensors()) {
      const auto it = tensors_.find(tensor.name);
      if (it != tensors_.end() && it->second.bytes == tensor.bytes) continue;
      return Mismatch(
          fmt::format("the manifest has no tensor '{}' of {} bytes", tensor.name, tensor.bytes));
    }
  }
  return absl::OkStatus();
}

absl::Status Manifest::CheckTensor(const TensorInfo& tensor, uint64_t hash) const {
  const auto it = tensors_.find(tensor.name);
  if (it != tensors_.end() && it->second.hash == hash) return absl::OkStatus();
  return Mismatch(
      fmt::format("the bytes hash to {:016x}, but the manifest says {}", hash,
                  it == tensors_.end() ? "nothing" : fmt::format("{:016x}", it->second.hash)));
}

}  // namespace stagecoach
