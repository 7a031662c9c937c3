// Weights of one unit on the GPU.
#ifndef STAGECOACH_KERNELS_CUDA_CUDA_WEIGHTS_H_
#define STAGECOACH_KERNELS_CUDA_CUDA_WEIGHTS_H_

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/quant_matmul.h"
#include "kernels/cuda/uploader.h"

namespace stagecoach::cuda {

inline constexpr int kTensorRoles = static_cast<int>(TensorRole::kFfnDown) + 1;

// Bytes on the GPU of a tensor whose type and shape have been checked.
uint64_t DeviceBytes(TensorRole role, const TensorInfo& tensor);

// The tensors themselves: alive while a UnitWeights or a recorded step holds them. The destructor
// waits for the work that uses them: memory that counts as free is free, however far the host is
// ahead of the GPU.
class UnitStorage {
 public:
  explicit UnitStorage(const CudaDevice& device) : device_(device) {}
  ~UnitStorage();
  UnitStorage(const UnitStorage&) = delete;
  UnitStorage& operator=(const UnitStorage&) = delete;

  // data is null if the unit has none of this role.
  const PackedMatrix& matrix(TensorRole role) const { return matrices_[static_cast<int>(role)]; }
  // Norm weights and biases as float32; nullptr if the unit has none of this role.
  const float* vector(TensorRole role) const { return vectors_[static_cast<int>(role)]; }
  // The token embedding, with its bytes as in the file.
  const PackedMatrix& embedding() const { return matrix(TensorRole::kTokenEmbedding); }
  uint64_t bytes() const { return bytes_; }

  // Makes the compute stream wait for the upload. Any thread.
  absl::Status AwaitUpload() const;
  // True once the upload is over and nothing has to wait for it.
  bool Uploaded() const;
  // What was launched on the compute stream so far uses these weights. Whoever launches such work
  // says so, or the destructor waits for all of the stream; a graph may run at any later time.
  void NoteUse() const;
  void NoteGraph() const { in_graph_ = true; }

 private:
  friend class CudaUnitBuilder;
  const CudaDevice& device_;
  std::array<PackedMatrix, kTensorRoles> matrices_;
  std::array<const float*, kTensorRoles> vectors_ = {};
  std::vector<DeviceBuffer<std::byte>> memory_;
  uint64_t bytes_ = 0;
  Event ready_;  // on the pack stream, behind the last tensor and pairing; none before Finish
  Event used_;   // on the compute stream, behind the latest use
  mutable std::atomic<bool> uploaded_ = false;
  mutable std::atomic<bool> noted_use_ = false;
  mutable std::atomic<bool> in_graph_ = false;
};

class CudaUnitWeights : public UnitWeights {
 public:
  explicit CudaUnitWeights(std::shared_ptr<const UnitStorage> storage)
      : storage_(std::move(storage)) {}
  uint64_t bytes() const override { return storage_->bytes(); }
  const std::shared_ptr<const UnitStorage>& storage() const { return storage_; }

 private:
  const std::shared_ptr<const UnitStorage> storage_;
};

class CudaUnitBuilder : public UnitBuilder {
 public:
  // Both must outlive the builder.
  CudaUnitBuilder(const CudaDevice& device, Uploader& uploader)
      : device_(device), uploader_(uploader), storage_(std::make_shared<UnitStorage>(device)) {}
  ~CudaUnitBuilder() override;

  absl::Status AddPart(TensorRole role, const TensorInfo& tensor, const TensorPart& part) override;
  absl::StatusOr<std::unique_ptr<UnitWeights>> Finish() override;

 private:
  // Pinned memory, and what the GPU has taken from it when the event is over.
  struct Held {
    std::shared_ptr<const HostMemory> memory;
    Event copied;
  };
  absl::Status Allocate(TensorRole role, const TensorInfo& tensor);
  absl::Status Upload(TensorRole role, const TensorInfo& tensor, const TensorPart& part,
                      bool pinned);
  // Of gate and up, where a product makes SwiGLU of them, for one that takes halves.
  absl::Status PairRows();
  absl::Status Hold(const TensorPart& part);
  // Lets go of all but the latest `rest`, once they have been copied.
  absl::Status LetGo(size_t rest);

  const CudaDevice& device_;
  Uploader& uploader_;
  std::shared_ptr<UnitStorage> storage_;
  std::deque<Held> held_;
};

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_CUDA_WEIGHTS_H_
