#include "worker/kv_slots.h"

#include <cassert>

namespace stagecoach {

KvSlots::KvSlots(int slots, int max_context, int kv_blocks, bool keep_history)
    : max_context_(max_context),
      keep_history_(keep_history),
      now_(slots),
      next_(slots),
      stores_(slots),
      users_(kv_blocks) {}

void KvSlots::Begin() {
  for (const auto& [block, change] : uncommitted_) users_[block] -= change;
  uncommitted_.clear();
  next_ = now_;
  for (SlotState& state : next_) state.has_rows = false;
}

void KvSlots::Commit() {
  uncommitted_.clear();
  now_.swap(next_);
}

void KvSlots::Count(int32_t block, int change) {
  users_[block] += change;
  uncommitted_.push_back({block, change});
}

void KvSlots::Close(int slot) {
  for (const int32_t block : Blocks(slot)) Count(block, -1);
  next_[slot] = SlotState{};
}

void KvSlots::Open(int slot, const SlotState& state) {
  next_[slot] = state;
  next_[slot].open = true;
  next_[slot].store = 1 - now_[slot].store;
}

void KvSlots::AppendBlocks(int slot, std::span<const uint32_t> blocks) {
  SlotState& state = next_[slot];
  std::vector<int32_t>& table = stores_[slot][state.store].blocks;
  table.reserve(KvBlocksFor(max_context_));
  table.resize(state.block_count);  // what a step that was not committed has left
  for (const uint32_t block : blocks) {
    table.push_back(static_cast<int32_t>(block));
    Count(static_cast<int32_t>(block), 1);
  }
  state.block_count = static_cast<int>(table.size());
}

void KvSlots::SetTokens(int slot, size_t start, std::span<const int32_t> tokens) {
  if (!keep_history_) return;
  std::vector<int32_t>& history = stores_[slot][next_[slot].store].history;
  assert(start <= history.size());
  history.reserve(max_context_);
  history.resize(start);
  history.insert(history.end(), tokens.begin(), tokens.end());
}

void KvSlots::SetPicked(int slot, int32_t token) {
  if (!keep_history_) return;
  std::vector<int32_t>& history = stores_[slot][next_[slot].store].history;
  if (!history.empty() && history.back() < 0) history.back() = token;
}

std::span<const int32_t> KvSlots::Blocks(int slot, const SlotState& state) const {
  return std::span(stores_[slot][state.store].blocks).first(state.block_count);
}

std::span<const int32_t> KvSlots::History(int slot) const {
  return std::span(stores_[slot][next_[slot].store].history).first(next_[slot].length);
}

void KvSlots::CollectPoisoned(int slot, std::vector<int32_t>& blocks) const {
  const SlotState& state = now_[slot];
  if (!state.poisoned()) return;
  for (const int32_t block : Blocks(slot, state).subspan(state.poisoned_from / kKvBlockPositions)) {
    if (users_[block] == 0) blocks.push_back(block);
  }
}

}  // namespace stagecoach
