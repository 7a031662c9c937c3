#include "worker/load_rate.h"

#include <algorithm>
#include <cstdint>
#include <memory>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "kernels/host_memory.h"
#include "model/file.h"
#include "worker/unit_parts.h"

namespace stagecoach {
namespace {

constexpr absl::Duration kEnough = absl::Milliseconds(250);

}  // namespace

double MeasureLoadRate(const ModelFile& model, uint64_t bytes) {
  const TensorInfo& first = *model.UnitTensors({.kind = Unit::Kind::kLayer, .layer = 0})[0].tensor;
  const RandomAccessFile& file = model.file(first.file_index);
  const uint64_t alignment = file.read_alignment();
  const uint64_t begin = first.offset / alignment * alignment;
  const uint64_t end = std::min(begin + bytes, file.size() / alignment * alignment);
  if (end < begin + bytes) return 0;
  const std::shared_ptr<HostMemory> buffer = NewPageMemory(kPartBytes);
  if (buffer == nullptr) return 0;
  const absl::Time start = absl::Now();
  uint64_t at = begin;
  while (at < end && absl::Now() - start < kEnough) {
    const uint64_t chunk = std::min<uint64_t>(kPartBytes, end - at);
    if (!ReadFully(file, at, {buffer->data(), chunk}).ok()) return 0;
    at += chunk;
  }
  const double seconds = absl::ToDoubleSeconds(absl::Now() - start);
  return at > begin && seconds > 0 ? static_cast<double>(at - begin) / seconds : 0;
}

}  // namespace stagecoach
