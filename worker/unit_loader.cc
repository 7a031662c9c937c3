#include "worker/unit_loader.h"

#include <algorithm>
#include <new>
#include <span>
#include <string>
#include <utility>

#include "fmt/format.h"
#include "model/file.h"
#include "model/model_error.h"
#include "xxhash.h"

namespace stagecoach {
namespace {

absl::Status Cancelled() { return absl::CancelledError("load cancelled"); }

// The same error, saying which tensor it struck.
absl::Status NameTensor(const absl::Status& status, const TensorInfo& tensor) {
  const std::string where = fmt::format("tensor '{}' ({} bytes at offset {}): ", tensor.name,
                                        tensor.bytes, tensor.offset);
  std::string message(status.message());
  if (const auto error = GetModelError(status)) {
    const std::string prefix = fmt::format("{}: ", ModelErrorName(*error));
    if (message.starts_with(prefix)) message.erase(0, prefix.size());
    return MakeModelError(*error, where + message);
  }
  return absl::Status(status.code(), where + message);
}

}  // namespace

UnitLoader::UnitLoader(Backend* backend, std::shared_ptr<const ModelFile> model)
    : backend_(backend), model_(std::move(model)) {}

absl::StatusOr<std::unique_ptr<UnitWeights>> UnitLoader::Load(
    const Unit& unit, const std::atomic<bool>& cancelled, std::vector<std::byte>& buffer,
    const std::function<void(UnitState)>& on_state) {
  if (cancelled) return Cancelled();
  if (auto status = model_->CheckUnchanged(); !status.ok()) return status;
  const std::unique_ptr<UnitBuilder> builder = backend_->NewUnitBuilder(model_->params(), unit);
  for (const UnitTensor& entry : model_->UnitTensors(unit)) {
    const TensorInfo& tensor = *entry.tensor;
    on_state(UnitState::kReading);
    if (auto status = ReadTensor(tensor, cancelled, buffer); !status.ok()) return status;
    on_state(UnitState::kConverting);
    const std::span<const std::byte> raw(buffer.data(), tensor.bytes);
    if (auto status = builder->Add(entry.role, tensor, raw); !status.ok()) {
      return NameTensor(status, tensor);
    }
  }
  if (cancelled) return Cancelled();
  return builder->Finish();
}

absl::Status UnitLoader::ReadTensor(const TensorInfo& tensor, const std::atomic<bool>& cancelled,
                                    std::vector<std::byte>& buffer) {
  try {
    if (buffer.size() < tensor.bytes) buffer.resize(tensor.bytes);
  } catch (const std::bad_alloc&) {
    return NameTensor(absl::ResourceExhaustedError("no memory to read into"), tensor);
  }
  const RandomAccessFile& file = model_->file(tensor.file_index);
  for (uint64_t done = 0; done < tensor.bytes;) {
    if (cancelled) return Cancelled();
    const size_t chunk = std::min<uint64_t>(kReadChunkBytes, tensor.bytes - done);
    const std::span<std::byte> out(buffer.data() + done, chunk);
    if (auto status = ReadFully(file, tensor.offset + done, out); !status.ok()) {
      return NameTensor(status, tensor);
    }
    done += chunk;
    read_bytes_.fetch_add(chunk, std::memory_order_relaxed);
  }
  return CheckSameBytes(tensor, buffer);
}

absl::Status UnitLoader::CheckSameBytes(const TensorInfo& tensor,
                                        const std::vector<std::byte>& buffer) {
  const uint64_t hash = XXH3_64bits(buffer.data(), tensor.bytes);
  absl::MutexLock lock(&mu_);
  const auto [entry, first_load] = hashes_.try_emplace(&tensor, hash);
  if (first_load || entry->second == hash) return absl::OkStatus();
  return NameTensor(MakeModelError(ModelError::kChanged,
                                   "the bytes differ from those first read; restart the worker "
                                   "once the model file is whole again"),
                    tensor);
}

}  // namespace stagecoach
