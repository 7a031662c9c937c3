// How the scheduler fills a step with rows.
#include <algorithm>
#include <cassert>

#include "coordinator/scheduler.h"

namespace stagecoach {
namespace {

int CeilDivide(int a, int b) { return (a + b - 1) / b; }

}  // namespace

std::optional<Step> Scheduler::Next() {
  if (in_flight() >= options_.max_in_flight || !WorthAPass()) return std::nullopt;
  Admit();
  Step step;
  AddDecodeRows(step);
  AddPromptRows(step);
  if (step.rows.empty()) return std::nullopt;
  step.number = ++steps_;
  step.close = slots_.TakeClosing();
  step.clear = pool_.TakeDirty();
  step.copies = std::exchange(copies_, {});
  for (const Step::Copy& copy : step.copies) pool_.Release(copy.from, false);
  if (step.decode_rows > 0) ++decode_steps_in_flight_;
  in_flight_.push_back(step);
  return step;
}

// False: while streaming, the rows at hand are better sent together with those in flight.
bool Scheduler::WorthAPass() const {
  if (!streaming_ || decode_steps_in_flight_ == 0) return true;
  const bool decodes = decode_steps_in_flight_ < options_.stages;
  const int64_t rows = PendingPromptRows() + (decodes ? static_cast<int64_t>(ready_.size()) : 0);
  return rows >= options_.max_step_tokens;
}

// More decoding steps in flight than stages would only queue before a stage; the rows that wait
// instead join the step after, which costs hardly more with them than without.
void Scheduler::AddDecodeRows(Step& step) {
  if (decode_steps_in_flight_ >= options_.stages) return;
  const int limit = DecodeRowLimit();
  while (step.decode_rows < limit && !ready_.empty()) {
    Sequence& sequence = sequences_.at(ready_.front());
    if (static_cast<int>(sequence.blocks.size()) < KvBlocksFor(sequence.sent + 1) &&
        !AddBlock(sequence)) {
      continue;  // preempted, no longer ready
    }
    ready_.pop_front();
    AddRows(sequence, 1, step);
    prompts_.Charge(sequence.entry, 1);
    ++step.decode_rows;
  }
}

// An equal share for each stage's step (while streaming: everything), and room for prompts, which
// would starve otherwise.
int Scheduler::DecodeRowLimit() const {
  const int share = streaming_ ? decoding_ : CeilDivide(decoding_, options_.stages);
  if (prompts_.empty()) return std::min(share, options_.max_step_tokens);
  if (options_.max_step_tokens == 1) return steps_ % 2;  // take turns
  const int room = std::max(1, options_.max_step_tokens / 4);
  return std::min(share, options_.max_step_tokens - room);
}

// Rows are given out in turns of a block's size; those of one sequence then go together.
void Scheduler::AddPromptRows(Step& step) {
  int rows_left = std::min(options_.max_step_tokens - step.decode_rows, PromptRowLimit());
  int scored_rows_left = kMaxScoredRows;
  int cached_left = kMaxCachedTokens;
  std::vector<std::pair<Sequence*, int>> shares;
  std::vector<Sequence*> put_off;  // scored, with too many scored rows in this step
  while (rows_left > 0 && !prompts_.empty()) {
    const FairEntry* front = prompts_.Front();
    Sequence& sequence = Of(front);
    auto share = std::find_if(shares.begin(), shares.end(),
                              [&](const auto& entry) { return entry.first == &sequence; });
    const int given = share == shares.end() ? 0 : share->second;
    int count = std::min({sequence.pending() - given, rows_left, kKvBlockPositions});
    if (sequence.live->request.score) count = std::min(count, scored_rows_left);
    if (count == 0) {
      prompts_.Erase(front);
      put_off.push_back(&sequence);
      continue;
    }
    if (share == shares.end()) {
      if (!sequence.opened && sequence.sent > cached_left) break;
      if (!sequence.opened) cached_left -= sequence.sent;
      share = shares.insert(share, {&sequence, 0});
    }
    share->second += count;
    rows_left -= count;
    if (sequence.live->request.score) scored_rows_left -= count;
    prompts_.Serve(front, count);
    if (share->second == sequence.pending()) prompts_.Erase(front);
  }
  for (const Sequence* sequence : put_off) prompts_.Push(&sequence->entry);
  for (const auto& [sequence, count] : shares) {
    AddRows(*sequence, count, step);
    if (sequence->pending() > 0 || sequence->live->request.score) continue;
    sequence->decoding = true;
    ++decoding_;
  }
}

// One stage works best on large chunks. Several stages work at the same time only if the prompt
// rows at hand make several chunks: two for each stage, if they do not become too small.
int Scheduler::PromptRowLimit() const {
  if (options_.stages == 1 || streaming_) return options_.max_step_tokens;
  const int64_t chunks = PendingPromptRows() / (2 * options_.stages) / kMinChunkRows;
  return static_cast<int>(
      std::min<int64_t>((chunks + 1) * kMinChunkRows, options_.max_step_tokens));
}

int64_t Scheduler::PendingPromptRows() const {
  int64_t rows = 0;
  for (const Sequence* sequence : by_slot_) {
    if (sequence != nullptr && !sequence->decoding) rows += sequence->pending();
  }
  return rows;
}

void Scheduler::AddRows(Sequence& sequence, int count, Step& step) {
  const SchedulerRequest& request = sequence.live->request;
  StepRows rows;
  rows.id = request.id;
  rows.choice = sequence.choice;
  rows.sequence = sequence.id;
  rows.attempt = sequence.preemptions;
  rows.slot = sequence.slot;
  rows.start_position = sequence.sent;
  rows.row_count = count;
  rows.score = request.score;
  rows.logits = request.score && request.logits;
  if (!sequence.opened) OpenSequence(sequence, rows);
  const auto first = sequence.tokens.begin() + sequence.sent;
  step.token_ids.insert(step.token_ids.end(), first, first + count);
  sequence.sent += count;
  sequence.step = steps_ + 1;
  rows.sample = !rows.score && sequence.pending() == 0;
  if (rows.score) {
    const int targets = sequence.pending() == 0 ? count - 1 : count;
    rows.targets.assign(first + 1, first + 1 + targets);
  }
  const int blocks = KvBlocksFor(sequence.sent);
  rows.new_blocks.assign(sequence.blocks.begin() + sequence.told_blocks,
                         sequence.blocks.begin() + blocks);
  sequence.told_blocks = blocks;
  step.rows.push_back(std::move(rows));
}

void Scheduler::OpenSequence(Sequence& sequence, StepRows& rows) {
  sequence.opened = rows.open = true;
  sequence.told_blocks = KvBlocksFor(sequence.sent);
  rows.cached_blocks.assign(sequence.blocks.begin(),
                            sequence.blocks.begin() + sequence.told_blocks);
  rows.cached_tokens.assign(sequence.tokens.begin(), sequence.tokens.begin() + sequence.sent);
  if (!sequence.live->stepped) stats_.cached_tokens += sequence.sent;
  sequence.live->stepped = true;
}

}  // namespace stagecoach
