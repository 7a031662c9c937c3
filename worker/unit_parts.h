// How a unit is cut into the parts in which it is read and given to the backend.
#ifndef STAGECOACH_WORKER_UNIT_PARTS_H_
#define STAGECOACH_WORKER_UNIT_PARTS_H_

#include <cstdint>
#include <vector>

#include "kernels/backend.h"
#include "model/model_file.h"

namespace stagecoach {

inline constexpr uint64_t kPartBytes = 8 << 20;

// How loads are made.
struct LoadOptions {
  int threads = 1;                   // that read the parts of one unit
  uint64_t part_bytes = kPartBytes;  // of a read: larger only if kPartRows rows are
};

// Whole rows of one tensor of a unit.
struct UnitPart {
  TensorRole role;
  const TensorInfo* tensor = nullptr;
  uint64_t first_row = 0;
  uint64_t offset = 0;  // within the tensor
  uint64_t bytes = 0;
  int index = 0;      // among the tensor's parts
  bool last = false;  // of the tensor
};

// All parts of the unit in file order of use; a tensor that is not larger than options.part_bytes
// is one.
std::vector<UnitPart> CutUnit(const std::vector<UnitTensor>& tensors, const LoadOptions& options);
// The parts of one tensor.
std::vector<UnitPart> CutTensor(const UnitTensor& tensor, const LoadOptions& options);

// Parts that one load has in memory at most, those that the backend holds on to included: part i
// of a unit takes the place of part i - LoadSlots.
int LoadSlots(const BackendInfo& backend, const LoadOptions& options);
// What the part's buffer takes. Direct reads round up to whole blocks, which is not counted.
uint64_t BufferBytes(const UnitPart& part, const LoadOptions& options);
// What the buffers of one load take at most, whichever of its parts are read.
uint64_t LoadBufferBytes(const std::vector<UnitPart>& parts, int slots, const LoadOptions& options);

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_UNIT_PARTS_H_
