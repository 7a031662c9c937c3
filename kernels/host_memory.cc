#include "kernels/host_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>

#include "model/direct_file.h"

namespace stagecoach {

std::shared_ptr<HostMemory> NewPageMemory(size_t bytes) {
  if (bytes > SIZE_MAX / 2) return nullptr;
  const size_t size =
      (std::max<size_t>(bytes, 1) + kDirectAlignment - 1) / kDirectAlignment * kDirectAlignment;
  void* pages = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) return nullptr;
#if defined(MADV_HUGEPAGE)
  ::madvise(pages, size, MADV_HUGEPAGE);  // a wish only: one page fault instead of 512
#endif
  return std::make_shared<HostMemory>(static_cast<std::byte*>(pages), size, /*direct=*/false,
                                      [pages, size] { ::munmap(pages, size); });
}

}  // namespace stagecoach
