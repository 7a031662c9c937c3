// Weights of one unit in the CPU backend's layout.
#ifndef STAGECOACH_KERNELS_CPU_CPU_WEIGHTS_H_
#define STAGECOACH_KERNELS_CPU_CPU_WEIGHTS_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/cpu/aligned_buffer.h"
#include "kernels/cpu/pack.h"

namespace stagecoach::cpu {

inline constexpr int kTensorRoles = static_cast<int>(TensorRole::kFfnDown) + 1;

// What the tensor takes as part of CpuUnitWeights; its shape and type have been checked.
uint64_t PackedBytes(TensorRole role, const TensorInfo& tensor);

inline bool IsFloatType(TensorType type) {
  return type == TensorType::kF32 || type == TensorType::kF16 || type == TensorType::kBF16;
}

class CpuUnitWeights : public UnitWeights {
 public:
  uint64_t bytes() const override;

  const MatrixView& matrix(TensorRole role) const {
    return matrices_[static_cast<int>(role)].view();
  }
  // Norm weights and biases; nullptr if the unit has none of this role.
  const float* vector(TensorRole role) const { return vectors_[static_cast<int>(role)].data(); }
  // Decodes rows token_ids of the embedding matrix to out [token_ids.size()][d_model].
  absl::Status LookUp(std::span<const int32_t> token_ids, float* out) const;

 private:
  friend class CpuUnitBuilder;
  std::array<PackedMatrix, kTensorRoles> matrices_;
  std::array<AlignedBuffer<float>, kTensorRoles> vectors_;
  // Looked up row by row, hence kept as in the file.
  AlignedBuffer<std::byte> embedding_;
  TensorType embedding_type_ = TensorType::kF32;
  uint64_t embedding_columns_ = 0;
};

class CpuUnitBuilder : public UnitBuilder {
 public:
  absl::Status AddPart(TensorRole role, const TensorInfo& tensor, const TensorPart& part) override;
  absl::StatusOr<std::unique_ptr<UnitWeights>> Finish() override;

 private:
  std::unique_ptr<CpuUnitWeights> weights_ = std::make_unique<CpuUnitWeights>();
};

}  // namespace stagecoach::cpu

#endif  // STAGECOACH_KERNELS_CPU_CPU_WEIGHTS_H_
