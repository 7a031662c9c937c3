#include "worker/kv_slots.h"

#include <numeric>

#include "kernels/backend.h"

namespace stagecoach {

int BlockTable::BlocksPerSlot(int max_context) {
  return (max_context + kKvBlockPositions - 1) / kKvBlockPositions;
}

BlockTable::BlockTable(int slots, int max_context)
    : blocks_per_slot_(BlocksPerSlot(max_context)),
      blocks_(static_cast<size_t>(slots) * blocks_per_slot_) {
  std::iota(blocks_.begin(), blocks_.end(), 0);
}

std::span<const int32_t> BlockTable::Blocks(int slot, int positions) const {
  const std::span<const int32_t> all(blocks_);
  return all.subspan(static_cast<size_t>(slot) * blocks_per_slot_, BlocksPerSlot(positions));
}

KvSlots::KvSlots(int slots, int max_context, bool keep_history)
    : max_context_(max_context),
      keep_history_(keep_history),
      blocks_(slots, max_context),
      now_(slots),
      next_(slots),
      histories_(slots) {}

void KvSlots::Begin() {
  next_ = now_;
  for (SlotState& state : next_) state.has_rows = false;
}

void KvSlots::SetTokens(int slot, size_t start, std::span<const int32_t> tokens) {
  if (!keep_history_) return;
  std::vector<int32_t>& history = histories_[slot];
  history.reserve(max_context_);
  history.resize(start);
  history.insert(history.end(), tokens.begin(), tokens.end());
}

}  // namespace stagecoach
