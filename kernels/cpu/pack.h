// Repacking of weight matrices from the file's blocks into panels (records.h).
#ifndef STAGECOACH_KERNELS_CPU_PACK_H_
#define STAGECOACH_KERNELS_CPU_PACK_H_

#include <cstddef>
#include <cstdint>
#include <span>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cpu/aligned_buffer.h"
#include "kernels/cpu/cpu_kernels.h"
#include "model/tensor_type.h"

namespace stagecoach::cpu {

// Bytes of one panel of `columns` columns, a multiple of the type's block.
size_t PanelBytes(TensorType type, int columns);

// An owned packed matrix.
class PackedMatrix {
 public:
  PackedMatrix() = default;

  // Packs rows x columns weights; `raw` as in the file, checked (tensor_check.h). Rows are padded
  // to whole panels with zeros. Errors: RESOURCE_EXHAUSTED.
  static absl::StatusOr<PackedMatrix> Pack(TensorType type, int rows, int columns,
                                           std::span<const std::byte> raw);
  // The same by parts: all zeros, and then rows [first_row, first_row + rows), from a whole panel
  // on and up to one, or to the last row.
  static absl::StatusOr<PackedMatrix> Create(TensorType type, int rows, int columns);
  void PackRows(int first_row, int rows, std::span<const std::byte> raw);

  const MatrixView& view() const { return view_; }
  size_t bytes() const { return memory_.bytes(); }
  bool empty() const { return view_.rows == 0; }

 private:
  AlignedBuffer<uint8_t> memory_;
  MatrixView view_;
};

}  // namespace stagecoach::cpu

#endif  // STAGECOACH_KERNELS_CPU_PACK_H_
