// Reads the tensors of one unit ahead of their conversion, on a thread of its own.
#ifndef STAGECOACH_WORKER_TENSOR_READER_H_
#define STAGECOACH_WORKER_TENSOR_READER_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "model/model_file.h"
#include "worker/host_tier.h"
#include "worker/read_buffer.h"

namespace stagecoach {

// A reader that is stopped takes notice after at most this many bytes.
inline constexpr size_t kReadChunkBytes = 8 << 20;

// What the reads of all loads share.
struct ReadContext {
  std::shared_ptr<const ModelFile> model;
  HostTier* host = nullptr;  // not used by a reader that was stopped
  ReadBufferPool buffers;
  std::atomic<uint64_t> read_bytes = 0;  // from the file
  std::atomic<int64_t> read_ns = 0;      // spent with that, summed over threads
  std::atomic<uint64_t> host_bytes = 0;  // from the host tier
  std::atomic<int64_t> host_ns = 0;
};

// The error, saying which tensor it struck.
absl::Status NameTensor(const absl::Status& status, const TensorInfo& tensor);

// One thread calls. While it uses one tensor, the next one is read: two buffers at most.
class TensorReader {
 public:
  // `tensors` must belong to context->model. Without a thread to be had, Next reads by itself.
  TensorReader(std::shared_ptr<ReadContext> context, std::vector<const TensorInfo*> tensors);
  // Stops reading. A read that storage holds up is left to end by itself; what it needs stays
  // alive until then.
  ~TensorReader();

  // The bytes of the next tensor, valid until the next call. Call at most once per tensor, and not
  // after an error. Errors: kTruncated, kIo, naming tensor and offset; RESOURCE_EXHAUSTED;
  // CANCELLED soon after `cancelled` became true, even while storage answers nothing.
  absl::StatusOr<std::span<const std::byte>> Next(const std::atomic<bool>& cancelled);

 private:
  class State;
  const std::shared_ptr<State> state_;
  std::thread thread_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_TENSOR_READER_H_
