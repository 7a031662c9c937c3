#include "coordinator/scheduler.h"

#include <algorithm>
#include <cassert>
#include <string>

#include "fmt/format.h"

namespace stagecoach {
namespace {

SchedulerOptions WithDefaults(SchedulerOptions options) {
  if (options.max_in_flight == 0) options.max_in_flight = options.stages + 1;
  assert(options.stages >= 1 && options.max_slots >= 1 && options.max_context >= 1);
  assert(options.max_step_tokens >= 1 && options.max_waiting >= 0 && options.max_in_flight >= 1);
  return options;
}

int CeilDivide(int a, int b) { return (a + b - 1) / b; }

}  // namespace

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

Scheduler::Scheduler(SchedulerOptions options)
    : options_(WithDefaults(options)), slots_(options_.max_slots) {}

absl::Status Scheduler::Add(SchedulerRequest request) {
  if (request.prompt.empty()) return absl::InvalidArgumentError("the prompt is empty");
  if (request.prompt.size() > static_cast<size_t>(options_.max_context)) {
    return absl::InvalidArgumentError(fmt::format("the prompt has {} tokens, the context {}",
                                                  request.prompt.size(), options_.max_context));
  }
  if (!request.score && request.max_tokens < 1) {
    return absl::InvalidArgumentError("max_tokens must be at least 1");
  }
  if (sequences_.contains(request.id)) {
    return absl::AlreadyExistsError(fmt::format("request {} is live", request.id));
  }
  if (slots_.empty() && waiting() >= options_.max_waiting) {
    return absl::ResourceExhaustedError(
        fmt::format("{} requests are running and {} waiting", running(), waiting()));
  }
  const RequestId id = request.id;
  if (request.deadline != absl::InfiniteDuration()) deadlines_.emplace(request.deadline, id);
  Sequence sequence;
  sequence.tokens = std::move(request.prompt);
  sequence.prompt_tokens = static_cast<int>(sequence.tokens.size());
  sequence.request = std::move(request);
  sequences_.emplace(id, std::move(sequence));
  waiting_.push_back(id);
  Admit();
  return absl::OkStatus();
}

void Scheduler::Cancel(RequestId id) { End(id, absl::CancelledError("the request was cancelled")); }

void Scheduler::FinishEarly(RequestId id) { End(id, absl::OkStatus(), Finish::kStop); }

void Scheduler::Tick(absl::Duration now) {
  while (!deadlines_.empty() && deadlines_.begin()->first <= now) {
    End(deadlines_.begin()->second,
        absl::DeadlineExceededError("the request's deadline has passed"));
  }
}

absl::Duration Scheduler::NextDeadline() const {
  return deadlines_.empty() ? absl::InfiniteDuration() : deadlines_.begin()->first;
}

std::optional<Step> Scheduler::Next() {
  if (in_flight() >= options_.max_in_flight || !WorthAPass()) return std::nullopt;
  Step step;
  AddDecodeRows(step);
  AddPromptRows(step);
  if (step.rows.empty()) return std::nullopt;
  step.number = ++steps_;
  step.close = slots_.TakeClosing();
  if (step.decode_rows > 0) ++decode_steps_in_flight_;
  in_flight_.push_back(step);
  return step;
}

void Scheduler::Admit() {
  while (!waiting_.empty() && !slots_.empty()) {
    const RequestId id = waiting_.front();
    waiting_.pop_front();
    sequences_.at(id).slot = slots_.Acquire();
    prompts_.push_back(id);
  }
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
    AddRows(sequences_.at(ready_.front()), 1, step);
    ready_.pop_front();
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

void Scheduler::AddPromptRows(Step& step) {
  int rows_left = std::min(options_.max_step_tokens - step.decode_rows, PromptRowLimit());
  int scored_rows_left = kMaxScoredRows;
  std::deque<RequestId> unsent;
  for (RequestId id : prompts_) {
    Sequence& sequence = sequences_.at(id);
    int count = std::min(sequence.pending(), rows_left);
    if (sequence.request.score) {
      count = std::min(count, scored_rows_left);
      scored_rows_left -= count;
    }
    rows_left -= count;
    if (count > 0) AddRows(sequence, count, step);
    if (sequence.pending() > 0) {
      unsent.push_back(id);
    } else if (!sequence.request.score) {
      ++decoding_;
    }
  }
  prompts_ = std::move(unsent);
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
  for (RequestId id : prompts_) rows += sequences_.at(id).pending();
  return rows;
}

void Scheduler::AddRows(Sequence& sequence, int count, Step& step) {
  StepRows rows;
  rows.id = sequence.request.id;
  rows.slot = sequence.slot;
  rows.start_position = sequence.sent;
  rows.row_count = count;
  rows.open = sequence.sent == 0;
  rows.score = sequence.request.score;
  rows.logits = sequence.request.score && sequence.request.logits;
  const auto first = sequence.tokens.begin() + sequence.sent;
  step.token_ids.insert(step.token_ids.end(), first, first + count);
  sequence.sent += count;
  rows.sample = !rows.score && sequence.pending() == 0;
  if (rows.score) {
    const int targets = sequence.pending() == 0 ? count - 1 : count;
    rows.targets.assign(first + 1, first + 1 + targets);
  }
  step.rows.push_back(std::move(rows));
}

const Step* Scheduler::FindInFlight(uint64_t step) const {
  if (in_flight_.empty() || step < in_flight_.front().number) return nullptr;
  const uint64_t index = step - in_flight_.front().number;
  return index < in_flight_.size() ? &in_flight_[index] : nullptr;
}

absl::Status Scheduler::OnResult(uint64_t number, std::span<const RowsResult> results) {
  const Step* found = FindInFlight(number);
  if (found == nullptr) return absl::NotFoundError(fmt::format("step {} is not in flight", number));
  if (number != in_flight_.front().number) {
    return absl::OutOfRangeError(
        fmt::format("step {} came back before step {}", number, in_flight_.front().number));
  }
  if (results.size() != found->rows.size()) {
    return absl::InvalidArgumentError(fmt::format("step {}: {} results for {} sequences", number,
                                                  results.size(), found->rows.size()));
  }
  const Step step = std::move(in_flight_.front());
  in_flight_.pop_front();
  if (step.decode_rows > 0) --decode_steps_in_flight_;
  for (size_t i = 0; i < results.size(); ++i) {
    OnRows(step.rows[i], static_cast<int>(i), results[i]);
  }
  return absl::OkStatus();
}

void Scheduler::OnRows(const StepRows& rows, int index, const RowsResult& result) {
  const auto found = sequences_.find(rows.id);
  if (found == sequences_.end()) return;  // ended since
  Sequence& sequence = found->second;
  if (!result.status.ok()) {
    End(rows.id, result.status);
  } else if (rows.score) {
    events_.push_back({.kind = SchedulerEvent::Kind::kScores,
                       .id = rows.id,
                       .rows = index,
                       .index = static_cast<uint32_t>(rows.start_position)});
    if (rows.start_position + rows.row_count == sequence.prompt_tokens) {
      End(rows.id, absl::OkStatus());
    }
  } else if (rows.sample) {
    OnToken(sequence, index, result.token_id);
  }
}

void Scheduler::OnToken(Sequence& sequence, int index, int32_t token) {
  const SchedulerRequest& request = sequence.request;
  sequence.tokens.push_back(token);
  const int generated = static_cast<int>(sequence.tokens.size()) - sequence.prompt_tokens;
  events_.push_back({.kind = SchedulerEvent::Kind::kToken,
                     .id = request.id,
                     .rows = index,
                     .index = static_cast<uint32_t>(generated - 1)});
  const std::vector<int32_t>& stops = request.stop_token_ids;
  if (std::find(stops.begin(), stops.end(), token) != stops.end()) {
    End(request.id, absl::OkStatus(), Finish::kStop);
  } else if (generated >= request.max_tokens ||
             sequence.tokens.size() >= static_cast<size_t>(options_.max_context)) {
    End(request.id, absl::OkStatus(), Finish::kLength);
  } else {
    ready_.push_back(request.id);
  }
}

void Scheduler::End(RequestId id, const absl::Status& status, Finish finish) {
  const auto found = sequences_.find(id);
  if (found == sequences_.end()) return;
  const Sequence& sequence = found->second;
  if (sequence.slot < 0) {
    std::erase(waiting_, id);
  } else {
    slots_.Release(sequence.slot, /*opened=*/sequence.sent > 0);
    std::erase(ready_, id);
    if (sequence.sent < sequence.prompt_tokens) {
      std::erase(prompts_, id);
    } else if (!sequence.request.score) {
      --decoding_;
    }
  }
  deadlines_.erase({sequence.request.deadline, id});
  sequences_.erase(found);
  events_.push_back(
      {.kind = SchedulerEvent::Kind::kEnd, .id = id, .status = status, .finish = finish});
  Admit();
}

void Scheduler::Reset(const absl::Status& reason) {
  std::vector<RequestId> ids;
  for (const auto& [id, sequence] : sequences_) ids.push_back(id);
  std::sort(ids.begin(), ids.end());
  for (RequestId id : ids) End(id, reason);
  in_flight_.clear();
  decode_steps_in_flight_ = 0;
  steps_ = 0;
  slots_ = SlotPool(options_.max_slots);
}

std::vector<SchedulerEvent> Scheduler::TakeEvents() { return std::exchange(events_, {}); }

}  // namespace stagecoach
