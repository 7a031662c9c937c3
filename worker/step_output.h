// What the last stage makes of a step: sampled tokens, scores and raw logits.
#ifndef STAGECOACH_WORKER_STEP_OUTPUT_H_
#define STAGECOACH_WORKER_STEP_OUTPUT_H_

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "proto/stage.pb.h"
#include "worker/kv_slots.h"

namespace stagecoach {

// Rows that go through the head at once: bounds the logits held, [kHeadRows][vocab].
inline constexpr int kHeadRows = 32;

// Not thread-safe. Allocates nothing after the constructor but what it returns.
class StepOutput {
 public:
  // `backend` and `workspace` must outlive this object.
  StepOutput(Backend* backend, Workspace* workspace, int vocab_size, int max_step_tokens);

  // Appends one SequenceResult for each entry of step.rows(), in order, to `result`, and the raw
  // logits asked for to `payload`. A sequence whose slot is poisoned, or whose logits are not
  // finite (which poisons its slot), gets DATA_LOSS and nothing else.
  // Errors: those of Backend::Head.
  absl::Status Run(const UnitWeights& head, const v1::StepHeader& step, KvSlots& slots,
                   v1::StepResult& result, std::vector<float>& payload);

 private:
  // What of the logits comes to the host: all, the best, or what a draw chooses.
  enum class Take { kAll, kTop, kDraw };
  // A row that must go through the head.
  struct HeadRow {
    int sequence;  // index into step.rows()
    int index;     // of the row within the sequence
    int number;    // of the row in the activation matrix
    Take take;
    int top_logits;  // kTop: how many
    bool may_fail;   // kTop: those may not suffice (BestMayDecide)
    TokenDraw draw;  // kDraw
  };
  // Alike ones together. Those that the best logits do not decide come again at the end.
  void ListRows(const v1::StepHeader& step, const KvSlots& slots);
  // Of the row, as little as decides what is wanted of it.
  HeadRow Choose(const v1::SequenceRows& rows, int sequence, int index, const KvSlots& slots) const;
  // Rows [first, first + count) of rows_, all of them to be taken alike.
  absl::Status RunFull(const UnitWeights& head, const v1::StepHeader& step, size_t first,
                       size_t count, KvSlots& slots, v1::StepResult& result,
                       std::vector<float>& payload);
  absl::Status RunTop(const UnitWeights& head, const v1::StepHeader& step, size_t first,
                      size_t count, KvSlots& slots, v1::StepResult& result,
                      std::vector<float>& payload);
  absl::Status RunDraw(const UnitWeights& head, const v1::StepHeader& step, size_t first,
                       size_t count, KvSlots& slots, v1::StepResult& result,
                       std::vector<float>& payload);
  // The token that a row's sequence goes on with, or why there is none.
  void SetToken(const HeadRow& row, const absl::StatusOr<int32_t>& token,
                const v1::StepHeader& step, KvSlots& slots, v1::StepResult& result,
                std::vector<float>& payload);
  // Samples, scores and copies the logits of one row, as its sequence asks for.
  absl::Status Consume(const v1::SequenceRows& rows, int index, std::span<const float> logits,
                       const KvSlots& slots, v1::SequenceResult& result,
                       std::vector<float>& payload) const;

  Backend* const backend_;
  Workspace* const workspace_;
  const size_t vocab_size_;
  std::vector<HeadRow> rows_;
  std::vector<int32_t> row_numbers_;  // of rows_
  std::vector<float> logits_;         // [kHeadRows][vocab]
  std::vector<TopLogit> top_;         // [kHeadRows][most that one of them wants]
  std::vector<uint64_t> totals_;      // [kHeadRows]
  std::vector<TokenDraw> draws_;      // [kHeadRows], and what they chose:
  std::vector<int32_t> drawn_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_STEP_OUTPUT_H_
