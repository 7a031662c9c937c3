// The slots of one stage: which sequence holds each, how far its KV reaches, and in which blocks it
// lies. The blocks are the coordinator's to hand out; frames bring them.
#ifndef STAGECOACH_WORKER_KV_SLOTS_H_
#define STAGECOACH_WORKER_KV_SLOTS_H_

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/backend.h"
#include "kernels/sampling.h"

namespace stagecoach {

struct SlotState {
  bool open = false;
  uint64_t sequence_id = 0;
  int length = 0;          // positions in the KV
  int block_count = 0;     // blocks in its table
  bool has_rows = false;   // in the step being prepared
  int poisoned_from = -1;  // position from which values may be non-finite; -1: none
  int store = 0;           // which of the slot's two stores holds table and history
  SamplingParams sampling;
  size_t prompt_tokens = 0;
  bool samples = false;  // its latest rows ask for a sample
  int32_t sampled = 0;   // by its latest rows that have run; 0 if nothing was

  bool poisoned() const { return poisoned_from >= 0; }
  void Poison(int position) {
    poisoned_from = poisoned() ? std::min(poisoned_from, position) : position;
  }
};

// A step is prepared on a copy of the states and takes effect by Commit(): until then a step that
// turns out wrong or fails has changed nothing (what was prepared goes at the next Begin). What is
// asked for must have been checked: slots in range, blocks in [0, kv_blocks). Allocates nothing
// once every slot has held a sequence of max_context. Not thread-safe.
class KvSlots {
 public:
  // keep_history: the tokens of each sequence are kept (the last stage needs them for penalties).
  KvSlots(int slots, int max_context, int kv_blocks, bool keep_history);

  int size() const { return static_cast<int>(now_.size()); }
  int max_context() const { return max_context_; }
  int kv_blocks() const { return static_cast<int>(users_.size()); }
  const SlotState& now(int slot) const { return now_[slot]; }
  SlotState& next(int slot) { return next_[slot]; }
  const SlotState& next(int slot) const { return next_[slot]; }

  void Begin();
  void Commit();

  // The slot, which is open, gives its blocks back.
  void Close(int slot);
  // The slot, which is closed, takes `state`; without blocks and tokens.
  void Open(int slot, const SlotState& state);
  void AppendBlocks(int slot, std::span<const uint32_t> blocks);
  // Sets the tokens at positions start .. of the slot's sequence; start <= tokens known so far.
  void SetTokens(int slot, size_t start, std::span<const int32_t> tokens);

  // The latest token of the slot's sequence, if it was set as PickOf a draw whose outcome this
  // is.
  void SetPicked(int slot, int32_t token);

  // Tables with this block in them, the step being prepared included.
  int users(uint32_t block) const { return users_[block]; }
  // Blocks of the slot's sequence, the step being prepared included. Valid until the next change.
  std::span<const int32_t> Blocks(int slot) const { return Blocks(slot, next_[slot]); }
  // The tokens of the slot's sequence, those of the step being prepared included.
  std::span<const int32_t> History(int slot) const;

  // After the closes of a step: the blocks that a closed sequence may have left non-finite values
  // in and that no other one uses. They must be cleared before they are used again.
  void CollectPoisoned(int slot, std::vector<int32_t>& blocks) const;

 private:
  struct Store {
    std::vector<int32_t> blocks;   // at least SlotState::block_count
    std::vector<int32_t> history;  // at least SlotState::length if kept
  };
  std::span<const int32_t> Blocks(int slot, const SlotState& state) const;
  void Count(int32_t block, int change);

  const int max_context_;
  const bool keep_history_;
  std::vector<SlotState> now_;
  std::vector<SlotState> next_;
  // Two of each slot, so that a sequence opened in the step that closes another leaves that one's
  // alone until the step is committed.
  std::vector<std::array<Store, 2>> stores_;
  std::vector<int32_t> users_;  // [kv_blocks]
  struct Change {
    int32_t block;
    int32_t change;
  };
  std::vector<Change> uncommitted_;  // changes of users_
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_KV_SLOTS_H_
