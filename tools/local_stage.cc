#include "tools/local_stage.h"

#include <algorithm>
#include <utility>

#include "kernels/device.h"
#include "worker/kv_slots.h"

namespace stagecoach {

absl::StatusOr<std::unique_ptr<Backend>> OpenDeviceFlag(const std::string& device, int threads) {
  auto backend = OpenDevice(device, {.threads = threads});
  if (!backend.ok()) return absl::InvalidArgumentError(backend.status().message());
  return backend;
}

absl::StatusOr<std::unique_ptr<LocalStages>> LocalStages::Create(
    std::shared_ptr<const ModelFile> model, const LocalStageOptions& options) {
  auto local = std::make_unique<LocalStages>();
  auto opened = OpenDeviceFlag(options.device, options.threads);
  if (!opened.ok()) return opened.status();
  local->backend_ = *std::move(opened);
  Backend* const backend = local->backend_.get();
  const int layers = model->params().layers;
  for (int i = 0; i < options.stages; ++i) {
    StageConfig config;
    config.epoch = 1;
    config.stage = i;
    config.stages = options.stages;
    config.first_layer = layers * i / options.stages;
    config.last_layer = layers * (i + 1) / options.stages;
    config.max_context = options.max_context;
    config.kv_blocks = KvBlocksFor(options.max_context);
    config.max_step_tokens = options.max_step_tokens;
    config.kv_type = options.kv_type;
    Member member;
    member.store = std::make_unique<LayerStore>(backend, model, options.store);
    member.store->Assign(StageUnits(model->params(), config.first_layer, config.last_layer));
    auto stage = Stage::Create(backend, model, member.store.get(), config);
    if (!stage.ok()) return stage.status();
    member.stage = *std::move(stage);
    local->members_.push_back(std::move(member));
  }
  return local;
}

absl::StatusOr<int32_t> LocalStages::Begin(std::span<const int32_t> token_ids) {
  ++sequence_;
  position_ = 0;
  return Step(token_ids, /*open=*/true);
}

absl::StatusOr<int32_t> LocalStages::Continue(std::span<const int32_t> token_ids) {
  return Step(token_ids, /*open=*/false);
}

absl::StatusOr<int32_t> LocalStages::Step(std::span<const int32_t> token_ids, bool open) {
  Frame frame;
  frame.header.set_epoch(1);
  v1::StepHeader& step = *frame.header.mutable_step();
  step.set_step(++steps_);
  if (open) {
    if (sequence_ > 1) step.add_close(0);
    v1::SequenceOpen& opened = *step.add_open();
    opened.set_sequence_id(sequence_);
    opened.set_prompt_tokens(static_cast<uint32_t>(token_ids.size()));
  }
  v1::SequenceRows& rows = *step.add_rows();
  rows.set_sequence_id(sequence_);
  rows.set_start_position(static_cast<uint32_t>(position_));
  rows.set_row_count(static_cast<uint32_t>(token_ids.size()));
  rows.set_sample(true);
  const auto end = static_cast<int>(position_ + token_ids.size());
  for (int block = KvBlocksFor(static_cast<int>(position_)); block < KvBlocksFor(end); ++block) {
    rows.add_new_blocks(static_cast<uint32_t>(block));
  }
  step.mutable_token_ids()->Assign(token_ids.begin(), token_ids.end());
  for (Member& member : members_) {
    auto next = member.stage->Run(frame);
    if (!next.ok()) return next.status();
    frame = *std::move(next);
  }
  position_ += token_ids.size();
  return frame.header.result().sequences(0).token_id();
}

double LocalStages::compute_seconds() const {
  double seconds = 0;
  for (const Member& member : members_) seconds += member.stage->compute_seconds();
  return seconds;
}

std::vector<int32_t> MakeTestPrompt(const ModelParams& params, int length) {
  std::vector<int32_t> prompt;
  for (int i = 0; i < length; ++i) {
    prompt.push_back(static_cast<int32_t>(3 + (i * 7919LL) % std::max(1, params.vocab_size - 3)));
  }
  return prompt;
}

}  // namespace stagecoach
