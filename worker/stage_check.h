// What a stage demands of a frame before it changes anything.
#ifndef STAGECOACH_WORKER_STAGE_CHECK_H_
#define STAGECOACH_WORKER_STAGE_CHECK_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "model/model_file.h"
#include "worker/kv_slots.h"
#include "worker/link/frame.h"
#include "worker/stage.h"

namespace stagecoach {

// A stage that could exist for this model: INVALID_ARGUMENT names the field.
absl::Status CheckStageConfig(const StageConfig& config, const ModelParams& params);

// Checks all of `frame` and prepares its closes, opens and rows in slots.next(); slots.now() is
// left alone, so that after an error nothing has happened. last_step: the step that was run before
// this. poisoned: set to the blocks to clear because a sequence that is closed may have left
// non-finite values there. Errors: those of Stage::Run.
absl::Status PrepareStep(const StageConfig& config, const ModelParams& params, const Frame& frame,
                         uint64_t last_step, KvSlots& slots, std::vector<int32_t>& poisoned);

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_STAGE_CHECK_H_
