// The end of a step whose tokens the backend picks by itself (Backend::EnqueuePicks), so that
// nobody has to wait for it: for which rows, and the result once it is known what was picked.
#ifndef STAGECOACH_WORKER_PICKED_STEP_H_
#define STAGECOACH_WORKER_PICKED_STEP_H_

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/sampling.h"
#include "proto/stage.pb.h"
#include "worker/kv_slots.h"

namespace stagecoach {

// One entry for each row for which a token is picked.
struct PickingRows {
  std::vector<int> sequences;  // whose last row of the step it is: indices into step.rows()
  std::vector<int32_t> rows;   // of the activation matrix
  std::vector<TokenDraw> draws;
};

// Those of a step; slots.next() holds the step. False if logits of a row are wanted, a token takes
// more than a draw, or there are more than `most`. None for sequences whose slot is poisoned.
bool FindPickingRows(const v1::StepHeader& step, const KvSlots& slots, int vocab_size, int most,
                     PickingRows& picking);

// Poisons slots.next() of sequences of which a row is not finite. finite: [rows of the step].
void MarkPoisoned(const v1::StepHeader& step, std::span<const uint8_t> finite, KvSlots& slots);

// Appends one SequenceResult for each entry of step.rows(): its token, or DATA_LOSS if its slot is
// poisoned or its token is -1 (which poisons it). tokens: those of `picking`. What they go on with
// is put into slots.next().
void AddPickedTokens(const v1::StepHeader& step, const PickingRows& picking,
                     std::span<const int32_t> tokens, KvSlots& slots, v1::StepResult& result);

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_PICKED_STEP_H_
