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
#include "worker/layer_store.h"

namespace stagecoach {

// A load notices that it was cancelled after at most this many bytes.
inline constexpr size_t kReadChunkBytes = 8 << 20;

// Thread-safe: loads of different units may run at the same time.
class UnitLoader {
 public:
  // `backend` must outlive the loader.
  UnitLoader(Backend* backend, std::shared_ptr<const ModelFile> model);

  // Reads the tensors of `unit` one by one into `buffer` (grown as needed, for re-use by the next
  // call) and hands them to the backend. on_state is told kReading and kConverting as they
  // alternate. Errors: kChanged if the file is no longer the one that was opened or a tensor's
  // bytes differ from those of an earlier load; kTruncated, kIo, kCorrupt, naming tensor and
  // offset; RESOURCE_EXHAUSTED; CANCELLED soon after `cancelled` became true.
  absl::StatusOr<std::unique_ptr<UnitWeights>> Load(const Unit& unit,
                                                    const std::atomic<bool>& cancelled,
                                                    std::vector<std::byte>& buffer,
                                                    const std::function<void(UnitState)>& on_state);

  uint64_t read_bytes() const { return read_bytes_.load(std::memory_order_relaxed); }

 private:
  absl::Status ReadTensor(const TensorInfo& tensor, const std::atomic<bool>& cancelled,
                          std::vector<std::byte>& buffer);
  // Remembers the hash of the bytes at the first load, compares at every later one.
  absl::Status CheckSameBytes(const TensorInfo& tensor, const std::vector<std::byte>& buffer);

  Backend* const backend_;
  const std::shared_ptr<const ModelFile> model_;

  std::atomic<uint64_t> read_bytes_ = 0;

  absl::Mutex mu_;
  std::unordered_map<const TensorInfo*, uint64_t> hashes_ ABSL_GUARDED_BY(mu_);  // xxh3-64
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_UNIT_LOADER_H_
