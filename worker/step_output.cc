#include "worker/step_output.h"

#include <algorithm>
#include <optional>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "kernels/sampling.h"
#include "model/status_macros.h"

namespace stagecoach {
namespace {

bool Wanted(const v1::SequenceRows& rows, int index) {
  const bool last = index + 1 == static_cast<int>(rows.row_count());
  return rows.logits() || index < rows.targets_size() || (rows.sample() && last);
}

// Takes back what the sequence has produced and leaves the error alone.
void Fail(const absl::Status& status, size_t vocab_size, v1::SequenceResult& result,
          std::vector<float>& payload) {
  payload.resize(payload.size() - result.logits_rows() * vocab_size);
  v1::SequenceResult failed;
  failed.set_slot(result.slot());
  failed.set_sequence_id(result.sequence_id());
  failed.set_status_code(static_cast<uint32_t>(status.code()));
  failed.set_status_message(std::string(status.message()));
  result = std::move(failed);
}

}  // namespace

StepOutput::StepOutput(Backend* backend, Workspace* workspace, int vocab_size, int max_step_tokens)
    : backend_(backend),
      workspace_(workspace),
      vocab_size_(vocab_size),
      logits_(vocab_size_ * std::min(kHeadRows, max_step_tokens)) {
  rows_.reserve(2 * max_step_tokens);
  row_numbers_.reserve(2 * max_step_tokens);
  totals_.reserve(kHeadRows);
  draws_.reserve(kHeadRows);
  drawn_.reserve(kHeadRows);
}

absl::Status StepOutput::Run(const UnitWeights& head, const v1::StepHeader& step, KvSlots& slots,
                             v1::StepResult& result, std::vector<float>& payload) {
  result.set_vocab(static_cast<uint32_t>(vocab_size_));
  size_t logits_rows = 0;
  for (const v1::SequenceRows& rows : step.rows()) {
    v1::SequenceResult& sequence = *result.add_sequences();
    sequence.set_slot(rows.slot());
    sequence.set_sequence_id(rows.sequence_id());
    if (slots.next(rows.slot()).poisoned()) {
      Fail(absl::DataLossError("non-finite activations"), vocab_size_, sequence, payload);
    } else if (rows.logits()) {
      logits_rows += rows.row_count();
    }
  }
  payload.reserve(logits_rows * vocab_size_);
  ListRows(step, slots);
  for (size_t first = 0, count; first < rows_.size(); first += count) {
    const Take take = rows_[first].take;
    count = 1;
    while (count < kHeadRows && first + count < rows_.size() && rows_[first + count].take == take) {
      ++count;
    }
    const auto run = take == Take::kAll   ? &StepOutput::RunFull
                     : take == Take::kTop ? &StepOutput::RunTop
                                          : &StepOutput::RunDraw;
    STAGECOACH_RETURN_IF_ERROR((this->*run)(head, step, first, count, slots, result, payload));
  }
  return absl::OkStatus();
}

absl::Status StepOutput::RunFull(const UnitWeights& head, const v1::StepHeader& step, size_t first,
                                 size_t count, KvSlots& slots, v1::StepResult& result,
                                 std::vector<float>& payload) {
  const auto row_numbers = std::span<const int32_t>(row_numbers_).subspan(first, count);
  const std::span<float> logits(logits_.data(), count * vocab_size_);
  STAGECOACH_RETURN_IF_ERROR(backend_->Head(*workspace_, head, row_numbers, logits));
  for (size_t i = 0; i < count; ++i) {
    const HeadRow& row = rows_[first + i];
    const v1::SequenceRows& rows = step.rows(row.sequence);
    v1::SequenceResult& sequence = *result.mutable_sequences(row.sequence);
    if (sequence.status_code() != 0) continue;
    const absl::Status status = Consume(
        rows, row.index, logits.subspan(i * vocab_size_, vocab_size_), slots, sequence, payload);
    if (status.ok()) continue;
    SlotState& slot = slots.next(rows.slot());
    slot.Poison(KvBlocksFor(slot.length) * kKvBlockPositions);  // its KV is finite
    Fail(status, vocab_size_, sequence, payload);
  }
  return absl::OkStatus();
}

absl::Status StepOutput::RunTop(const UnitWeights& head, const v1::StepHeader& step, size_t first,
                                size_t count, KvSlots& slots, v1::StepResult& result,
                                std::vector<float>& payload) {
  const auto row_numbers = std::span<const int32_t>(row_numbers_).subspan(first, count);
  const auto here = std::span<const HeadRow>(rows_).subspan(first, count);
  const size_t most = std::ranges::max(here, {}, &HeadRow::top_logits).top_logits;
  top_.resize(kHeadRows * most);
  const std::span<TopLogit> top(top_.data(), count * most);
  totals_.resize(std::ranges::any_of(here, &HeadRow::may_fail) ? count : 0);
  STAGECOACH_RETURN_IF_ERROR(
      backend_->HeadTop(*workspace_, head, row_numbers, static_cast<int>(most), top, totals_));
  for (size_t i = 0; i < count; ++i) {
    HeadRow row = rows_[first + i];
    const SlotState& slot = slots.next(step.rows(row.sequence).slot());
    const auto best = top.subspan(i * most, row.top_logits);
    const auto position = static_cast<uint64_t>(slot.length);
    if (!row.may_fail) {
      SetToken(row, SampleFromTop(best, slot.sampling, position), step, slots, result, payload);
      continue;
    }
    const absl::StatusOr<std::optional<int32_t>> token =
        SampleFromBest(best, static_cast<int>(vocab_size_), totals_[i], slot.sampling, position);
    if (!token.ok()) {
      SetToken(row, token.status(), step, slots, result, payload);
    } else if (token->has_value()) {
      SetToken(row, **token, step, slots, result, payload);
    } else {
      row.take = Take::kAll;
      rows_.push_back(row);
      row_numbers_.push_back(row.number);
    }
  }
  return absl::OkStatus();
}

absl::Status StepOutput::RunDraw(const UnitWeights& head, const v1::StepHeader& step, size_t first,
                                 size_t count, KvSlots& slots, v1::StepResult& result,
                                 std::vector<float>& payload) {
  const auto row_numbers = std::span<const int32_t>(row_numbers_).subspan(first, count);
  draws_.clear();
  for (size_t i = first; i < first + count; ++i) draws_.push_back(rows_[i].draw);
  drawn_.resize(count);
  STAGECOACH_RETURN_IF_ERROR(backend_->HeadDraw(*workspace_, head, row_numbers, draws_, drawn_));
  for (size_t i = 0; i < count; ++i) {
    absl::StatusOr<int32_t> token = drawn_[i];
    if (drawn_[i] < 0) token = absl::DataLossError("non-finite logits");
    SetToken(rows_[first + i], token, step, slots, result, payload);
  }
  return absl::OkStatus();
}

void StepOutput::SetToken(const HeadRow& row, const absl::StatusOr<int32_t>& token,
                          const v1::StepHeader& step, KvSlots& slots, v1::StepResult& result,
                          std::vector<float>& payload) {
  v1::SequenceResult& sequence = *result.mutable_sequences(row.sequence);
  if (sequence.status_code() != 0) return;  // for another of its rows
  if (token.ok()) {
    sequence.set_sampled(true);
    sequence.set_token_id(*token);
    return;
  }
  SlotState& slot = slots.next(step.rows(row.sequence).slot());
  slot.Poison(KvBlocksFor(slot.length) * kKvBlockPositions);  // its KV is finite
  Fail(token.status(), vocab_size_, sequence, payload);
}

StepOutput::HeadRow StepOutput::Choose(const v1::SequenceRows& rows, int sequence, int index,
                                       const KvSlots& slots) const {
  HeadRow row = {.sequence = sequence,
                 .index = index,
                 .number = 0,
                 .take = Take::kAll,
                 .top_logits = 0,
                 .may_fail = false,
                 .draw = {}};
  if (rows.logits() || index < rows.targets_size()) return row;
  const SlotState& slot = slots.next(rows.slot());
  const int vocab = static_cast<int>(vocab_size_);
  const int top = TopLogitsNeeded(slot.sampling, vocab);
  const int most = std::min(backend_->MaxTopLogits(), vocab);
  if (top > 0 && top <= most) {
    row.take = Take::kTop;
    row.top_logits = top;
  } else if (most > 0 && BestMayDecide(slot.sampling, vocab)) {
    row.take = Take::kTop;
    row.top_logits = most;
    row.may_fail = true;
  } else if (const auto draw =
                 DrawAmongAll(slot.sampling, vocab, static_cast<uint64_t>(slot.length));
             draw && backend_->DrawsTokens()) {
    row.take = Take::kDraw;
    row.draw = *draw;
  }
  return row;
}

void StepOutput::ListRows(const v1::StepHeader& step, const KvSlots& slots) {
  rows_.clear();
  row_numbers_.clear();
  int first_row = 0;
  for (int sequence = 0; sequence < step.rows_size(); ++sequence) {
    const v1::SequenceRows& rows = step.rows(sequence);
    const int count = static_cast<int>(rows.row_count());
    for (int index = 0; index < count && !slots.next(rows.slot()).poisoned(); ++index) {
      if (!Wanted(rows, index)) continue;
      rows_.push_back(Choose(rows, sequence, index, slots));
      rows_.back().number = first_row + index;
    }
    first_row += count;
  }
  std::ranges::sort(rows_, {}, [](const HeadRow& row) { return std::pair(row.take, row.number); });
  for (const HeadRow& row : rows_) row_numbers_.push_back(row.number);
}

absl::Status StepOutput::Consume(const v1::SequenceRows& rows, int index,
                                 std::span<const float> logits, const KvSlots& slots,
                                 v1::SequenceResult& result, std::vector<float>& payload) const {
  if (!AllFinite(logits)) return absl::DataLossError("non-finite logits");
  if (rows.logits()) {
    payload.insert(payload.end(), logits.begin(), logits.end());
    result.set_logits_rows(result.logits_rows() + 1);
  }
  if (index < rows.targets_size()) {
    STAGECOACH_ASSIGN_OR_RETURN(const float logprob, LogProbability(logits, rows.targets(index)));
    result.add_target_logprobs(logprob);
  }
  if (rows.sample() && index + 1 == static_cast<int>(rows.row_count())) {
    const SlotState& slot = slots.next(rows.slot());
    STAGECOACH_ASSIGN_OR_RETURN(const SampledToken token,
                                Sample(logits, slot.sampling, slots.History(rows.slot()),
                                       slot.prompt_tokens, static_cast<uint64_t>(slot.length)));
    result.set_sampled(true);
    result.set_token_id(token.token_id);
    result.set_logprob(token.logprob);
    result.mutable_top_ids()->Add(token.top_ids.begin(), token.top_ids.end());
    result.mutable_top_logprobs()->Add(token.top_logprobs.begin(), token.top_logprobs.end());
  }
  return absl::OkStatus();
}

}  // namespace stagecoach
