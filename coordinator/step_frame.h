// Steps as frames, and the frames that come back as results.
#ifndef STAGECOACH_COORDINATOR_STEP_FRAME_H_
#define STAGECOACH_COORDINATOR_STEP_FRAME_H_

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "coordinator/scheduler.h"
#include "kernels/sampling.h"
#include "worker/link/frame.h"

namespace stagecoach {

// What a stage needs to know of a sequence that is opened.
struct SequenceInfo {
  const SamplingParams* sampling = nullptr;
  uint32_t prompt_tokens = 0;
};

// The seed with which a choice samples. The first choice has the request's own, so that it says the
// same whatever the number of choices.
uint64_t ChoiceSeed(uint64_t seed, int choice);

// The frame for stage 0. `info` is asked for the request of each sequence that the step opens.
Frame MakeStepFrame(uint64_t epoch, const Step& step,
                    const std::function<SequenceInfo(RequestId)>& info);

// A step's results, one entry per StepRows.
struct StepOutcome {
  std::vector<RowsResult> results;             // for the scheduler
  std::vector<SampledToken> tokens;            // where the rows sample
  std::vector<std::vector<float>> scores;      // log-probabilities of StepRows::targets
  std::vector<std::span<const float>> logits;  // [rows][vocab], part of the frame's payload
};

// Checks what the last stage sent for `step` against what was asked. A sequence whose result lacks
// something fails alone, with DATA_LOSS. Errors: INVALID_ARGUMENT if the results are not those of
// the step's sequences, or the payload has another size.
absl::StatusOr<StepOutcome> ParseStepResult(const Frame& frame, const Step& step, int vocab_size);

}  // namespace stagecoach

#endif  // STAGECOACH_COORDINATOR_STEP_FRAME_H_
