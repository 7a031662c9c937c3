#include "worker/link/stage_link.h"

#include <atomic>

namespace stagecoach {

uint64_t NextLinkId() {
  static std::atomic<uint64_t> next{1};
  return next.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace stagecoach
