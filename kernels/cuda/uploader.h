// Moves weights from the host's memory to the GPU's: copies on the copy stream, and behind each of
// them its repacking on the pack stream, while the next one is copied.
#ifndef STAGECOACH_KERNELS_CUDA_UPLOADER_H_
#define STAGECOACH_KERNELS_CUDA_UPLOADER_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "kernels/backend.h"
#include "kernels/cuda/cuda_device.h"
#include "model/gguf.h"

namespace stagecoach::cuda {

// Thread-safe: callers take turns at a ring of pieces of the GPU's memory, which wait there to be
// repacked. Bytes in pinned memory go there straight, others by way of pinned staging that their
// caller fills. The GPU has the weights where they belong once the pack stream gets there.
class Uploader {
 public:
  static absl::StatusOr<std::unique_ptr<Uploader>> Create(const CudaDevice& device);

  // raw -> `to`, [raw.size()] on the device, allocated on the pack stream. `pinned`: raw lies in
  // pinned memory, and must stay there as it is until the copy stream gets to its present end;
  // otherwise it is not needed after the call.
  absl::Status Copy(std::span<const std::byte> raw, bool pinned, std::byte* to);
  // raw, rows [first_row, ...) of the matrix `tensor` as in the file, from a multiple of kPartRows
  // on -> their place in `packed` [PackedBytes]. As above otherwise.
  absl::Status Pack(const TensorInfo& tensor, uint64_t first_row, std::span<const std::byte> raw,
                    bool pinned, std::byte* packed);

  // Whether Pack can take the matrix: a piece must hold a few of its rows.
  static bool FitsPieces(const TensorInfo& tensor);

  // On the GPU, held since Create.
  uint64_t device_bytes() const;
  // Of the copies that are over.
  UploadStats stats();
  // Bytes per second of copies from pinned memory that nothing else is done with: measured now.
  absl::StatusOr<double> MeasureCopyRate();

 private:
  struct Piece {
    DeviceBuffer<std::byte> memory;
    Event begun, arrived;     // its latest copy, with timing
    Event done;               // it may be written again
    size_t copied_bytes = 0;  // by the latest copy, until it has been counted
  };
  struct Staging {
    PinnedBuffer<std::byte> memory;
    Event done;  // it may be written again
  };
  // Who takes an element waits for its event, outside of the mutex.
  template <typename T>
  struct Ring {
    std::vector<T> elements;
    std::vector<T*> free;  // front: longest on its way
  };

  // What is to be done on the pack stream with `bytes` of the piece.
  using Unpack = std::function<cudaError_t(const std::byte* piece, size_t begin, size_t bytes)>;

  explicit Uploader(const CudaDevice& device) : device_(device) {}
  template <typename T>
  absl::StatusOr<T*> Take(Ring<T>& ring);
  template <typename T>
  void GiveBack(Ring<T>& ring, T* element);
  // raw in steps of `step` bytes.
  absl::Status Send(std::span<const std::byte> raw, bool pinned, size_t step, const Unpack& unpack);
  absl::Status SendPiece(std::span<const std::byte> raw, bool pinned, size_t begin,
                         const Unpack& unpack, Piece& piece);
  absl::Status CopyToPiece(std::span<const std::byte> raw, Piece& piece);
  absl::Status CopyByStaging(std::span<const std::byte> raw, Piece& piece);
  void Count(Piece& piece) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const CudaDevice& device_;
  absl::Mutex copy_mu_;  // orders launches on the copy stream
  absl::Mutex mu_;       // guards what is free; elements are used by who took them
  Ring<Piece> pieces_;
  Ring<Staging> staging_;
  UploadStats stats_ ABSL_GUARDED_BY(mu_);
};

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_UPLOADER_H_
