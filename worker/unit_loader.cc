#include "worker/unit_loader.h"

#include <memory>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "model/manifest.h"
#include "model/model_error.h"
#include "model/status_macros.h"
#include "xxhash.h"

namespace stagecoach {

// Those of the parts so far, and of all bytes so far where the manifest wants it.
struct UnitLoader::TensorHashes {
  std::vector<uint64_t> parts;
  std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> all{nullptr, &XXH3_freeState};
};

UnitLoader::UnitLoader(Backend* backend, std::shared_ptr<const ModelFile> model,
                       HostAllocator* allocator, const LoadOptions& options, HostTier* host)
    : backend_(backend),
      context_(std::make_shared<ReadContext>(backend, std::move(model), host, allocator, options)) {
}

void UnitLoader::Prepare(int loads) {
  if (!context_->one_size) return;
  for (int i = 0; i < loads * context_->slots; ++i) {
    context_->buffers.Give(
        context_->allocator->New(context_->options.part_bytes + 2 * kDirectAlignment));
  }
}

absl::StatusOr<std::unique_ptr<UnitWeights>> UnitLoader::Load(
    const Unit& unit, const std::atomic<bool>& cancelled,
    const std::function<void(UnitState)>& on_state) {
  if (cancelled) return absl::CancelledError("load cancelled");
  const ModelFile& model = *context_->model;
  STAGECOACH_RETURN_IF_ERROR(model.CheckUnchanged());
  TensorReader reader(context_, model.UnitTensors(unit));
  const std::unique_ptr<UnitBuilder> builder = backend_->NewUnitBuilder(model.params(), unit);
  TensorHashes hashes;
  HostTierWriter to_host;
  while (reader.HasNext()) {
    on_state(UnitState::kReading);
    STAGECOACH_ASSIGN_OR_RETURN(const ReadPart read, reader.Next(cancelled));
    on_state(UnitState::kConverting);
    const TensorInfo& tensor = *read.what.tensor;
    if (read.from_file) {
      if (auto status = CheckBytes(read, hashes); !status.ok()) return NameTensor(status, tensor);
      if (context_->host != nullptr) {
        if (read.what.index == 0) to_host = context_->host->Write(tensor);
        to_host.Append(read.part.raw);
        if (read.what.last) to_host.Finish();
      }
    }
    const absl::Time start = absl::Now();
    const absl::Status added = builder->AddPart(read.what.role, tensor, read.part);
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

absl::Status UnitLoader::CheckBytes(const ReadPart& read, TensorHashes& hashes) {
  const TensorInfo& tensor = *read.what.tensor;
  if (read.what.index == 0) hashes = {};
  hashes.parts.push_back(read.hash);
  bool known = false;
  {
    absl::MutexLock lock(&mu_);
    const auto it = hashes_.find(&tensor);
    known = it != hashes_.end();
    if (known && it->second[read.what.index] != read.hash) {
      return MakeModelError(ModelError::kChanged,
                            "the bytes differ from those first read; restart the worker once the "
                            "model file is whole again");
    }
  }
  STAGECOACH_RETURN_IF_ERROR(read.scales);
  if (known) return absl::OkStatus();
  if (const Manifest* manifest = context_->model->manifest()) {
    if (read.what.index == 0) {
      hashes.all.reset(XXH3_createState());
      if (hashes.all == nullptr) return absl::ResourceExhaustedError("no memory for a hash");
      XXH3_64bits_reset(hashes.all.get());
    }
    XXH3_64bits_update(hashes.all.get(), read.part.raw.data(), read.part.raw.size());
    if (read.what.last) {
      STAGECOACH_RETURN_IF_ERROR(
          manifest->CheckTensor(tensor, XXH3_64bits_digest(hashes.all.get())));
    }
  }
  if (!read.what.last) return absl::OkStatus();
  absl::MutexLock lock(&mu_);
  hashes_.emplace(&tensor, std::move(hashes.parts));
  return absl::OkStatus();
}

}  // namespace stagecoach
