#include "kernels/cuda/cuda_weights.h"

#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/weight_bounds.h"
#include "kernels/tensor_check.h"
#include "model/dequantize.h"
#include "model/status_macros.h"

namespace stagecoach::cuda {

uint64_t DeviceBytes(TensorRole role, const TensorInfo& tensor) {
  if (role == TensorRole::kTokenEmbedding) {
    const TensorTypeInfo& type = GetTensorTypeInfo(tensor.type);
    return tensor.rows() * (tensor.columns() / type.block_elements) * type.block_bytes;
  }
  if (IsVectorRole(role)) return tensor.columns() * sizeof(float);
  return PackedBytes(tensor.type, static_cast<int>(tensor.rows()),
                     static_cast<int>(tensor.columns()));
}

UnitStorage::~UnitStorage() {
  if (!device_.MakeCurrent().ok()) return;
  if (ready_.get() == nullptr)
    return;  // abandoned: never used, and freed in the pack stream's order
  if (in_graph_ || !noted_use_) {
    cudaEventRecord(used_.get(), device_.compute());
  }
  cudaEventSynchronize(used_.get());
}

void UnitStorage::NoteUse() const {
  if (cudaEventRecord(used_.get(), device_.compute()) == cudaSuccess) noted_use_ = true;
}

absl::Status UnitStorage::AwaitUpload() const {
  if (Uploaded()) return absl::OkStatus();
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaStreamWaitEvent(device_.compute(), ready_.get()));
  return absl::OkStatus();
}

bool UnitStorage::Uploaded() const {
  if (uploaded_) return true;
  if (cudaEventQuery(ready_.get()) == cudaSuccess) {
    uploaded_ = true;
  } else {
    cudaGetLastError();  // "not ready" is no error, but it is remembered like one
  }
  return uploaded_;
}

CudaUnitBuilder::~CudaUnitBuilder() { LetGo(0).IgnoreError(); }

absl::Status CudaUnitBuilder::AddPart(TensorRole role, const TensorInfo& tensor,
                                      const TensorPart& part) {
  STAGECOACH_RETURN_IF_ERROR(CheckTensorShape(role, tensor));
  STAGECOACH_RETURN_IF_ERROR(CheckTensorPart(tensor, part, BoundsOfTiles(tensor.type)));
  STAGECOACH_RETURN_IF_ERROR(device_.MakeCurrent());
  if (part.first_row == 0) STAGECOACH_RETURN_IF_ERROR(Allocate(role, tensor));
  const bool pinned = part.memory != nullptr && part.memory->direct() && !IsVectorRole(role);
  const absl::Status uploaded = Upload(role, tensor, part, pinned);
  // Some of it may be on its way in any case.
  if (pinned) STAGECOACH_RETURN_IF_ERROR(Hold(part));
  STAGECOACH_RETURN_IF_ERROR(uploaded);
  return LetGo(kHeldParts);
}

// On the pack stream, and freed there: no other stream writes it, and ~UnitStorage waits for those
// that read it.
absl::Status CudaUnitBuilder::Allocate(TensorRole role, const TensorInfo& tensor) {
  const uint64_t bytes = DeviceBytes(role, tensor);
  STAGECOACH_ASSIGN_OR_RETURN(
      DeviceBuffer<std::byte> memory,
      device_.NewBuffer<std::byte>(bytes, device_.pack(), /*free_on=*/device_.pack()));
  std::byte* const data = memory.data();
  storage_->memory_.push_back(std::move(memory));
  storage_->bytes_ += bytes;
  if (IsVectorRole(role)) {
    storage_->vectors_[static_cast<int>(role)] = reinterpret_cast<const float*>(data);
  } else {
    storage_->matrices_[static_cast<int>(role)] = {.type = tensor.type,
                                                   .n = static_cast<int>(tensor.rows()),
                                                   .k = static_cast<int>(tensor.columns()),
                                                   .data = data};
  }
  return absl::OkStatus();
}

// The memory allocated last is the tensor's.
absl::Status CudaUnitBuilder::Upload(TensorRole role, const TensorInfo& tensor,
                                     const TensorPart& part, bool pinned) {
  std::byte* const to = storage_->memory_.back().data();
  if (role == TensorRole::kTokenEmbedding) {
    const uint64_t row_bytes = part.raw.size() / PartRows(tensor, part);
    return uploader_.Copy(part.raw, pinned, to + part.first_row * row_bytes);
  }
  if (!IsVectorRole(role)) return uploader_.Pack(tensor, part.first_row, part.raw, pinned, to);
  std::vector<float> values(tensor.columns());
  STAGECOACH_RETURN_IF_ERROR(DequantizeRow(tensor.type, part.raw, values));
  return uploader_.Copy(std::as_bytes(std::span(values)), /*pinned=*/false, to);
}

absl::Status CudaUnitBuilder::Hold(const TensorPart& part) {
  Held& held = held_.emplace_back(Held{.memory = part.memory});
  STAGECOACH_ASSIGN_OR_RETURN(held.copied, device_.NewEvent());
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaEventRecord(held.copied.get(), device_.copy()));
  return absl::OkStatus();
}

absl::Status CudaUnitBuilder::LetGo(size_t rest) {
  for (; held_.size() > rest; held_.pop_front()) {
    const cudaEvent_t copied = held_.front().copied.get();
    // Without an event there is an error already: wait for everything.
    const cudaError_t error =
        copied != nullptr ? cudaEventSynchronize(copied) : cudaStreamSynchronize(device_.copy());
    STAGECOACH_RETURN_IF_CUDA_ERROR(error);
  }
  return absl::OkStatus();
}

absl::Status CudaUnitBuilder::PairRows() {
  const auto matrix = [&](TensorRole role) -> PackedMatrix& {
    return storage_->matrices_[static_cast<int>(role)];
  };
  PackedMatrix &gate = matrix(TensorRole::kFfnGate), &up = matrix(TensorRole::kFfnUp);
  const PackedMatrix& down = matrix(TensorRole::kFfnDown);
  if (gate.data == nullptr || up.data == nullptr || !CanPairRows(gate, up) ||
      FormFor(down.type) != ActivationForm::kHalf) {
    return absl::OkStatus();
  }
  STAGECOACH_RETURN_IF_CUDA_ERROR(LaunchPairRows(gate.type, gate.n, gate.k,
                                                 const_cast<void*>(gate.data),
                                                 const_cast<void*>(up.data), device_.pack()));
  gate.paired = up.paired = true;
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<UnitWeights>> CudaUnitBuilder::Finish() {
  STAGECOACH_RETURN_IF_ERROR(device_.MakeCurrent());
  STAGECOACH_RETURN_IF_ERROR(PairRows());
  STAGECOACH_ASSIGN_OR_RETURN(storage_->used_, device_.NewEvent());
  STAGECOACH_ASSIGN_OR_RETURN(storage_->ready_, device_.NewEvent());
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaEventRecord(storage_->ready_.get(), device_.pack()));
  STAGECOACH_RETURN_IF_ERROR(LetGo(0));
  return std::make_unique<CudaUnitWeights>(std::move(storage_));
}

}  // namespace stagecoach::cuda
