// Moves weights from the host's memory to the GPU's, on the copy stream.
#ifndef STAGECOACH_KERNELS_CUDA_UPLOADER_H_
#define STAGECOACH_KERNELS_CUDA_UPLOADER_H_

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "kernels/cuda/cuda_device.h"
#include "model/gguf.h"

namespace stagecoach::cuda {

// Thread-safe: callers take turns at a ring of pinned pieces, each of which is filled by its caller
// while others are on their way. When a call returns, the host's bytes are no longer needed; the
// device has them once the copy stream gets there.
class Uploader {
 public:
  static absl::StatusOr<std::unique_ptr<Uploader>> Create(const CudaDevice& device);

  // raw -> `to`, [raw.size()] on the device.
  absl::Status Copy(std::span<const std::byte> raw, std::byte* to);
  // raw, the matrix `tensor` as in the file -> `packed` [PackedBytes], piece by piece.
  absl::Status Pack(const TensorInfo& tensor, std::span<const std::byte> raw, std::byte* packed);

  // Whether Pack can take the matrix: a piece must hold a few of its rows.
  static bool FitsPieces(const TensorInfo& tensor);

 private:
  struct Piece {
    PinnedBuffer<std::byte> host;
    DeviceBuffer<std::byte> device;
    Event done;  // the device has taken what was last put in
  };
  explicit Uploader(const CudaDevice& device) : device_(device) {}
  absl::StatusOr<Piece*> Take();
  void GiveBack(Piece* piece);
  // Sends `raw` on its way to `to`, or to the piece's own device memory if that is null.
  absl::Status Send(Piece& piece, std::span<const std::byte> raw, std::byte* to);

  const CudaDevice& device_;
  std::vector<Piece> pieces_;  // constant after Create; each used by who took it
  absl::Mutex mu_;
  std::vector<Piece*> free_ ABSL_GUARDED_BY(mu_);  // front: longest on its way
};

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_UPLOADER_H_
