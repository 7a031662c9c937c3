#include "kernels/cpu/cpu_weights.h"

#include <cstring>
#include <utility>

#include "kernels/tensor_check.h"
#include "model/dequantize.h"
#include "model/status_macros.h"

namespace stagecoach::cpu {

static_assert(kPartRows % kPanelRows == 0);

uint64_t PackedBytes(TensorRole role, const TensorInfo& tensor) {
  if (role == TensorRole::kTokenEmbedding) return tensor.bytes;
  const int columns = static_cast<int>(tensor.columns());
  if (IsVectorRole(role)) return columns * sizeof(float);
  const MatrixView view{.type = tensor.type, .rows = static_cast<int>(tensor.rows())};
  return view.panels() * PanelBytes(tensor.type, columns);
}

uint64_t CpuUnitWeights::bytes() const {
  uint64_t bytes = embedding_.bytes();
  for (const PackedMatrix& matrix : matrices_) bytes += matrix.bytes();
  for (const AlignedBuffer<float>& vector : vectors_) bytes += vector.bytes();
  return bytes;
}

absl::Status CpuUnitWeights::LookUp(std::span<const int32_t> token_ids, float* out) const {
  STAGECOACH_ASSIGN_OR_RETURN(const uint64_t row_bytes,
                              RowBytes(embedding_type_, embedding_columns_));
  for (const int32_t id : token_ids) {
    const std::span<const std::byte> row(embedding_.data() + id * row_bytes, row_bytes);
    STAGECOACH_RETURN_IF_ERROR(
        DequantizeRow(embedding_type_, row, std::span<float>(out, embedding_columns_)));
    out += embedding_columns_;
  }
  return absl::OkStatus();
}

absl::Status CpuUnitBuilder::AddPart(TensorRole role, const TensorInfo& tensor,
                                     const TensorPart& part) {
  STAGECOACH_RETURN_IF_ERROR(CheckTensorShape(role, tensor));
  STAGECOACH_RETURN_IF_ERROR(CheckTensorPart(tensor, part));
  const int index = static_cast<int>(role);
  const int rows = static_cast<int>(tensor.rows()), columns = static_cast<int>(tensor.columns());
  if (role == TensorRole::kTokenEmbedding) {
    AlignedBuffer<std::byte>& embedding = weights_->embedding_;
    const uint64_t row_bytes = part.raw.size() / PartRows(tensor, part);
    if (part.first_row == 0) {
      STAGECOACH_ASSIGN_OR_RETURN(embedding,
                                  AlignedBuffer<std::byte>::Create(tensor.rows() * row_bytes));
    }
    std::memcpy(embedding.data() + part.first_row * row_bytes, part.raw.data(), part.raw.size());
    weights_->embedding_type_ = tensor.type;
    weights_->embedding_columns_ = tensor.columns();
    return absl::OkStatus();
  }
  if (IsVectorRole(role)) {
    AlignedBuffer<float>& vector = weights_->vectors_[index];
    STAGECOACH_ASSIGN_OR_RETURN(vector, AlignedBuffer<float>::Create(columns));
    return DequantizeRow(tensor.type, part.raw, std::span<float>(vector.data(), columns));
  }
  PackedMatrix& matrix = weights_->matrices_[index];
  if (part.first_row == 0) {
    STAGECOACH_ASSIGN_OR_RETURN(matrix, PackedMatrix::Create(tensor.type, rows, columns));
  }
  matrix.PackRows(static_cast<int>(part.first_row), static_cast<int>(PartRows(tensor, part)),
                  part.raw);
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<UnitWeights>> CpuUnitBuilder::Finish() {
  return std::unique_ptr<UnitWeights>(std::move(weights_));
}

}  // namespace stagecoach::cpu
