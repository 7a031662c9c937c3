// Brings one unit from the model file into the backend's layout.
#ifndef STAGECOACH_WORKER_UNIT_LOADER_H_
#define STAGECOACH_WORKER_UNIT_LOADER_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <unordered_map>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "kernels/backend.h"
#include "model/model_file.h"
#include "worker/host_buffers.h"
#include "worker/host_tier.h"
#include "worker/layer_store.h"
#include "worker/tensor_reader.h"
#include "worker/unit_parts.h"

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
  // `backend`, `allocator` and `host` must outlive the loader. Without `host` all tensors come from
  // the file.
  UnitLoader(Backend* backend, std::shared_ptr<const ModelFile> model, HostAllocator* allocator,
             const LoadOptions& options = {}, HostTier* host = nullptr);

  // Gets the buffers of so many loads at once now, if buffers are kept (of backends with
  // own_memory): loads then keep to these.
  void Prepare(int loads);

  // Reads the parts of `unit`, the next ones while the backend converts the last, from the host
  // tier if it has them; what the tier holds uncompressed is given to the backend as it lies there.
  // The buffers take UnitSize::buffer_bytes at most (direct reads round up to whole blocks).
  // What was read from the file is hashed and checked, what the tier holds was so before. on_state
  // is told kReading and kConverting as they alternate. Errors: kChanged if the file is no
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
  // Of the tensor that is being loaded.
  struct TensorHashes;
  // At the first load of a tensor compares its hash with the manifest's, if there is one, and
  // remembers those of its parts; at every later one compares with these.
  absl::Status CheckBytes(const ReadPart& read, TensorHashes& hashes);

  Backend* const backend_;

  const std::shared_ptr<ReadContext> context_;  // shared with reads under way

  std::atomic<int64_t> convert_ns_ = 0;

  absl::Mutex mu_;
  // Of the parts of tensors once read in full: xxh3-64.
  std::unordered_map<const TensorInfo*, std::vector<uint64_t>> hashes_ ABSL_GUARDED_BY(mu_);
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_UNIT_LOADER_H_
