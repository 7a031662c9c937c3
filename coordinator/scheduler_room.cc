// The scheduler's slots and blocks: who gets them, and who has to give them back.
#include <algorithm>
#include <cassert>

#include "coordinator/scheduler.h"
#include "fmt/format.h"

namespace stagecoach {

SlotPool::SlotPool(int slots) {
  for (int slot = 0; slot < slots; ++slot) free_.push_back(slot);
}

int SlotPool::Acquire() {
  const int slot = free_.front();
  free_.pop_front();
  return slot;
}

void SlotPool::Release(int slot, bool opened) {
  free_.push_back(slot);
  if (opened) closing_.push_back(slot);
}

std::vector<int> SlotPool::TakeClosing() { return std::exchange(closing_, {}); }

// Whoever is first and finds no room is waited for: smaller ones behind it would starve it. Only a
// client that has nothing running may go before it, into room that is kept for such clients or that
// another client has to give.
void Scheduler::Admit() {
  while (const FairEntry* next = NextWaiting()) {
    if (Join(Of(next))) {
      waiting_.Erase(next);
      continue;
    }
    const bool kept = KeptFree(Of(next));
    if (kept || !TakeRoom(Of(next))) {
      next = waiting_.FrontWhere(
          [this](const std::string& client) { return !running_of_.contains(client); });
      if (next == nullptr) return;
      const bool room = kept && TakeRoom(Of(next));
      if (!room && (!MakeRoom(Of(next)) || !TakeRoom(Of(next)))) return;
    }
    Sequence& sequence = Of(next);
    waiting_.Serve(next, static_cast<int>(sequence.tokens.size()));
    waiting_.Erase(next);
    Start(sequence);
  }
}

// Whether the sequence had better wait for one that is computing at least half of what it needs. It
// does so only once, for one that is served no later than itself.
bool Scheduler::Join(Sequence& sequence) {
  if (sequence.shared > 0 || sequence.live->request.score) return false;
  const std::vector<int32_t>& tokens = sequence.tokens;
  const size_t most = std::min<size_t>(tokens.size() - 1, MostCached(sequence)) / kKvBlockPositions;
  const size_t known = most == 0 ? 0 : FindPrefix(sequence).blocks.size();
  if (known == most) return false;
  for (const Sequence* leader : by_slot_) {
    if (leader == nullptr || !leader->publishes ||
        leader->entry.priority < sequence.entry.priority ||
        leader->live->request.cache_salt != sequence.live->request.cache_salt ||
        (leader->entry.client != sequence.entry.client && OverShare(leader->entry.client))) {
      continue;
    }
    const size_t compared = std::min(most * kKvBlockPositions, leader->tokens.size());
    const auto differs =
        std::mismatch(tokens.begin(), tokens.begin() + compared, leader->tokens.begin()).first;
    const size_t shared = (differs - tokens.begin()) / kKvBlockPositions;
    if (shared <= std::max(known, leader->runs.size()) ||
        2 * (shared - known) * kKvBlockPositions < tokens.size() - known * kKvBlockPositions) {
      continue;
    }
    sequence.leader = leader->id;
    sequence.shared = shared;
    joining_.push_back(sequence.id);
    return true;
  }
  return false;
}

// The leader has published so many blocks, or all it ever will: whoever waited for them goes on.
void Scheduler::EndJoin(SequenceId leader, size_t published) {
  std::erase_if(joining_, [&](SequenceId id) {
    const Sequence& sequence = sequences_.at(id);
    if (sequence.leader != leader || sequence.shared > published) return false;
    waiting_.Push(&sequence.entry);
    return true;
  });
}

// Whether the slots left are kept from the sequence, whose client is over its share, for those that
// are away for a moment: at most a quarter of all.
bool Scheduler::KeptFree(const Sequence& sequence) const {
  return slots_.free() <= std::min(shares_.away(), options_.max_slots / 4) && running_ > 0 &&
         OverShare(sequence.entry.client);
}

// What the prefix cache has of the sequence. At least one token is left to be computed, as its
// logits are wanted; for scoring those of every token are.
BlockPool::Prefix Scheduler::FindPrefix(const Sequence& sequence) const {
  const SchedulerRequest& request = sequence.live->request;
  if (request.score) return {};
  const int most = std::min(static_cast<int>(sequence.tokens.size()) - 1, MostCached(sequence));
  return pool_.Find(request.cache_salt, sequence.tokens, most / kKvBlockPositions);
}

// Tokens that the sequence may open with, beside its biases.
int Scheduler::MostCached(const Sequence& sequence) {
  return kMaxCachedTokens - kTokensPerLogitBias * sequence.live->request.logit_biases;
}

// Blocks for all tokens of the sequence: those that the prefix cache has, and new ones.
bool Scheduler::TakeRoom(Sequence& sequence) {
  if (slots_.empty()) return false;
  BlockPool::Prefix prefix = FindPrefix(sequence);
  if (pool_.available() < BlocksWanted(sequence, prefix)) return false;
  for (int block : prefix.blocks) pool_.AddReference(block);
  sequence.blocks = std::move(prefix.blocks);
  sequence.runs = std::move(prefix.runs);
  sequence.sent = static_cast<int>(sequence.blocks.size()) * kKvBlockPositions;
  while (sequence.blocks.size() * kKvBlockPositions < sequence.tokens.size()) {
    sequence.blocks.push_back(pool_.Allocate());
  }
  return true;
}

// Blocks that must be available for it: one to spare, unless nothing runs that could take it.
int Scheduler::BlocksWanted(const Sequence& sequence, const BlockPool::Prefix& prefix) const {
  const int tokens = static_cast<int>(sequence.tokens.size());
  return KvBlocksFor(tokens) - static_cast<int>(prefix.blocks.size()) + prefix.unused +
         (running_ > 0 ? 1 : 0);
}

// Preempts sequences of the client that runs most of them, if that makes room for `sequence`, whose
// client has nothing running. The other keeps something running, so that it cannot take the room
// back the same way.
bool Scheduler::MakeRoom(const Sequence& sequence) {
  const auto most =
      std::max_element(running_of_.begin(), running_of_.end(),
                       [](const auto& a, const auto& b) { return a.second < b.second; });
  if (most == running_of_.end() || most->second < 2) return false;
  std::vector<Sequence*> candidates;
  for (Sequence* other : by_slot_) {
    if (other != nullptr && other->entry.client == most->first) candidates.push_back(other);
  }
  const BlockPool::Prefix prefix = FindPrefix(sequence);
  std::vector<Sequence*> victims;
  const auto gained = [&](int block) {
    return pool_.references(block) == 1 &&
           std::find(prefix.blocks.begin(), prefix.blocks.end(), block) == prefix.blocks.end();
  };
  int blocks = pool_.available();
  while (victims.empty() || blocks < BlocksWanted(sequence, prefix)) {
    Sequence* victim = LowestRanked(candidates);
    if (victim == nullptr || victim->entry.priority > sequence.entry.priority) return false;
    std::erase(candidates, victim);
    if (candidates.empty()) return false;
    victims.push_back(victim);
    blocks += static_cast<int>(std::count_if(victim->blocks.begin(), victim->blocks.end(), gained));
  }
  for (Sequence* victim : victims) Preempt(*victim);
  return true;
}

// It has its blocks: gives it a slot and a place among the prompts.
void Scheduler::Start(Sequence& sequence) {
  sequence.answered = sequence.sent;
  sequence.slot = slots_.Acquire();
  by_slot_[sequence.slot] = &sequence;
  ++running_;
  ++running_of_[sequence.entry.client];
  prompts_.Push(&sequence.entry);
}

// Starts `child` behind the prompt of `parent`, all but its last token, whose row each choice runs
// by itself to sample from it. The block that this row is written to is its own.
bool Scheduler::TryFork(const Sequence& parent, Sequence& child) {
  if (slots_.empty() || pool_.available() < 2) return false;  // one to spare
  const int position = static_cast<int>(child.tokens.size()) - 1;
  if (position > MostCached(child)) return false;
  const size_t shared = position / kKvBlockPositions;
  child.blocks.assign(parent.blocks.begin(), parent.blocks.begin() + shared);
  for (int block : child.blocks) pool_.AddReference(block);
  child.runs.assign(parent.runs.begin(),
                    parent.runs.begin() + std::min(shared, parent.runs.size()));
  child.publishes = parent.publishes || child.runs.size() == shared;
  child.blocks.push_back(pool_.Allocate());
  if (position % kKvBlockPositions != 0) {
    const int from = parent.blocks[shared];
    pool_.AddReference(from);
    copies_.push_back({.from = from, .to = child.blocks.back()});
  }
  child.sent = position;
  Start(child);
  return true;
}

// The next block of a decoding sequence, from one that is preempted if there is no other. False if
// that is `sequence` itself.
bool Scheduler::AddBlock(Sequence& sequence) {
  while (pool_.available() == 0) {
    std::vector<Sequence*> candidates = {&sequence};
    for (Sequence* other : by_slot_) {
      const bool in_this_step = other != nullptr && other->step == steps_ + 1;
      if (other != nullptr && other != &sequence && !in_this_step) candidates.push_back(other);
    }
    Sequence* victim = LowestRanked(candidates);
    Preempt(*victim);
    if (victim == &sequence) return false;
  }
  sequence.blocks.push_back(pool_.Allocate());
  return true;
}

// Scores that were sent cannot be taken back, so sequences that are scored are spared; they take no
// further blocks.
Scheduler::Sequence* Scheduler::LowestRanked(std::span<Sequence* const> among) const {
  const auto rank = [](const Sequence* sequence) {
    return std::pair(-(sequence->entry.priority + sequence->preemptions), sequence->entry.order);
  };
  Sequence* lowest = nullptr;
  for (Sequence* sequence : among) {
    if (sequence->live->request.score) continue;
    if (lowest == nullptr || rank(sequence) > rank(lowest)) lowest = sequence;
  }
  return lowest;
}

void Scheduler::Preempt(Sequence& sequence) {
  Stop(sequence);
  ++sequence.preemptions;
  ++stats_.preemptions;
  waiting_.Push(&sequence.entry);
}

// Takes the sequence out of whatever it is in; a running one gives its slot and blocks back.
void Scheduler::Stop(Sequence& sequence) {
  waiting_.Erase(&sequence.entry);
  std::erase(joining_, sequence.id);
  if (!sequence.running()) return;
  EndJoin(sequence.id, SIZE_MAX);
  prompts_.Erase(&sequence.entry);
  std::erase(ready_, sequence.id);
  if (sequence.decoding) --decoding_;
  slots_.Release(sequence.slot, sequence.opened);
  by_slot_[sequence.slot] = nullptr;
  --running_;
  const auto running_of = running_of_.find(sequence.entry.client);
  if (--running_of->second == 0) running_of_.erase(running_of);
  // Positions [answered, sent) are written by steps in flight, or were by a row that failed.
  const int first_dirty = sequence.answered < sequence.sent ? sequence.answered / kKvBlockPositions
                                                            : KvBlocksFor(sequence.sent);
  for (int i = static_cast<int>(sequence.blocks.size()) - 1; i >= 0; --i) {
    const int block = sequence.blocks[i];
    std::erase_if(copies_, [&](const Step::Copy& copy) {
      if (copy.to == block) pool_.Release(copy.from, false);
      return copy.to == block;
    });
    ReleaseBlock(block, first_dirty <= i && i < KvBlocksFor(sequence.sent));
  }
  sequence.slot = -1;
  sequence.opened = sequence.decoding = false;
  sequence.sent = sequence.answered = sequence.told_blocks = 0;
  sequence.blocks.clear();
  sequence.runs.clear();
  sequence.publishes = true;
}

absl::Status Scheduler::CheckBlocks() const {
  std::vector<int> references(pool_.total());
  for (const auto& [id, sequence] : sequences_) {
    for (int block : sequence.blocks) ++references[block];
  }
  for (const Step::Copy& copy : copies_) ++references[copy.from];
  int used = 0;
  for (int block = 0; block < pool_.total(); ++block) {
    if (references[block] > 0) ++used;
    if (references[block] == pool_.references(block)) continue;
    return absl::InternalError(fmt::format("block {}: {} references, in {} tables", block,
                                           pool_.references(block), references[block]));
  }
  if (used == pool_.used() && used + pool_.available() == pool_.total()) return absl::OkStatus();
  return absl::InternalError(fmt::format("{} blocks in tables; {} used, {} cached, {} free of {}",
                                         used, pool_.used(), pool_.cached(), pool_.free(),
                                         pool_.total()));
}

}  // namespace stagecoach
