// The slots of one stage: which sequence holds each, how far its KV reaches, and where it lies.
#ifndef STAGECOACH_WORKER_KV_SLOTS_H_
#define STAGECOACH_WORKER_KV_SLOTS_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/sampling.h"

namespace stagecoach {

struct SlotState {
  bool open = false;
  uint64_t sequence_id = 0;
  int length = 0;         // positions in the KV
  bool has_rows = false;  // in the step being prepared
  bool poisoned = false;  // its values went non-finite: its KV must be cleared before reuse
  SamplingParams sampling;
  size_t prompt_tokens = 0;
};

// KV blocks of each slot. Slot s owns blocks [s * n, (s + 1) * n) for good; positions 32*i .. lie
// in its i-th block.
class BlockTable {
 public:
  BlockTable(int slots, int max_context);
  static int BlocksPerSlot(int max_context);
  // The blocks of the first `positions` positions. Valid as long as the table.
  std::span<const int32_t> Blocks(int slot, int positions) const;

 private:
  const int blocks_per_slot_;
  std::vector<int32_t> blocks_;  // [slots][blocks_per_slot]
};

// A step is prepared on a copy of the states and takes effect by Commit(): until then a step that
// turns out wrong or fails has changed nothing. Allocates nothing after the constructor but the
// token history of a slot that is opened for the first time. Not thread-safe.
class KvSlots {
 public:
  // keep_history: the tokens of each sequence are kept (the last stage needs them for penalties).
  KvSlots(int slots, int max_context, bool keep_history);

  int size() const { return static_cast<int>(now_.size()); }
  int max_context() const { return max_context_; }
  const SlotState& now(int slot) const { return now_[slot]; }
  SlotState& next(int slot) { return next_[slot]; }
  const SlotState& next(int slot) const { return next_[slot]; }

  void Begin();
  void Commit() { now_.swap(next_); }

  // Sets the tokens at positions start .. of the slot's sequence; start <= tokens known so far.
  void SetTokens(int slot, size_t start, std::span<const int32_t> tokens);
  // The tokens of the slot's sequence, those of the step being prepared included.
  std::span<const int32_t> History(int slot) const { return histories_[slot]; }

  std::span<const int32_t> Blocks(int slot, int positions) const {
    return blocks_.Blocks(slot, positions);
  }

 private:
  const int max_context_;
  const bool keep_history_;
  const BlockTable blocks_;
  std::vector<SlotState> now_;
  std::vector<SlotState> next_;
  std::vector<std::vector<int32_t>> histories_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_KV_SLOTS_H_
