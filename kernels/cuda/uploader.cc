#include "kernels/cuda/uploader.h"

#include <algorithm>
#include <cstring>

#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/quant_matmul.h"
#include "model/status_macros.h"

namespace stagecoach::cuda {
namespace {

constexpr size_t kPieceBytes = size_t{8} << 20;
constexpr int kPieces = 6;
// Packed matrices are made of panels of so many rows, one behind the other, so whole panels can be
// packed by themselves.
constexpr uint64_t kPanelRows = 16;

uint64_t RowBytesOf(const TensorInfo& tensor) {
  const TensorTypeInfo& type = GetTensorTypeInfo(tensor.type);
  return tensor.columns() / type.block_elements * type.block_bytes;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Uploader>> Uploader::Create(const CudaDevice& device) {
  std::unique_ptr<Uploader> uploader(new Uploader(device));
  uploader->pieces_.resize(kPieces);
  absl::MutexLock lock(&uploader->mu_);
  for (Piece& piece : uploader->pieces_) {
    STAGECOACH_ASSIGN_OR_RETURN(piece.host, device.NewPinnedBuffer<std::byte>(kPieceBytes));
    STAGECOACH_ASSIGN_OR_RETURN(piece.device,
                                device.NewBuffer<std::byte>(kPieceBytes, device.copy()));
    STAGECOACH_ASSIGN_OR_RETURN(piece.done, device.NewEvent());
    uploader->free_.push_back(&piece);
  }
  return uploader;
}

bool Uploader::FitsPieces(const TensorInfo& tensor) {
  return RowBytesOf(tensor) <= kPieceBytes / kPanelRows;
}

absl::StatusOr<Uploader::Piece*> Uploader::Take() {
  Piece* piece = nullptr;
  {
    absl::MutexLock lock(&mu_);
    mu_.Await(absl::Condition(
        +[](std::vector<Piece*>* free) { return !free->empty(); }, &free_));
    piece = free_.front();
    free_.erase(free_.begin());
  }
  if (const cudaError_t error = cudaEventSynchronize(piece->done.get()); error != cudaSuccess) {
    GiveBack(piece);
    return CudaStatus(error, "cudaEventSynchronize", __FILE__, __LINE__);
  }
  return piece;
}

void Uploader::GiveBack(Piece* piece) {
  absl::MutexLock lock(&mu_);
  free_.push_back(piece);
}

absl::Status Uploader::Send(Piece& piece, std::span<const std::byte> raw, std::byte* to) {
  std::memcpy(piece.host.data(), raw.data(), raw.size());
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(to == nullptr ? piece.device.data() : to,
                                                  piece.host.data(), raw.size(),
                                                  cudaMemcpyHostToDevice, device_.copy()));
  return absl::OkStatus();
}

absl::Status Uploader::Copy(std::span<const std::byte> raw, std::byte* to) {
  for (size_t done = 0; done < raw.size(); done += kPieceBytes) {
    STAGECOACH_ASSIGN_OR_RETURN(Piece* const piece, Take());
    const auto part = raw.subspan(done, std::min(kPieceBytes, raw.size() - done));
    const absl::Status sent = Send(*piece, part, to + done);
    const cudaError_t recorded = cudaEventRecord(piece->done.get(), device_.copy());
    GiveBack(piece);
    STAGECOACH_RETURN_IF_ERROR(sent);
    STAGECOACH_RETURN_IF_CUDA_ERROR(recorded);
  }
  return absl::OkStatus();
}

absl::Status Uploader::Pack(const TensorInfo& tensor, std::span<const std::byte> raw,
                            std::byte* packed) {
  const int k = static_cast<int>(tensor.columns());
  const uint64_t row_bytes = RowBytesOf(tensor), rows = tensor.rows();
  const uint64_t piece_rows = kPieceBytes / row_bytes / kPanelRows * kPanelRows;
  for (uint64_t row = 0; row < rows; row += piece_rows) {
    const int count = static_cast<int>(std::min(piece_rows, rows - row));
    STAGECOACH_ASSIGN_OR_RETURN(Piece* const piece, Take());
    const absl::Status sent =
        Send(*piece, raw.subspan(row * row_bytes, count * row_bytes), nullptr);
    const cudaError_t repacked =
        sent.ok() ? LaunchRepack(tensor.type, count, k, piece->device.data(),
                                 packed + PackedBytes(tensor.type, static_cast<int>(row), k),
                                 device_.copy())
                  : cudaSuccess;
    const cudaError_t recorded = cudaEventRecord(piece->done.get(), device_.copy());
    GiveBack(piece);
    STAGECOACH_RETURN_IF_ERROR(sent);
    STAGECOACH_RETURN_IF_CUDA_ERROR(repacked);
    STAGECOACH_RETURN_IF_CUDA_ERROR(recorded);
  }
  return absl::OkStatus();
}

}  // namespace stagecoach::cuda
