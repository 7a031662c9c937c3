#include "kernels/cpu/aligned_buffer.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>

namespace stagecoach::cpu {
namespace {

constexpr size_t kCacheLine = 64;
constexpr size_t kHugePage = size_t{2} << 20;

}  // namespace

void AlignedFree::operator()(void* p) const { std::free(p); }

std::unique_ptr<void, AlignedFree> AllocateZeroed(size_t bytes) {
  const size_t alignment = bytes >= kHugePage ? kHugePage : kCacheLine;
  const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  if (rounded < bytes) return nullptr;
  std::unique_ptr<void, AlignedFree> memory(
      std::aligned_alloc(alignment, rounded == 0 ? alignment : rounded));
  if (memory == nullptr) return nullptr;
#if defined(MADV_HUGEPAGE)
  if (alignment == kHugePage) madvise(memory.get(), rounded, MADV_HUGEPAGE);  // a wish only
#endif
  std::memset(memory.get(), 0, rounded);
  return memory;
}

}  // namespace stagecoach::cpu
