#include "worker/unit_loader.h"

#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "model/manifest.h"
#include "model/model_error.h"

namespace stagecoach {

UnitLoader::UnitLoader(Backend* backend, std::shared_ptr<const ModelFile> model, HostTier* host)
    : backend_(backend), context_(std::make_shared<ReadContext>()) {
  context_->model = std::move(model);
  context_->host = host;
}

absl::StatusOr<std::unique_ptr<UnitWeights>> UnitLoader::Load(
    const Unit& unit, const std::atomic<bool>& cancelled,
    const std::function<void(UnitState)>& on_state) {
  if (cancelled) return absl::CancelledError("load cancelled");
  const ModelFile& model = *context_->model;
  if (auto status = model.CheckUnchanged(); !status.ok()) return status;
  const std::unique_ptr<UnitBuilder> builder = backend_->NewUnitBuilder(model.params(), unit);
  std::vector<const TensorInfo*> tensors;
  for (const UnitTensor& entry : model.UnitTensors(unit)) tensors.push_back(entry.tensor);
  TensorReader reader(context_, std::move(tensors));
  for (const UnitTensor& entry : model.UnitTensors(unit)) {
    const TensorInfo& tensor = *entry.tensor;
    on_state(UnitState::kReading);
    const absl::StatusOr<std::span<const std::byte>> raw = reader.Next(cancelled);
    if (!raw.ok()) return raw.status();
    on_state(UnitState::kConverting);
    if (auto status = CheckBytes(tensor, *raw); !status.ok()) return NameTensor(status, tensor);
    if (context_->host != nullptr) context_->host->Put(tensor, *raw);
    const absl::Time start = absl::Now();
    const absl::Status added = builder->Add(entry.role, tensor, *raw);
    convert_ns_ += absl::ToInt64Nanoseconds(absl::Now() - start);
    if (!added.ok()) return NameTensor(added, tensor);
  }
  if (cancelled) return absl::CancelledError("load cancelled");
  return builder->Finish();
}

LoadCounters UnitLoader::counters() const {
  return {
      .read_bytes = context_->read_bytes,
      .read_seconds = 1e-9 * static_cast<double>(context_->read_ns),
      .convert_seconds = 1e-9 * static_cast<double>(convert_ns_),
      .host_read_bytes = context_->host_bytes,
      .host_seconds = 1e-9 * static_cast<double>(context_->host_ns),
  };
}

absl::Status UnitLoader::CheckBytes(const TensorInfo& tensor, std::span<const std::byte> raw) {
  const uint64_t hash = HashTensorBytes(raw);
  {
    absl::MutexLock lock(&mu_);
    const auto known = hashes_.find(&tensor);
    if (known != hashes_.end()) {
      if (known->second == hash) return absl::OkStatus();
      return MakeModelError(ModelError::kChanged,
                            "the bytes differ from those first read; restart the worker once the "
                            "model file is whole again");
    }
  }
  if (const Manifest* manifest = context_->model->manifest()) {
    if (auto status = manifest->CheckTensor(tensor, hash); !status.ok()) return status;
  }
  absl::MutexLock lock(&mu_);
  hashes_.emplace(&tensor, hash);
  return absl::OkStatus();
}

}  // namespace stagecoach
