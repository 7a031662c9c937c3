#include "coordinator/scheduler.h"

#include <algorithm>
#include <cassert>
#include <utility>

#include "fmt/format.h"

namespace stagecoach {
namespace {

SchedulerOptions WithDefaults(SchedulerOptions options) {
  if (options.max_in_flight == 0) options.max_in_flight = options.stages + 1;
  assert(options.stages >= 1 && options.max_slots >= 1 && options.max_context >= 1);
  assert(options.max_step_tokens >= 1 && options.max_waiting >= 0 && options.max_in_flight >= 1);
  const int blocks = KvBlocksFor(options.max_context);
  if (options.kv_blocks == 0) options.kv_blocks = options.max_slots * blocks;
  assert(options.kv_blocks >= blocks);
  return options;
}

}  // namespace

Scheduler::Scheduler(SchedulerOptions options)
    : options_(WithDefaults(options)),
      slots_(options_.max_slots),
      pool_(options_.kv_blocks, options_.hash_seed),
      by_slot_(options_.max_slots) {}

absl::Status Scheduler::Check(const SchedulerRequest& request) const {
  if (request.prompt.empty()) return absl::InvalidArgumentError("the prompt is empty");
  if (request.prompt.size() > static_cast<size_t>(options_.max_context)) {
    return absl::InvalidArgumentError(fmt::format("the prompt has {} tokens, the context {}",
                                                  request.prompt.size(), options_.max_context));
  }
  if (!request.score && request.max_tokens < 1) {
    return absl::InvalidArgumentError("max_tokens must be at least 1");
  }
  if (request.choices < 1 || (request.score && request.choices != 1)) {
    return absl::InvalidArgumentError("choices must be at least 1, and 1 for scoring");
  }
  if (requests_.contains(request.id)) {
    return absl::AlreadyExistsError(fmt::format("request {} is live", request.id));
  }
  const size_t places = static_cast<size_t>(options_.max_slots) + options_.max_waiting;
  if (sequences_.size() + request.choices > places) {
    return absl::ResourceExhaustedError(
        fmt::format("{} sequences are running and {} waiting", running(), waiting()));
  }
  return absl::OkStatus();
}

absl::Status Scheduler::Add(SchedulerRequest request) {
  if (absl::Status status = Check(request); !status.ok()) return status;
  const RequestId id = request.id;
  if (request.deadline != absl::InfiniteDuration()) deadlines_.emplace(request.deadline, id);
  shares_.Begin(request.client, request.priority);
  Live& live = requests_[id];
  for (int choice = 0; choice < request.choices; ++choice) {
    const SequenceId sequence = ++last_sequence_;
    live.sequences.push_back(sequence);
    sequences_[sequence] = {
        .id = sequence,
        .live = &live,
        .choice = choice,
        .entry = {.order = sequence, .priority = request.priority, .client = request.client}};
  }
  Sequence& first = sequences_.at(live.sequences.front());
  first.tokens = request.prompt;
  live.request = std::move(request);
  waiting_.Push(&first.entry);
  Admit();
  return absl::OkStatus();
}

void Scheduler::Cancel(RequestId id) {
  EndRequest(id, absl::CancelledError("the request was cancelled"));
}

void Scheduler::FinishEarly(RequestId id, int choice) {
  const auto found = requests_.find(id);
  if (found == requests_.end()) return;
  for (SequenceId sequence : found->second.sequences) {
    if (sequences_.at(sequence).choice != choice) continue;
    EndChoice(sequences_.at(sequence), absl::OkStatus(), Finish::kStop);
    return;
  }
}

void Scheduler::Tick(absl::Duration now) {
  while (!deadlines_.empty() && deadlines_.begin()->first <= now) {
    EndRequest(deadlines_.begin()->second,
               absl::DeadlineExceededError("the request's deadline has passed"));
  }
}

absl::Duration Scheduler::NextDeadline() const {
  return deadlines_.empty() ? absl::InfiniteDuration() : deadlines_.begin()->first;
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
  const auto found = sequences_.find(rows.sequence);
  if (found == sequences_.end()) return;  // ended since
  Sequence& sequence = found->second;
  if (sequence.preemptions != rows.attempt) return;  // to be computed again
  if (!result.status.ok()) {
    EndChoice(sequence, result.status);
    return;
  }
  sequence.answered = rows.start_position + rows.row_count;
  Publish(sequence);
  EndJoin(sequence.id, sequence.publishes ? sequence.runs.size() : SIZE_MAX);
  if (rows.score) {
    Tell({.kind = SchedulerEvent::Kind::kScores,
          .id = rows.id,
          .rows = index,
          .index = static_cast<uint32_t>(rows.start_position)});
    if (sequence.pending() == 0 && sequence.answered == sequence.sent) {
      EndChoice(sequence, absl::OkStatus());
    }
  } else if (rows.sample) {
    if (!sequence.live->prompt_ready) Fork(sequence);
    OnToken(sequence, index, result.token_id);
  }
}

void Scheduler::OnToken(Sequence& sequence, int index, int32_t token) {
  const SchedulerRequest& request = sequence.live->request;
  sequence.tokens.push_back(token);
  ++sequence.generated;
  Tell({.kind = SchedulerEvent::Kind::kToken,
        .id = request.id,
        .choice = sequence.choice,
        .rows = index,
        .index = static_cast<uint32_t>(sequence.generated - 1)});
  const std::vector<int32_t>& stops = request.stop_token_ids;
  if (std::find(stops.begin(), stops.end(), token) != stops.end()) {
    EndChoice(sequence, absl::OkStatus(), Finish::kStop);
  } else if (sequence.generated >= request.max_tokens ||
             sequence.tokens.size() >= static_cast<size_t>(options_.max_context)) {
    EndChoice(sequence, absl::OkStatus(), Finish::kLength);
  } else if (sequence.pending() > 0) {  // not sent ahead
    ready_.push_back(sequence.id);
  }
}

// What the blocks that have become full with answered rows hold is from now on known.
void Scheduler::Publish(Sequence& sequence) {
  const std::string& salt = sequence.live->request.cache_salt;
  while (sequence.publishes) {
    const size_t block = sequence.runs.size();
    if ((block + 1) * kKvBlockPositions > static_cast<size_t>(sequence.answered)) return;
    const auto tokens = std::span<const int32_t>(sequence.tokens)
                            .subspan(block * kKvBlockPositions)
                            .first<static_cast<size_t>(kKvBlockPositions)>();
    const PrefixId before = block == 0 ? 0 : sequence.runs.back();
    const BlockPool::Published published =
        pool_.Publish(sequence.blocks[block], before, salt, tokens);
    sequence.publishes = published.known;
    if (published.known) sequence.runs.push_back(published.id);
  }
}

// The prompt of `parent` has come back: the other choices of its request begin behind it. If others
// wait or there is no room they wait like any other sequence, and find the prompt in the prefix
// cache.
void Scheduler::Fork(const Sequence& parent) {
  Live& live = *parent.live;
  live.prompt_ready = true;
  for (SequenceId id : live.sequences) {
    Sequence& child = sequences_.at(id);
    if (&child == &parent) continue;
    child.tokens = parent.tokens;
    if (!waiting_.empty() || !TryFork(parent, child)) waiting_.Push(&child.entry);
  }
}

// The first choice has ended before its prompt was computed: the others do without.
void Scheduler::BeginOthers(Live& live, std::span<const int32_t> prompt) {
  live.prompt_ready = true;
  for (SequenceId id : live.sequences) {
    Sequence& sequence = sequences_.at(id);
    sequence.tokens.assign(prompt.begin(), prompt.end());
    waiting_.Push(&sequence.entry);
  }
}

void Scheduler::EndChoice(Sequence& sequence, const absl::Status& status, Finish finish) {
  Live& live = *sequence.live;
  Tell({.kind = SchedulerEvent::Kind::kChoiceEnd,
        .id = live.request.id,
        .choice = sequence.choice,
        .status = status,
        .finish = finish});
  if (live.failure.ok()) live.failure = status;
  Stop(sequence);
  const std::vector<int32_t> tokens = std::move(sequence.tokens);
  std::erase(live.sequences, sequence.id);
  sequences_.erase(sequence.id);
  if (live.sequences.empty()) {
    EndRequest(live.request.id, absl::Status(live.failure), finish);
  } else if (!live.prompt_ready && !tokens.empty()) {
    BeginOthers(live, tokens);
  }
}

void Scheduler::EndRequest(RequestId id, const absl::Status& status, Finish finish) {
  const auto found = requests_.find(id);
  if (found == requests_.end()) return;
  for (SequenceId sequence : found->second.sequences) {
    Stop(sequences_.at(sequence));
    sequences_.erase(sequence);
  }
  shares_.End(found->second.request.client);
  deadlines_.erase({found->second.request.deadline, id});
  requests_.erase(found);
  Tell({.kind = SchedulerEvent::Kind::kEnd, .id = id, .status = status, .finish = finish});
}

void Scheduler::Reset(const absl::Status& reason) {
  std::vector<RequestId> ids;
  for (const auto& [id, live] : requests_) ids.push_back(id);
  std::sort(ids.begin(), ids.end());
  for (RequestId id : ids) EndRequest(id, reason);
  in_flight_.clear();
  decode_steps_in_flight_ = 0;
  steps_ = last_prompt_step_ = last_decode_step_ = decoding_from_ = 0;
  shares_ = {};
  slots_ = SlotPool(options_.max_slots);
  pool_.Reset();
}

std::vector<SchedulerEvent> Scheduler::TakeEvents() { return std::exchange(events_, {}); }

SchedulerStats Scheduler::stats() const {
  SchedulerStats stats = stats_;
  stats.blocks_used = pool_.used();
  stats.blocks_cached = pool_.cached();
  stats.blocks_free = pool_.free();
  return stats;
}

}  // namespace stagecoach
