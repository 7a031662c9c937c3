#include "kernels/cuda/cuda_weights.h"

#include "kernels/cuda/cuda_status.h"
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
  if (ready_.get() == nullptr) {
    cudaStreamSynchronize(device_.copy());  // abandoned: nothing may arrive in freed memory
  } else if (!uploaded_) {
    cudaStreamWaitEvent(device_.compute(), ready_.get());
  }
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

absl::Status CudaUnitBuilder::Add(TensorRole role, const TensorInfo& tensor,
                                  std::span<const std::byte> raw) {
  STAGECOACH_RETURN_IF_ERROR(CheckTensorShape(role, tensor));
  STAGECOACH_RETURN_IF_ERROR(CheckTensorData(tensor, raw));
  STAGECOACH_RETURN_IF_ERROR(device_.MakeCurrent());
  const uint64_t bytes = DeviceBytes(role, tensor);
  STAGECOACH_ASSIGN_OR_RETURN(DeviceBuffer<std::byte> memory,
                              device_.NewBuffer<std::byte>(bytes, device_.copy()));
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
  return Upload(role, tensor, raw, data);
}

absl::Status CudaUnitBuilder::Upload(TensorRole role, const TensorInfo& tensor,
                                     std::span<const std::byte> raw, std::byte* to) {
  if (role == TensorRole::kTokenEmbedding) return uploader_.Copy(raw, to);
  if (!IsVectorRole(role)) return uploader_.Pack(tensor, raw, to);
  std::vector<float> values(tensor.columns());
  STAGECOACH_RETURN_IF_ERROR(DequantizeRow(tensor.type, raw, values));
  return uploader_.Copy(std::as_bytes(std::span(values)), to);
}

absl::StatusOr<std::unique_ptr<UnitWeights>> CudaUnitBuilder::Finish() {
  STAGECOACH_RETURN_IF_ERROR(device_.MakeCurrent());
  STAGECOACH_ASSIGN_OR_RETURN(storage_->ready_, device_.NewEvent());
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaEventRecord(storage_->ready_.get(), device_.copy()));
  return std::make_unique<CudaUnitWeights>(std::move(storage_));
}

}  // namespace stagecoach::cuda
