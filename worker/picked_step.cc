#include "worker/picked_step.h"

#include <algorithm>
#include <optional>
#include <string>

#include "absl/status/status.h"

namespace stagecoach {
namespace {

void SetDataLoss(const char* what, v1::SequenceResult& result) {
  result.set_status_code(static_cast<uint32_t>(absl::StatusCode::kDataLoss));
  result.set_status_message(what);
}

}  // namespace

bool FindPickingRows(const v1::StepHeader& step, const KvSlots& slots, int vocab_size, int most,
                     PickingRows& picking) {
  picking.sequences.clear();
  picking.rows.clear();
  picking.draws.clear();
  int end = 0;
  for (int i = 0; i < step.rows_size(); ++i) {
    const v1::SequenceRows& rows = step.rows(i);
    const SlotState& slot = slots.next(rows.slot());
    end += static_cast<int>(rows.row_count());
    if (rows.logits() || rows.targets_size() > 0) return false;
    if (!rows.sample() || slot.poisoned()) continue;
    const std::optional<TokenDraw> draw =
        DrawAmongAll(slot.sampling, vocab_size, static_cast<uint64_t>(slot.length));
    if (!draw || static_cast<int>(picking.rows.size()) == most) return false;
    picking.sequences.push_back(i);
    picking.rows.push_back(end - 1);
    picking.draws.push_back(*draw);
  }
  return true;
}

void MarkPoisoned(const v1::StepHeader& step, std::span<const uint8_t> finite, KvSlots& slots) {
  for (const v1::SequenceRows& rows : step.rows()) {
    const auto of_sequence = finite.first(rows.row_count());
    finite = finite.subspan(rows.row_count());
    if (std::ranges::find(of_sequence, 0) != of_sequence.end()) {
      slots.next(rows.slot()).Poison(static_cast<int>(rows.start_position()));
    }
  }
}

void AddPickedTokens(const v1::StepHeader& step, const PickingRows& picking,
                     std::span<const int32_t> tokens, KvSlots& slots, v1::StepResult& result) {
  for (const v1::SequenceRows& rows : step.rows()) {
    slots.next(rows.slot()).sampled = 0;
    v1::SequenceResult& sequence = *result.add_sequences();
    sequence.set_slot(rows.slot());
    sequence.set_sequence_id(rows.sequence_id());
    if (slots.next(rows.slot()).poisoned()) SetDataLoss("non-finite activations", sequence);
  }
  for (size_t i = 0; i < tokens.size(); ++i) {
    v1::SequenceResult& sequence = *result.mutable_sequences(picking.sequences[i]);
    if (sequence.status_code() != 0) continue;
    SlotState& slot = slots.next(sequence.slot());
    if (tokens[i] < 0) {
      slot.Poison(KvBlocksFor(slot.length) * kKvBlockPositions);  // its KV is finite
      SetDataLoss("non-finite logits", sequence);
      continue;
    }
    sequence.set_sampled(true);
    sequence.set_token_id(tokens[i]);
    slot.sampled = tokens[i];
    slots.SetPicked(sequence.slot(), tokens[i]);
  }
}

}  // namespace stagecoach
