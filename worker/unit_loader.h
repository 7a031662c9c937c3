// Brings one unit from the model file into the backend's layout.
#ifndef STAGECOACH_WORKER_UNIT_LOADER_H_
#define STAGECOACH_WORKER_UNIT_LOADER_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <unordered_map>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "kernels/backend.h"
#include "model/model_file.h"
#include "worker/host_tier.h"
#include "worker/layer_store.h"
#include "worker/tensor_reader.h"

namespace stagecoach {

struct LoadCounters {
  uint64_t read_bytes = 0;  // from the file
  double read_seconds = 0;  // reading the file, summed over threads
  double convert_seconds = 0;
  uint64_t host_read_bytes = 0;  // from the host tier
  double host_seconds = 0;
};

// Thread-safe: loads of different units may run at the same time.
class UnitLoader {
 public:
  // `backend` and `host` must outlive the loader. Without `host` all tensors come from the file.
  UnitLoader(Backend* backend, std::shared_ptr<const ModelFile> model, HostTier* host = nullptr);

  // Reads the tensors of `unit` one by one, the next one while the backend converts the last, from
  // the host tier if it has them. Holds two read buffers meanwhile, together as large as its two
  // largest tensors at most (UnitSize::buffer_bytes; direct reads round up to whole blocks).
  // on_state is told kReading and kConverting as they alternate. Errors: kChanged if the file is no
  // longer the one that was opened or a tensor's bytes differ from those of an earlier load;
  // kTruncated, kIo, kCorrupt (the model's manifest says otherwise), naming tensor and offset;
  // RESOURCE_EXHAUSTED; CANCELLED soon after `cancelled` became true, even if storage hangs.
  absl::StatusOr<std::unique_ptr<UnitWeights>> Load(const Unit& unit,
                                                    const std::atomic<bool>& cancelled,
                                                    const std::function<void(UnitState)>& on_state);

  LoadCounters counters() const;

  // Loads keep their read buffers for those that follow, until this is called.
  void FreeBuffers() { context_->buffers.FreeIdle(); }
  std::vector<OpenRead> OpenReads() const { return context_->open_reads.List(); }

 private:
  // At the first load of a tensor compares its hash with the manifest's and remembers it; at every
  // later one compares with that.
  absl::Status CheckBytes(const TensorInfo& tensor, std::span<const std::byte> raw);

  Backend* const backend_;

  const std::shared_ptr<ReadContext> context_;  // shared with reads under way

  std::atomic<int64_t> convert_ns_ = 0;

  absl::Mutex mu_;
  std::unordered_map<const TensorInfo*, uint64_t> hashes_ ABSL_GUARDED_BY(mu_);  // xxh3-64
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_UNIT_LOADER_H_
