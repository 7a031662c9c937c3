// What the NCCL channel calls of NCCL and of CUDA, apart from their headers, so that it can be
// built and tested where there is neither.
#ifndef STAGECOACH_WORKER_LINK_NCCL_NCCL_API_H_
#define STAGECOACH_WORKER_LINK_NCCL_NCCL_API_H_

#include <array>
#include <cstddef>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace stagecoach {

using NcclId = std::array<char, 128>;  // ncclUniqueId

// As ncclResult_t.
enum class NcclCode {
  kSuccess = 0,
  kUnhandledCudaError = 1,
  kSystemError = 2,
  kInternalError = 3,
  kInvalidArgument = 4,
  kInvalidUsage = 5,
  kRemoteError = 6,
  kInProgress = 7,
};

// Communicators of two ranks, non-blocking: what a call returns may be kInProgress, and nothing
// else but Abort may be called on the communicator until AsyncError has left that state. One thread
// at a time per communicator.
class NcclApi {
 public:
  using Comm = void*;
  virtual ~NcclApi() = default;
  virtual std::string version() const = 0;
  virtual NcclCode GetUniqueId(NcclId* id) = 0;
  // On the calling thread's device. *comm is set unless an error is returned.
  virtual NcclCode Init(Comm* comm, const NcclId& id, int rank) = 0;
  virtual NcclCode AsyncError(Comm comm, NcclCode* state) = 0;
  // To and from the other rank, in the order of `stream`. When the state is kSuccess again, the
  // operation is in the stream.
  virtual NcclCode Send(Comm comm, const float* data, size_t floats, void* stream) = 0;
  virtual NcclCode Receive(Comm comm, float* data, size_t floats, void* stream) = 0;
  virtual NcclCode Abort(Comm comm) = 0;  // in any state; the communicator is gone then
  virtual std::string LastError() = 0;    // in words
};

// Streams, events and memory of a GPU. All calls but Use concern the thread's device.
class DeviceApi {
 public:
  virtual ~DeviceApi() = default;
  virtual absl::Status Use(int device) = 0;  // the calling thread's device from now on
  virtual absl::StatusOr<void*> NewStream() = 0;
  virtual absl::StatusOr<void*> NewEvent() = 0;
  virtual absl::StatusOr<float*> NewBuffer(size_t floats) = 0;
  virtual void FreeStream(void* stream) = 0;
  virtual void FreeEvent(void* event) = 0;
  virtual void FreeBuffer(float* data) = 0;
  virtual absl::Status Copy(float* to, const float* from, size_t floats, void* stream) = 0;
  virtual absl::Status Record(void* event, void* stream) = 0;
  // What is put into the stream from now on waits for the event.
  virtual absl::Status Await(void* stream, void* event) = 0;
  virtual absl::StatusOr<bool> Reached(void* event) = 0;
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_LINK_NCCL_NCCL_API_H_
