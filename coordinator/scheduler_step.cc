// How the scheduler fills a step with rows.
#include <algorithm>
#include <cassert>

#include "coordinator/scheduler.h"

namespace stagecoach {
namespace {

// Prompts shorter than two such chunks are not cut in half. Nor are those of so many rows on one
// stage, where there is nobody to work on the other half meanwhile.
constexpr int kMinHalfRows = 8;
constexpr int kMaxWholeRows = 64;

int CeilDivide(int a, int b) { return (a + b - 1) / b; }

}  // namespace

std::optional<Step> Scheduler::Next() {
  if (in_flight() >= options_.max_in_flight || !WorthAPass()) return std::nullopt;
  shares_.Update();
  if (Crowded() && in_flight() >= options_.stages && last_prompt_step_ == steps_) {
    return std::nullopt;
  }
  Admit();
  Step step;
  int over_share_rows = OverShareRows();
  AddDecodeRows(step, over_share_rows);
  AddPromptRows(step, over_share_rows);
  if (step.rows.empty() && in_flight_.empty()) {
    for (SequenceId id : ready_) sequences_.at(id).held_until = 0;  // for nothing else would go
    AddDecodeRows(step, over_share_rows);
  }
  if (step.rows.empty()) return std::nullopt;
  shares_.EndStep();
  step.number = ++steps_;
  step.close = slots_.TakeClosing();
  step.clear = pool_.TakeDirty();
  step.copies = std::exchange(copies_, {});
  for (const Step::Copy& copy : step.copies) pool_.Release(copy.from, false);
  if (step.decode_rows > 0) {
    ++decode_steps_in_flight_;
    last_decode_step_ = steps_;
  }
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

// Whether rows are shared out by ClientShares: not while streaming, where a small step costs a pass
// like a large one.
bool Scheduler::Crowded() const {
  return shares_.any_over() && !streaming_ && options_.max_step_tokens >= 2 * kCrowdedRows;
}

// Rows of the next step for clients that are over their share.
int Scheduler::OverShareRows() const {
  if (!Crowded()) return 0;
  if (in_flight() >= options_.stages) return 0;
  const bool waiting = shares_.awaited() || FirstPrompt(/*over_share=*/false) != nullptr;
  return waiting ? kRationedRows : kCrowdedRows;
}

// The prompt whose turn it is among those of clients that are over their share, or of the others.
const FairEntry* Scheduler::FirstPrompt(bool over_share) const {
  if (!over_share && Crowded()) {
    const auto found = sequences_.find(unfinished_);
    if (found != sequences_.end() && prompts_.contains(&found->second.entry) &&
        !OverShare(found->second.entry.client)) {
      return &found->second.entry;
    }
  }
  const FairEntry* front = prompts_.Front();
  if (front == nullptr || OverShare(front->client) == over_share) return front;
  return prompts_.FrontWhere(
      [&](const std::string& client) { return OverShare(client) == over_share; });
}

// More decoding steps in flight than stages would only queue before a stage; the rows that wait
// instead join the step after, which costs hardly more with them than without - unless all can go
// ahead. Clients that are over their share leave some of their rows to their prompts.
void Scheduler::AddDecodeRows(Step& step, int& over_share_rows) {
  const std::vector<Sequence*> ahead = Ahead();
  if (decode_steps_in_flight_ >= options_.stages && ahead.empty()) return;
  if (PromptGoesFirst()) return;
  const int limit = DecodeRowLimit();
  const int rationed = std::min(over_share_rows, kRationedRows);
  AddReady(/*over_share=*/false, std::min(limit, options_.max_step_tokens - rationed), step);
  for (Sequence* sequence : ahead) AddDecodeRow(*sequence, step);
  if (over_share_rows == 0) return;
  const bool prompts = FirstPrompt(/*over_share=*/true) != nullptr;
  const int most = over_share_rows - (prompts ? CeilDivide(over_share_rows, 4) : 0);
  const int before = step.decode_rows;
  AddReady(/*over_share=*/true, std::clamp(limit - before, 1, most), step);
  over_share_rows -= step.decode_rows - before;
}

// Whether a short prompt of a client within its share has the step to itself: at most twice in a
// row, and only on one stage, as several would have nothing to do meanwhile.
bool Scheduler::PromptGoesFirst() const {
  if (options_.stages > 1 || !Crowded() || last_decode_step_ + 1 < steps_) return false;
  const FairEntry* front = FirstPrompt(/*over_share=*/false);
  return front != nullptr && sequences_.at(front->order).pending() <= kMaxWholeRows;
}

// The decoding sequences whose next row may go before its token has come back. None if the step
// cannot hold all of them and those that are ready, or some would find no block: then none would
// stay together. Not while a client stands back: who goes on then, the newest tokens decide.
std::vector<Scheduler::Sequence*> Scheduler::Ahead() const {
  if (options_.stages > 1 || streaming_ || Crowded()) return {};
  std::vector<Sequence*> ahead;
  int blocks = 0;
  const auto count_block = [&](const Sequence& sequence) {
    if (static_cast<int>(sequence.blocks.size()) < KvBlocksFor(sequence.sent + 1)) ++blocks;
  };
  for (Sequence* sequence : by_slot_) {
    if (sequence == nullptr || !sequence->decoding || sequence->pending() != 0) continue;
    const Live& live = *sequence->live;
    if (!MayGoAhead(live.request, static_cast<int>(sequence->tokens.size()), sequence->generated,
                    !live.prompt_ready && live.sequences.size() > 1)) {
      continue;
    }
    ahead.push_back(sequence);
    count_block(*sequence);
  }
  for (SequenceId id : ready_) count_block(sequences_.at(id));
  const bool room = static_cast<int>(ready_.size() + ahead.size()) <= DecodeRowLimit() &&
                    blocks <= pool_.available();
  return room ? ahead : std::vector<Sequence*>();
}

// Up to `rows` rows of sequences whose clients are over their share, or of the others.
void Scheduler::AddReady(bool over_share, int rows, Step& step) {
  const bool crowded = Crowded();
  while (rows > 0) {
    const auto ready = std::find_if(ready_.begin(), ready_.end(), [&](SequenceId id) {
      const Sequence& sequence = sequences_.at(id);
      const bool held = crowded && sequence.held_until > steps_ + 1;
      return !held && OverShare(sequence.entry.client) == over_share;
    });
    if (ready == ready_.end()) return;
    Sequence& sequence = sequences_.at(*ready);
    ready_.erase(ready);
    if (AddDecodeRow(sequence, step)) --rows;
  }
}

// False: it was preempted instead.
bool Scheduler::AddDecodeRow(Sequence& sequence, Step& step) {
  if (static_cast<int>(sequence.blocks.size()) < KvBlocksFor(sequence.sent + 1) &&
      !AddBlock(sequence)) {
    return false;
  }
  AddRows(sequence, 1, step);
  prompts_.Charge(sequence.entry, 1);
  ++step.decode_rows;
  return true;
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

void Scheduler::AddPromptRows(Step& step, int over_share_rows) {
  PromptRows prompts;
  int rows = options_.max_step_tokens - step.decode_rows;
  rows -= ShareOut(/*over_share=*/true, std::min(rows, over_share_rows), prompts);
  if (ShareOut(/*over_share=*/false, std::min(rows, PromptRowLimit()), prompts) > 0) {
    last_prompt_step_ = steps_ + 1;
  }
  for (const Sequence* sequence : prompts.put_off) prompts_.Push(&sequence->entry);
  for (const auto& [sequence, count] : prompts.shares) {
    AddRows(*sequence, count, step);
    if (sequence->pending() > 0 || sequence->live->request.score) continue;
    sequence->decoding = true;
    ++decoding_;
  }
}

// Gives up to `rows` rows to prompts of clients that are over their share, or of the others, in
// turns of a block's size; those of one sequence then go together. While shares are looked at, the
// others' prompts go one by one.
int Scheduler::ShareOut(bool over_share, int rows, PromptRows& prompts) {
  const bool mixed = over_share || !Crowded();
  int given_out = 0;
  while (given_out < rows) {
    const FairEntry* front = FirstPrompt(over_share);
    if (front == nullptr) break;
    Sequence& sequence = Of(front);
    auto share = std::find_if(prompts.shares.begin(), prompts.shares.end(),
                              [&](const auto& entry) { return entry.first == &sequence; });
    const bool added = share == prompts.shares.end();
    if (added && !mixed && given_out >= kMinHalfRows) break;
    const int given = added ? 0 : share->second;
    const int pending = sequence.pending();
    const int whole = options_.stages == 1 ? kMaxWholeRows : 2 * kMinHalfRows - 1;
    const bool halve = !mixed && !sequence.opened && pending > whole;
    const int most = halve ? CeilDivide(pending, 2) : pending;
    int count = std::min({most - given, rows - given_out, kKvBlockPositions});
    if (count == 0) break;  // the other half in the next step
    if (sequence.live->request.score) count = std::min(count, prompts.scored_rows_left);
    if (count == 0) {
      prompts_.Erase(front);
      prompts.put_off.push_back(&sequence);
      continue;
    }
    if (added) {
      const int cached = kMaxCachedTokens - MostCached(sequence) + sequence.sent;
      if (!sequence.opened && cached > prompts.cached_left) break;
      if (!sequence.opened) prompts.cached_left -= cached;
      share = prompts.shares.insert(share, {&sequence, 0});
    }
    share->second += count;
    given_out += count;
    if (sequence.live->request.score) prompts.scored_rows_left -= count;
    prompts_.Serve(front, count);
    const int left = pending - share->second;
    if (left == 0) prompts_.Erase(front);
    if (mixed) continue;
    unfinished_ = left <= kKvBlockPositions ? sequence.id : 0;
    if (left == 0) MoveApart(sequence);
  }
  return given_out;
}

// The prompt ends with the step that is being made. Clients that send alike would meet again and
// again, each waiting for the other's prompt: so it is some steps after the one before that this
// sequence goes on, and later ends.
void Scheduler::MoveApart(Sequence& sequence) {
  const uint64_t next = steps_ + 2;
  decoding_from_ = std::max(next, std::min(decoding_from_ + kApartSteps, next + kMaxHeldSteps));
  sequence.held_until = decoding_from_;
}

// One stage works best on large chunks. Several stages work at the same time only if the prompt
// rows at hand make several chunks: a stage is idle for as long as its first chunk takes before it.
int Scheduler::PromptRowLimit() const {
  if (options_.stages == 1 || streaming_) return options_.max_step_tokens;
  const int least = std::max(kMinChunkRows, options_.max_step_tokens / kSmallestChunksPerStep);
  const int64_t chunks = PendingPromptRows() / (kChunksPerStage * options_.stages) / least;
  return static_cast<int>(std::min<int64_t>((chunks + 1) * least, options_.max_step_tokens));
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
  shares_.Charge(request.client, count);
  const auto first = sequence.tokens.begin() + sequence.sent;
  rows.ahead = sequence.pending() == 0;
  if (rows.ahead) {
    step.token_ids.push_back(0);
  } else {
    step.token_ids.insert(step.token_ids.end(), first, first + count);
  }
  sequence.sent += count;
  sequence.step = steps_ + 1;
  rows.sample = !rows.score && sequence.pending() <= 0;
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
