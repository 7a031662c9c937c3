#include "worker/stage_check.h"

#include <algorithm>
#include <span>
#include <string>
#include <vector>

#include "fmt/format.h"
#include "model/status_macros.h"

namespace stagecoach {
namespace {

absl::Status Invalid(const std::string& message) { return absl::InvalidArgumentError(message); }

template <typename T>
std::span<const T> Span(const google::protobuf::RepeatedField<T>& field) {
  return {field.data(), static_cast<size_t>(field.size())};
}

// Written so that NaN is out of range.
bool InRange(float value, float low, float high) { return value >= low && value <= high; }

absl::Status CheckEpochAndStep(const StageConfig& config, const v1::FrameHeader& header,
                               uint64_t last_step) {
  if (header.epoch() != config.epoch) {
    return absl::AbortedError(
        fmt::format("epoch {} where {} is running", header.epoch(), config.epoch));
  }
  if (!header.has_step()) return Invalid("a frame for a stage must carry a step");
  const uint64_t step = header.step().step();
  if (step <= last_step) {
    return absl::AlreadyExistsError(
        fmt::format("step {} was run before; the next one is {}", step, last_step + 1));
  }
  if (step != last_step + 1) {
    return absl::OutOfRangeError(fmt::format("step {} where {} is due", step, last_step + 1));
  }
  return absl::OkStatus();
}

absl::Status CheckTokens(std::span<const int32_t> tokens, const ModelParams& params) {
  for (const int32_t token : tokens) {
    if (token < 0 || token >= params.vocab_size) {
      return Invalid(fmt::format("token id {} outside [0, {})", token, params.vocab_size));
    }
  }
  return absl::OkStatus();
}

// Shapes of the payload, the token ids and the timings, all of which go by the rows.
absl::Status CheckShape(const StageConfig& config, const ModelParams& params, const Frame& frame) {
  const v1::StepHeader& step = frame.header.step();
  const uint32_t d_model = config.stage == 0 ? 0 : static_cast<uint32_t>(params.d_model);
  if (step.d_model() != d_model) {
    return absl::FailedPreconditionError(
        fmt::format("d_model {} where stage {} takes {}", step.d_model(), config.stage, d_model));
  }
  uint64_t rows = 0;  // at most 2^31 entries of less than 2^32 each
  for (const v1::SequenceRows& sequence : step.rows()) rows += sequence.row_count();
  if (rows > static_cast<uint64_t>(config.max_step_tokens)) {
    return Invalid(fmt::format("{} rows; at most {} in a step", rows, config.max_step_tokens));
  }
  if (static_cast<uint64_t>(step.token_ids_size()) != rows) {
    return Invalid(fmt::format("{} token ids for {} rows", step.token_ids_size(), rows));
  }
  STAGECOACH_RETURN_IF_ERROR(CheckTokens(Span(step.token_ids()), params));
  const uint64_t in_frame = frame.payload.values().size(), beside = frame.header.nccl_floats();
  if ((config.device_input ? beside : in_frame) != rows * d_model ||
      (config.device_input ? in_frame : beside) != 0) {
    return Invalid(fmt::format(
        "{} floats in the frame and {} by NCCL where {} rows of {} are due {}", in_frame, beside,
        rows, d_model, config.device_input ? "by NCCL" : "in the frame"));
  }
  if (step.timings_size() != config.stage) {
    return Invalid(fmt::format("{} stage timings at stage {}", step.timings_size(), config.stage));
  }
  return absl::OkStatus();
}

absl::Status CheckSlot(uint32_t slot, const KvSlots& slots) {
  if (slot < static_cast<uint32_t>(slots.size())) return absl::OkStatus();
  return Invalid(fmt::format("slot {} outside [0, {})", slot, slots.size()));
}

absl::Status CheckSampling(const v1::SamplingParams& sampling, const ModelParams& params) {
  if (!InRange(sampling.temperature(), 0, 100)) return Invalid("temperature outside [0, 100]");
  if (!InRange(sampling.top_p(), 0, 1)) return Invalid("top_p outside [0, 1]");
  if (!InRange(sampling.min_p(), 0, 1)) return Invalid("min_p outside [0, 1]");
  if (!InRange(sampling.repetition_penalty(), 0, 100)) {
    return Invalid("repetition_penalty outside [0, 100]");
  }
  if (!InRange(sampling.presence_penalty(), -2, 2)) {
    return Invalid("presence_penalty outside [-2, 2]");
  }
  if (!InRange(sampling.frequency_penalty(), -2, 2)) {
    return Invalid("frequency_penalty outside [-2, 2]");
  }
  if (sampling.logprobs() > kMaxLogprobs) {
    return Invalid(fmt::format("logprobs {}; at most {}", sampling.logprobs(), kMaxLogprobs));
  }
  if (sampling.logit_bias_size() > kMaxLogitBiases) {
    return Invalid(
        fmt::format("{} logit biases; at most {}", sampling.logit_bias_size(), kMaxLogitBiases));
  }
  for (const auto& [token, bias] : sampling.logit_bias()) {
    STAGECOACH_RETURN_IF_ERROR(CheckTokens({&token, 1}, params));
    if (!InRange(bias, -kMaxLogitBias, kMaxLogitBias)) {
      return Invalid(fmt::format("logit bias outside [-{0}, {0}]", kMaxLogitBias));
    }
  }
  return absl::OkStatus();
}

SamplingParams ToSampling(const v1::SamplingParams& sampling) {
  SamplingParams params = {.temperature = sampling.temperature(),
                           .top_k = sampling.top_k(),
                           .top_p = sampling.top_p(),
                           .min_p = sampling.min_p(),
                           .repetition_penalty = sampling.repetition_penalty(),
                           .presence_penalty = sampling.presence_penalty(),
                           .frequency_penalty = sampling.frequency_penalty(),
                           .seed = sampling.seed(),
                           .logprobs = sampling.logprobs()};
  for (const auto& [token, bias] : sampling.logit_bias())
    params.logit_bias.push_back({token, bias});
  return params;
}

absl::Status Close(uint32_t slot, KvSlots& slots) {
  STAGECOACH_RETURN_IF_ERROR(CheckSlot(slot, slots));
  if (!slots.next(slot).open) {
    return absl::NotFoundError(fmt::format("close of slot {}, which is not open", slot));
  }
  slots.Close(slot);
  return absl::OkStatus();
}

absl::Status CheckBlock(uint32_t block, const KvSlots& slots) {
  if (block < static_cast<uint32_t>(slots.kv_blocks())) return absl::OkStatus();
  return Invalid(fmt::format("block {} outside [0, {})", block, slots.kv_blocks()));
}

// A block whose content is about to change.
absl::Status CheckUnused(uint32_t block, const KvSlots& slots) {
  STAGECOACH_RETURN_IF_ERROR(CheckBlock(block, slots));
  if (slots.users(block) == 0) return absl::OkStatus();
  return Invalid(fmt::format("block {} belongs to an open sequence", block));
}

// Clears and copies change only blocks that no sequence has, each of them once.
absl::Status CheckBlockChanges(const v1::StepHeader& step, const KvSlots& slots) {
  for (const uint32_t block : step.clear_blocks()) {
    STAGECOACH_RETURN_IF_ERROR(CheckUnused(block, slots));
  }
  std::vector<uint32_t> written;
  for (const v1::BlockCopy& copy : step.copies()) {
    STAGECOACH_RETURN_IF_ERROR(CheckBlock(copy.from(), slots));
    STAGECOACH_RETURN_IF_ERROR(CheckUnused(copy.to(), slots));
    written.push_back(copy.to());
  }
  std::sort(written.begin(), written.end());
  if (std::adjacent_find(written.begin(), written.end()) != written.end()) {
    return Invalid("two copies to one block");
  }
  for (const v1::BlockCopy& copy : step.copies()) {
    if (std::binary_search(written.begin(), written.end(), copy.from())) {
      return Invalid(fmt::format("block {} is copied from and to", copy.from()));
    }
  }
  return absl::OkStatus();
}

// The blocks and tokens with which a sequence begins.
absl::Status CheckCached(const v1::SequenceOpen& open, const ModelParams& params,
                         const KvSlots& slots) {
  if (open.cached_token_ids_size() > slots.max_context()) {
    return Invalid(fmt::format("{} cached tokens in a context of {}", open.cached_token_ids_size(),
                               slots.max_context()));
  }
  if (open.cached_blocks_size() != KvBlocksFor(open.cached_token_ids_size())) {
    return Invalid(fmt::format("{} blocks for {} cached tokens", open.cached_blocks_size(),
                               open.cached_token_ids_size()));
  }
  for (const uint32_t block : open.cached_blocks()) {
    STAGECOACH_RETURN_IF_ERROR(CheckBlock(block, slots));
  }
  return CheckTokens(Span(open.cached_token_ids()), params);
}

absl::Status Open(const v1::SequenceOpen& open, const ModelParams& params, KvSlots& slots) {
  STAGECOACH_RETURN_IF_ERROR(CheckSlot(open.slot(), slots));
  if (slots.next(open.slot()).open) {
    return Invalid(fmt::format("open of slot {}, which is open already", open.slot()));
  }
  if (open.prompt_tokens() > static_cast<uint32_t>(slots.max_context())) {
    return Invalid(fmt::format("prompt_tokens {} in a context of {}", open.prompt_tokens(),
                               slots.max_context()));
  }
  STAGECOACH_RETURN_IF_ERROR(CheckSampling(open.sampling(), params));
  STAGECOACH_RETURN_IF_ERROR(CheckCached(open, params, slots));
  slots.Open(open.slot(), {.sequence_id = open.sequence_id(),
                           .length = open.cached_token_ids_size(),
                           .sampling = ToSampling(open.sampling()),
                           .prompt_tokens = open.prompt_tokens()});
  slots.AppendBlocks(open.slot(), Span(open.cached_blocks()));
  slots.SetTokens(open.slot(), 0, Span(open.cached_token_ids()));
  return absl::OkStatus();
}

// Targets are those of all rows, or of all but the last one.
absl::Status CheckTargets(const v1::SequenceRows& rows, const ModelParams& params) {
  const uint32_t targets = rows.targets_size();
  if (!rows.logprobs() && targets > 0) return Invalid("targets without logprobs");
  if (rows.logprobs() && targets != rows.row_count() && targets + 1 != rows.row_count()) {
    return Invalid(fmt::format("{} targets for {} rows", targets, rows.row_count()));
  }
  for (const int32_t token : rows.targets()) {
    if (token < 0 || token >= params.vocab_size) {
      return Invalid(fmt::format("target {} outside [0, {})", token, params.vocab_size));
    }
  }
  return absl::OkStatus();
}

// The blocks of rows up to position `end`: exactly those that are missing, and written by this
// sequence alone.
absl::Status ExtendBlocks(const v1::SequenceRows& rows, int end, KvSlots& slots) {
  const SlotState& state = slots.next(rows.slot());
  const int missing = KvBlocksFor(end) - state.block_count;
  if (rows.new_blocks_size() != missing) {
    return Invalid(fmt::format("{} new blocks for slot {} where positions up to {} take {}",
                               rows.new_blocks_size(), rows.slot(), end, missing));
  }
  if (state.length % kKvBlockPositions != 0) {
    const int32_t block = slots.Blocks(rows.slot()).back();
    if (slots.users(block) != 1) {
      return Invalid(
          fmt::format("rows for slot {} into block {}, which is shared", rows.slot(), block));
    }
  }
  for (int i = 0; i < missing; ++i) {
    STAGECOACH_RETURN_IF_ERROR(CheckUnused(rows.new_blocks(i), slots));
    const uint32_t block[] = {rows.new_blocks(i)};
    slots.AppendBlocks(rows.slot(), block);
  }
  return absl::OkStatus();
}

// A row whose token the stage knows better than the sender.
absl::Status CheckAhead(const StageConfig& config, const v1::SequenceRows& rows,
                        std::span<const int32_t> tokens, const SlotState& state) {
  if (config.stages > 1) {
    return Invalid(fmt::format("a row ahead for slot {}: stage {} of {} is not first and last",
                               rows.slot(), config.stage, config.stages));
  }
  if (rows.row_count() != 1 || tokens[0] != 0) {
    return Invalid(
        fmt::format("{} rows ahead for slot {}, the first with token id {}; it is one, "
                    "with token id 0",
                    rows.row_count(), rows.slot(), tokens[0]));
  }
  if (state.samples) return absl::OkStatus();
  return Invalid(
      fmt::format("a row ahead for slot {}, whose rows before sample nothing", rows.slot()));
}

// tokens: from those of the rows on.
absl::Status Extend(const StageConfig& config, const ModelParams& params,
                    const v1::SequenceRows& rows, std::span<const int32_t> tokens, KvSlots& slots) {
  STAGECOACH_RETURN_IF_ERROR(CheckSlot(rows.slot(), slots));
  SlotState& state = slots.next(rows.slot());
  if (!state.open || state.sequence_id != rows.sequence_id()) {
    return absl::NotFoundError(
        fmt::format("slot {} does not hold sequence {}", rows.slot(), rows.sequence_id()));
  }
  if (state.has_rows) return Invalid(fmt::format("slot {} twice in one step", rows.slot()));
  if (rows.row_count() == 0) return Invalid(fmt::format("no rows for slot {}", rows.slot()));
  if (rows.start_position() != static_cast<uint32_t>(state.length)) {
    return absl::OutOfRangeError(fmt::format("rows from position {} for slot {}, whose KV has {}",
                                             rows.start_position(), rows.slot(), state.length));
  }
  const uint64_t end = uint64_t{rows.start_position()} + rows.row_count();
  if (end > static_cast<uint64_t>(slots.max_context())) {
    return absl::OutOfRangeError(
        fmt::format("rows up to position {} in a context of {}", end, slots.max_context()));
  }
  STAGECOACH_RETURN_IF_ERROR(CheckTargets(rows, params));
  if (rows.ahead()) STAGECOACH_RETURN_IF_ERROR(CheckAhead(config, rows, tokens, state));
  STAGECOACH_RETURN_IF_ERROR(ExtendBlocks(rows, static_cast<int>(end), slots));
  state.length = static_cast<int>(end);
  state.has_rows = true;
  state.samples = rows.sample();
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckStageConfig(const StageConfig& config, const ModelParams& params) {
  if (config.stages < 1 || config.stages > params.layers) {
    return Invalid(fmt::format("{} stages for {} layers", config.stages, params.layers));
  }
  if (config.stage < 0 || config.stage >= config.stages) {
    return Invalid(fmt::format("stage {} of {}", config.stage, config.stages));
  }
  const bool range_ok = config.first_layer >= 0 && config.first_layer < config.last_layer &&
                        config.last_layer <= params.layers;
  const bool first_ok = (config.stage == 0) == (config.first_layer == 0);
  const bool last_ok = (config.stage == config.stages - 1) == (config.last_layer == params.layers);
  if (!range_ok || !first_ok || !last_ok) {
    return Invalid(fmt::format("layers [{}, {}) of {} for stage {} of {}", config.first_layer,
                               config.last_layer, params.layers, config.stage, config.stages));
  }
  if ((config.device_input && config.stage == 0) ||
      (config.device_output && config.stage == config.stages - 1)) {
    return Invalid(fmt::format("NCCL between stage {} of {} and the coordinator, which has no GPU",
                               config.stage, config.stages));
  }
  if (config.max_slots < 1 || config.max_slots > kMaxSlots) {
    return Invalid(fmt::format("max_slots {} outside [1, {}]", config.max_slots, kMaxSlots));
  }
  if (config.max_context < 1 || config.max_context > kMaxContextLength) {
    return Invalid(
        fmt::format("max_context {} outside [1, {}]", config.max_context, kMaxContextLength));
  }
  if (config.kv_blocks < 1) return Invalid(fmt::format("kv_blocks {}", config.kv_blocks));
  if (config.max_step_tokens < 1 || config.max_step_tokens > kMaxStepTokens) {
    return Invalid(
        fmt::format("max_step_tokens {} outside [1, {}]", config.max_step_tokens, kMaxStepTokens));
  }
  return absl::OkStatus();
}

absl::Status PrepareStep(const StageConfig& config, const ModelParams& params, const Frame& frame,
                         uint64_t last_step, KvSlots& slots, std::vector<int32_t>& poisoned) {
  STAGECOACH_RETURN_IF_ERROR(CheckEpochAndStep(config, frame.header, last_step));
  STAGECOACH_RETURN_IF_ERROR(CheckShape(config, params, frame));
  const v1::StepHeader& step = frame.header.step();
  slots.Begin();
  for (const uint32_t slot : step.close()) STAGECOACH_RETURN_IF_ERROR(Close(slot, slots));
  poisoned.clear();
  for (const uint32_t slot : step.close()) slots.CollectPoisoned(slot, poisoned);
  STAGECOACH_RETURN_IF_ERROR(CheckBlockChanges(step, slots));
  for (const v1::SequenceOpen& open : step.open()) {
    STAGECOACH_RETURN_IF_ERROR(Open(open, params, slots));
  }
  std::span<const int32_t> tokens = Span(step.token_ids());
  for (const v1::SequenceRows& rows : step.rows()) {
    STAGECOACH_RETURN_IF_ERROR(Extend(config, params, rows, tokens, slots));
    tokens = tokens.subspan(rows.row_count());
  }
  return absl::OkStatus();
}

}  // namespace stagecoach
