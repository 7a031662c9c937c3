#include "kernels/cuda/uploader.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/quant_matmul.h"
#include "model/status_macros.h"

namespace stagecoach::cuda {
namespace {

// Of a copy: large, lest the gaps between copies count; as many as keep the copies going while
// callers sleep and repacking waits for a place.
constexpr size_t kPieceBytes = size_t{32} << 20;
constexpr int kPieces = 6;
constexpr size_t kStagingBytes = size_t{8} << 20;
constexpr int kStagings = 4;
// Packed matrices are made of panels of so many rows, one behind the other, so whole panels can be
// packed by themselves.
constexpr uint64_t kPanelRows = 16;
static_assert(kPartRows % kPanelRows == 0);
constexpr int kMeasuredCopies = 32;

uint64_t RowBytesOf(const TensorInfo& tensor) {
  const TensorTypeInfo& type = GetTensorTypeInfo(tensor.type);
  return tensor.columns() / type.block_elements * type.block_bytes;
}

size_t StepBytes(bool pinned) { return pinned ? kPieceBytes : kStagingBytes; }

}  // namespace

absl::StatusOr<std::unique_ptr<Uploader>> Uploader::Create(const CudaDevice& device) {
  std::unique_ptr<Uploader> uploader(new Uploader(device));
  uploader->pieces_.elements.resize(kPieces);
  uploader->staging_.elements.resize(kStagings);
  for (Piece& piece : uploader->pieces_.elements) {
    STAGECOACH_ASSIGN_OR_RETURN(piece.memory,
                                device.NewBuffer<std::byte>(kPieceBytes, device.copy()));
    STAGECOACH_ASSIGN_OR_RETURN(piece.begun, device.NewTimedEvent());
    STAGECOACH_ASSIGN_OR_RETURN(piece.arrived, device.NewTimedEvent());
    STAGECOACH_ASSIGN_OR_RETURN(piece.done, device.NewEvent());
    uploader->pieces_.free.push_back(&piece);
  }
  for (Staging& staging : uploader->staging_.elements) {
    STAGECOACH_ASSIGN_OR_RETURN(staging.memory, device.NewPinnedBuffer<std::byte>(kStagingBytes));
    STAGECOACH_ASSIGN_OR_RETURN(staging.done, device.NewEvent());
    uploader->staging_.free.push_back(&staging);
  }
  return uploader;
}

bool Uploader::FitsPieces(const TensorInfo& tensor) {
  return RowBytesOf(tensor) <= kStagingBytes / kPanelRows;
}

uint64_t Uploader::device_bytes() const { return kPieces * kPieceBytes; }

template <typename T>
absl::StatusOr<T*> Uploader::Take(Ring<T>& ring) {
  T* element = nullptr;
  {
    const auto has_free = [&ring] { return !ring.free.empty(); };
    absl::MutexLock lock(&mu_);
    mu_.Await(absl::Condition(&has_free));
    element = ring.free.front();
    ring.free.erase(ring.free.begin());
  }
  if (const cudaError_t error = cudaEventSynchronize(element->done.get()); error != cudaSuccess) {
    GiveBack(ring, element);
    return CudaStatus(error, "cudaEventSynchronize", __FILE__, __LINE__);
  }
  return element;
}

template <typename T>
void Uploader::GiveBack(Ring<T>& ring, T* element) {
  absl::MutexLock lock(&mu_);
  ring.free.push_back(element);
}

void Uploader::Count(Piece& piece) {
  float ms = 0;
  if (piece.copied_bytes == 0 ||
      cudaEventElapsedTime(&ms, piece.begun.get(), piece.arrived.get()) != cudaSuccess) {
    return;
  }
  stats_.bytes += std::exchange(piece.copied_bytes, 0);
  stats_.busy_seconds += 1e-3 * ms;
}

UploadStats Uploader::stats() {
  absl::MutexLock lock(&mu_);
  for (Piece* const piece : pieces_.free) {
    if (cudaEventQuery(piece->arrived.get()) == cudaSuccess) Count(*piece);
  }
  cudaGetLastError();  // "not ready" is no error, but it is remembered like one
  return stats_;
}

absl::Status Uploader::CopyToPiece(std::span<const std::byte> raw, Piece& piece) {
  absl::MutexLock lock(&copy_mu_);  // no other copy between the events
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaEventRecord(piece.begun.get(), device_.copy()));
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(piece.memory.data(), raw.data(), raw.size(),
                                                  cudaMemcpyHostToDevice, device_.copy()));
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaEventRecord(piece.arrived.get(), device_.copy()));
  return absl::OkStatus();
}

absl::Status Uploader::CopyByStaging(std::span<const std::byte> raw, Piece& piece) {
  STAGECOACH_ASSIGN_OR_RETURN(Staging* const staging, Take(staging_));
  std::memcpy(staging->memory.data(), raw.data(), raw.size());
  const absl::Status copied = CopyToPiece({staging->memory.data(), raw.size()}, piece);
  const cudaError_t recorded = cudaEventRecord(staging->done.get(), device_.copy());
  GiveBack(staging_, staging);
  STAGECOACH_RETURN_IF_ERROR(copied);
  STAGECOACH_RETURN_IF_CUDA_ERROR(recorded);
  return absl::OkStatus();
}

absl::Status Uploader::SendPiece(std::span<const std::byte> raw, bool pinned, size_t begin,
                                 const Unpack& unpack, Piece& piece) {
  STAGECOACH_RETURN_IF_ERROR(pinned ? CopyToPiece(raw, piece) : CopyByStaging(raw, piece));
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaStreamWaitEvent(device_.pack(), piece.arrived.get()));
  STAGECOACH_RETURN_IF_CUDA_ERROR(unpack(piece.memory.data(), begin, raw.size()));
  piece.copied_bytes = raw.size();
  return absl::OkStatus();
}

absl::Status Uploader::Send(std::span<const std::byte> raw, bool pinned, size_t step,
                            const Unpack& unpack) {
  for (size_t begin = 0; begin < raw.size(); begin += step) {
    STAGECOACH_ASSIGN_OR_RETURN(Piece* const piece, Take(pieces_));
    {
      absl::MutexLock lock(&mu_);
      Count(*piece);
    }
    const absl::Status sent = SendPiece(raw.subspan(begin, std::min(step, raw.size() - begin)),
                                        pinned, begin, unpack, *piece);
    const cudaError_t recorded = cudaEventRecord(piece->done.get(), device_.pack());
    GiveBack(pieces_, piece);
    STAGECOACH_RETURN_IF_ERROR(sent);
    STAGECOACH_RETURN_IF_CUDA_ERROR(recorded);
  }
  return absl::OkStatus();
}

absl::Status Uploader::Copy(std::span<const std::byte> raw, bool pinned, std::byte* to) {
  const auto unpack = [&](const std::byte* piece, size_t begin, size_t bytes) {
    return cudaMemcpyAsync(to + begin, piece, bytes, cudaMemcpyDeviceToDevice, device_.pack());
  };
  return Send(raw, pinned, StepBytes(pinned), unpack);
}

absl::Status Uploader::Pack(const TensorInfo& tensor, uint64_t first_row,
                            std::span<const std::byte> raw, bool pinned, std::byte* packed) {
  const int k = static_cast<int>(tensor.columns());
  const uint64_t row_bytes = RowBytesOf(tensor);
  const uint64_t piece_rows = StepBytes(pinned) / row_bytes / kPanelRows * kPanelRows;
  const auto unpack = [&](const std::byte* piece, size_t begin, size_t bytes) {
    const int row = static_cast<int>(first_row + begin / row_bytes);
    return LaunchRepack(tensor.type, static_cast<int>(bytes / row_bytes), k, piece,
                        packed + PackedBytes(tensor.type, row, k), device_.pack());
  };
  return Send(raw, pinned, piece_rows * row_bytes, unpack);
}

absl::StatusOr<double> Uploader::MeasureCopyRate() {
  STAGECOACH_ASSIGN_OR_RETURN(const PinnedBuffer<std::byte> host,
                              device_.NewPinnedBuffer<std::byte>(kPieceBytes));
  STAGECOACH_ASSIGN_OR_RETURN(const Event begun, device_.NewTimedEvent());
  STAGECOACH_ASSIGN_OR_RETURN(const Event ended, device_.NewTimedEvent());
  STAGECOACH_ASSIGN_OR_RETURN(const DeviceBuffer<std::byte> memory,
                              device_.NewBuffer<std::byte>(kPieceBytes, device_.copy()));
  std::memset(host.data(), 1, kPieceBytes);
  const auto copy = [&] {
    return cudaMemcpyAsync(memory.data(), host.data(), kPieceBytes, cudaMemcpyHostToDevice,
                           device_.copy());
  };
  STAGECOACH_RETURN_IF_CUDA_ERROR(copy());
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaEventRecord(begun.get(), device_.copy()));
  for (int i = 0; i < kMeasuredCopies; ++i) STAGECOACH_RETURN_IF_CUDA_ERROR(copy());
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaEventRecord(ended.get(), device_.copy()));
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaEventSynchronize(ended.get()));
  float ms = 0;
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaEventElapsedTime(&ms, begun.get(), ended.get()));
  return kMeasuredCopies * kPieceBytes / (1e-3 * ms);
}

}  // namespace stagecoach::cuda
