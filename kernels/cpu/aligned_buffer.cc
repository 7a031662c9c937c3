#include "kernels/cpu/aligned_buffer.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace stagecoach::cpu {
namespace {

constexpr size_t kCacheLine = 64;
constexpr size_t kPage = 4096;
constexpr size_t kHugePage = size_t{2} << 20;

// Pages come zeroed from the system. `bytes` whole pages; nullptr if there is not enough memory.
void* MapAligned(size_t bytes) {
  const size_t room = bytes + kHugePage;
  void* mapped = ::mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  std::byte* begin = static_cast<std::byte*>(mapped);
  const size_t before = -reinterpret_cast<uintptr_t>(mapped) % kHugePage;
  if (before > 0) ::munmap(begin, before);
  ::munmap(begin + before + bytes, room - before - bytes);
  return begin + before;
}

// False if there is not enough memory.
bool TouchPages(void* memory, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  ::madvise(memory, bytes, MADV_HUGEPAGE);  // a wish only
#endif
#if defined(MADV_POPULATE_WRITE)
  if (::madvise(memory, bytes, MADV_POPULATE_WRITE) == 0) return true;
  if (errno == ENOMEM) return false;  // else a system that does not know it
#endif
  std::memset(memory, 0, bytes);
  return true;
}

}  // namespace

void AlignedFree::operator()(void* p) const {
  if (mapped_bytes > 0) {
    ::munmap(p, mapped_bytes);
  } else {
    std::free(p);
  }
}

std::unique_ptr<void, AlignedFree> AllocateZeroed(size_t bytes) {
  if (bytes > SIZE_MAX / 2) return nullptr;
  if (bytes >= kHugePage) {
    const size_t rounded = (bytes + kPage - 1) / kPage * kPage;
    std::unique_ptr<void, AlignedFree> memory(MapAligned(rounded), AlignedFree(rounded));
    if (memory == nullptr || !TouchPages(memory.get(), rounded)) return nullptr;
    return memory;
  }
  const size_t rounded =
      bytes == 0 ? kCacheLine : (bytes + kCacheLine - 1) / kCacheLine * kCacheLine;
  std::unique_ptr<void, AlignedFree> memory(std::aligned_alloc(kCacheLine, rounded), AlignedFree());
  if (memory != nullptr) std::memset(memory.get(), 0, rounded);
  return memory;
}

}  // namespace stagecoach::cpu
