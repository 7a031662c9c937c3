// The end of a step whose tokens the backend chooses by itself (Backend::EnqueueChoices), so that
// nobody has to wait for it: which rows choose, and the result once it is known what they chose.
#ifndef STAGECOACH_WORKER_CHOSEN_STEP_H_
#define STAGECOACH_WORKER_CHOSEN_STEP_H_

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/sampling.h"
#include "proto/stage.pb.h"
#include "worker/kv_slots.h"

namespace stagecoach {

// One entry for each row that chooses.
struct ChoosingRows {
  std::vector<int> sequences;  // whose last row of the step it is: indices into step.rows()
  std::vector<int32_t> rows;   // of the activation matrix
  std::vector<TokenDraw> draws;
};

// The rows of a step that choose; slots.next() holds the step. False if logits of a row are wanted,
// a token takes more than a draw, or more than `most` rows choose. Sequences whose slot is poisoned
// choose nothing.
bool FindChoosingRows(const v1::StepHeader& step, const KvSlots& slots, int vocab_size, int most,
                      ChoosingRows& choosing);

// Poisons slots.next() of sequences of which a row is not finite. finite: [rows of the step].
void MarkPoisoned(const v1::StepHeader& step, std::span<const uint8_t> finite, KvSlots& slots);

// Appends one SequenceResult for each entry of step.rows(): its token, or DATA_LOSS if its slot is
// poisoned or its token is -1 (which poisons it). tokens: those of `choosing`. What they go on with
// is put into slots.next().
void AddChosenTokens(const v1::StepHeader& step, const ChoosingRows& choosing,
                     std::span<const int32_t> tokens, KvSlots& slots, v1::StepResult& result);

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_CHOSEN_STEP_H_
