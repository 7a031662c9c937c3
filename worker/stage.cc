#include "worker/stage.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "fmt/format.h"
#include "model/checked_math.h"
#include "model/status_macros.h"
#include "worker/kv_slots.h"
#include "worker/picked_step.h"
#include "worker/stage_check.h"
#include "worker/stage_clock.h"
#include "worker/step_output.h"

namespace stagecoach {
namespace {

KvShape StageKvShape(const StageConfig& config, const ModelParams& params) {
  return {.layers = config.last_layer - config.first_layer,
          .kv_heads = params.kv_heads,
          .key_length = params.key_length,
          .value_length = params.value_length,
          .blocks = config.kv_blocks,
          .type = config.kv_type};
}

// Refuses before anything is allocated what the device has no room for.
absl::Status CheckMemory(const BackendInfo& info, const KvShape& kv, uint64_t weight_bytes) {
  const uint64_t kv_bytes = KvBytes(kv);
  const std::optional<uint64_t> wanted = CheckedAdd(kv_bytes, weight_bytes);
  if (wanted && (info.memory_bytes == 0 || *wanted <= info.memory_bytes)) return absl::OkStatus();
  return absl::ResourceExhaustedError(fmt::format(
      "{} bytes of KV and {} bytes of weights do not fit in {} bytes; fewer KV blocks or more "
      "stages would help",
      kv_bytes, weight_bytes, info.memory_bytes));
}

uint32_t SaturatedSum(uint32_t a, uint32_t b) { return a > UINT32_MAX - b ? UINT32_MAX : a + b; }

static_assert(kReceiving >= kStepsInFlight, "a step must not wait for room to ask for its input");

}  // namespace

class Stage::Impl {
 public:
  Impl(Backend* backend, std::shared_ptr<const ModelFile> model, LayerStore* store,
       const StageConfig& config, std::unique_ptr<KvCache> kv,
       std::unique_ptr<Workspace> workspace);

  absl::StatusOr<Submitted> Submit(const Frame& frame);
  int pending() const { return static_cast<int>(pending_.size()); }
  absl::StatusOr<bool> Ready();
  absl::StatusOr<std::optional<Frame>> Finish();
  absl::StatusOr<ChannelMemory> ChannelMemoryOfResidual();
  void SetChannels(DeviceChannel* input, DeviceChannel* output) {
    input_channel_ = input;
    output_channel_ = output;
  }

  const StageConfig config_;
  std::atomic<uint64_t> steps_ = 0;
  std::atomic<uint64_t> tokens_ = 0;
  StageClock clock_;

 private:
  // Who waits for the end of a step.
  enum class End {
    kAwaited,  // Submit
    kPicks,    // Finish; the device picks its tokens
    kLeaves,   // Finish; the device sends its activations on, and the frame is under way before
  };
  // A step that was submitted.
  struct Pending {
    End end = End::kAwaited;
    std::optional<Frame> frame;  // kAwaited: for the next hop
    v1::StepHeader step;         // else
    PickingRows picking;
    int rows = 0;
    uint64_t payload = 0;  // its input is the channel's payload of this number; 0: it has come
    StageClock::Step time;
  };

  bool first() const { return config_.stage == 0; }
  bool last() const { return config_.stage == config_.stages - 1; }

  absl::StatusOr<UnitLease> Acquire(const Unit& unit);    // a stall
  absl::Status ChangeBlocks(const v1::StepHeader& step);  // clears and copies
  void MakeBatch(const v1::StepHeader& step);
  int32_t TokenAhead(int slot) const;  // of a row ahead
  bool AllResident();
  End EndOf(const v1::StepHeader& step, PickingRows& picking);
  absl::Status TakeActivations(const Frame& frame, Pending& pending);
  absl::Status RunLayers(const Frame& frame, Pending& pending);
  // Non-finite rows poison the slots of their sequences: both say which these are.
  absl::Status GetResidual(const v1::StepHeader& step, std::span<float> residual);
  absl::Status LeaveResidual(const v1::StepHeader& step);  // where it lies
  absl::Status SendActivations();
  Frame BeginActivations(const v1::StepHeader& step) const;
  absl::StatusOr<Frame> MakeActivations(const Frame& frame);
  absl::StatusOr<Frame> SendAhead(const v1::StepHeader& step);  // kLeaves
  Frame BeginResult(const v1::StepHeader& step) const;
  absl::StatusOr<Frame> MakeResult(const Frame& frame);
  bool FitsBehind(End end, const v1::StepHeader& step);  // those that are pending
  absl::Status EnqueuePicks(const v1::StepHeader& step, Pending& pending);
  absl::StatusOr<std::optional<Frame>> AwaitEnd(const Pending& pending);

  Backend* const backend_;
  const std::shared_ptr<const ModelFile> model_;
  LayerStore* const store_;
  const ModelParams& params_;

  const std::unique_ptr<KvCache> kv_;
  const std::unique_ptr<Workspace> workspace_;
  KvSlots slots_;
  std::optional<StepOutput> output_;  // last stage only

  uint64_t last_step_ = 0;
  bool resident_ = false;                       // all units are, and stay so
  std::vector<int32_t> cleared_;                // blocks, before the rows of this step
  std::vector<KvBlockCopy> copies_;             // likewise
  std::vector<BatchSequence> batch_sequences_;  // of this step
  std::vector<int32_t> token_ids_;              // of its rows, those of rows ahead filled in
  StepBatch batch_;
  std::deque<Pending> pending_;  // at most kStepsInFlight; more than one only not kAwaited
  uint64_t payloads_ = 0;        // asked for, ever
  v1::StageTiming untold_;       // of steps that have ended, whose frames were gone by then
  std::vector<int> pick_of_;     // [slot]: its draw in the step submitted last, or -1
  std::vector<uint8_t> finite_;  // [max_step_tokens], whether each row is
  std::vector<float> residual_;  // last stage, if it has to look itself: [max_step_tokens][d_model]
  DeviceChannel* input_channel_ = nullptr;
  DeviceChannel* output_channel_ = nullptr;
};

Stage::Impl::Impl(Backend* backend, std::shared_ptr<const ModelFile> model, LayerStore* store,
                  const StageConfig& config, std::unique_ptr<KvCache> kv,
                  std::unique_ptr<Workspace> workspace)
    : config_(config),
      backend_(backend),
      model_(std::move(model)),
      store_(store),
      params_(model_->params()),
      kv_(std::move(kv)),
      workspace_(std::move(workspace)),
      slots_(config.max_slots, config.max_context, config.kv_blocks, /*keep_history=*/last()) {
  batch_sequences_.reserve(std::min(config.max_slots, config.max_step_tokens));
  token_ids_.reserve(config.max_step_tokens);
  pick_of_.resize(config.max_slots, -1);
  finite_.resize(config.max_step_tokens);
  if (!last()) return;
  output_.emplace(backend_, workspace_.get(), params_.vocab_size, config.max_step_tokens);
  if (backend_->residual_memory(*workspace_).data == nullptr) {
    residual_.resize(static_cast<size_t>(config.max_step_tokens) * params_.d_model);
  }
}

absl::StatusOr<Stage::Submitted> Stage::Impl::Submit(const Frame& frame) {
  Pending pending = {.time = clock_.Begin()};
  STAGECOACH_RETURN_IF_ERROR(PrepareStep(config_, params_, frame, last_step_, slots_, cleared_));
  const v1::StepHeader& step = frame.header.step();
  pending.end = EndOf(step, pending.picking);
  if (!pending_.empty() && !FitsBehind(pending.end, step)) return Submitted();
  STAGECOACH_RETURN_IF_ERROR(ChangeBlocks(step));
  MakeBatch(step);
  STAGECOACH_RETURN_IF_ERROR(RunLayers(frame, pending));
  Submitted submitted = {.taken = true};
  if (pending.end == End::kAwaited) {
    STAGECOACH_ASSIGN_OR_RETURN(pending.frame, last() ? MakeResult(frame) : MakeActivations(frame));
  } else if (pending.end == End::kPicks) {
    STAGECOACH_RETURN_IF_ERROR(EnqueuePicks(step, pending));
  } else {
    STAGECOACH_ASSIGN_OR_RETURN(submitted.frame, SendAhead(step));
  }
  if (pending.end != End::kAwaited) pending.step = step;
  pending.rows = batch_.rows;
  slots_.Commit();
  pending_.push_back(std::move(pending));
  last_step_ = step.step();
  return submitted;
}

absl::StatusOr<bool> Stage::Impl::Ready() {
  if (pending_.front().frame) return true;
  if (input_channel_ != nullptr) {
    STAGECOACH_ASSIGN_OR_RETURN(const uint64_t received, input_channel_->Received());
    for (Pending& step : pending_) {
      if (step.payload == 0 || step.payload > received) continue;
      step.payload = 0;
      clock_.BeginAnew(step.time, /*waited=*/&step == &pending_.front());
    }
  }
  return backend_->EndReady(*workspace_);
}

absl::StatusOr<std::optional<Frame>> Stage::Impl::Finish() {
  Pending pending = std::move(pending_.front());
  pending_.pop_front();
  if (pending.end != End::kAwaited) {
    STAGECOACH_ASSIGN_OR_RETURN(pending.frame, AwaitEnd(pending));
  }
  const v1::StageTiming timing = clock_.End(pending.time);
  if (!pending.frame) {
    untold_.set_compute_us(SaturatedSum(untold_.compute_us(), timing.compute_us()));
    untold_.set_wait_us(SaturatedSum(untold_.wait_us(), timing.wait_us()));
  } else if (v1::FrameHeader& header = pending.frame->header; header.has_step()) {
    *header.mutable_step()->add_timings() = timing;
  } else {
    *header.mutable_result()->add_timings() = timing;
  }
  steps_ += 1;
  tokens_ += pending.rows;
  return std::move(pending.frame);
}

absl::StatusOr<UnitLease> Stage::Impl::Acquire(const Unit& unit) {
  const auto start = StageClock::Clock::now();
  absl::StatusOr<UnitLease> lease = store_->Acquire(unit);
  clock_.Stalled(start);
  return lease;
}

absl::Status Stage::Impl::ChangeBlocks(const v1::StepHeader& step) {
  cleared_.insert(cleared_.end(), step.clear_blocks().begin(), step.clear_blocks().end());
  if (!cleared_.empty()) STAGECOACH_RETURN_IF_ERROR(backend_->ClearKvBlocks(*kv_, cleared_));
  if (step.copies().empty()) return absl::OkStatus();
  copies_.clear();
  for (const v1::BlockCopy& copy : step.copies()) {
    copies_.push_back(
        {.from = static_cast<int32_t>(copy.from()), .to = static_cast<int32_t>(copy.to())});
  }
  return backend_->CopyKvBlocks(*kv_, copies_);
}

void Stage::Impl::MakeBatch(const v1::StepHeader& step) {
  batch_sequences_.clear();
  token_ids_.assign(step.token_ids().begin(), step.token_ids().end());
  int row = 0;
  for (const v1::SequenceRows& rows : step.rows()) {
    const int slot = static_cast<int>(rows.slot());
    const int count = static_cast<int>(rows.row_count());
    batch_sequences_.push_back({.first_row = row,
                                .row_count = count,
                                .start_position = static_cast<int>(rows.start_position()),
                                .blocks = slots_.Blocks(slot)});
    if (rows.ahead()) token_ids_[row] = TokenAhead(slot);
    slots_.SetTokens(slot, rows.start_position(),
                     {token_ids_.data() + row, static_cast<size_t>(count)});
    row += count;
  }
  batch_ = {.sequences = batch_sequences_, .rows = row};
}

int32_t Stage::Impl::TokenAhead(int slot) const {
  const bool picked = !pending_.empty() && pick_of_[slot] >= 0;
  return picked ? PickOf(pick_of_[slot]) : slots_.next(slot).sampled;
}

absl::StatusOr<ChannelMemory> Stage::Impl::ChannelMemoryOfResidual() {
  const ResidualMemory memory = backend_->residual_memory(*workspace_);
  if (memory.data == nullptr) {
    return absl::FailedPreconditionError(
        fmt::format("the {} backend keeps its activations to itself: use --transport grpc",
                    backend_->info().kind));
  }
  return ChannelMemory{.data = memory.data,
                       .floats = static_cast<size_t>(config_.max_step_tokens) * params_.d_model,
                       .stream = memory.stream,
                       .spoiled = memory.spoiled,
                       .device = memory.device};
}

// If the host is going to wait for the step's end, or for memory that earlier ones free, it waits
// for the input here: with a deadline, and until it is told to give up.
absl::Status Stage::Impl::TakeActivations(const Frame& frame, Pending& pending) {
  if (!config_.device_input) return backend_->SetResidual(*workspace_, frame.payload.values());
  STAGECOACH_RETURN_IF_ERROR(
      input_channel_->Receive(static_cast<size_t>(batch_.rows) * params_.d_model));
  pending.payload = ++payloads_;
  if (pending.end == End::kAwaited || !AllResident()) {
    const auto start = StageClock::Clock::now();
    STAGECOACH_RETURN_IF_ERROR(input_channel_->AwaitReceived());
    clock_.Stalled(start);
    pending.payload = 0;
  }
  return backend_->TakeResidual(*workspace_, batch_.rows);
}

absl::Status Stage::Impl::RunLayers(const Frame& frame, Pending& pending) {
  if (batch_.rows == 0) return absl::OkStatus();
  if (first()) {
    STAGECOACH_ASSIGN_OR_RETURN(const UnitLease embedding,
                                Acquire({.kind = Unit::Kind::kEmbedding}));
    STAGECOACH_RETURN_IF_ERROR(backend_->Embed(*workspace_, *embedding, token_ids_));
  } else {
    STAGECOACH_RETURN_IF_ERROR(TakeActivations(frame, pending));
  }
  for (int layer = config_.first_layer; layer < config_.last_layer; ++layer) {
    STAGECOACH_ASSIGN_OR_RETURN(const UnitLease weights,
                                Acquire({.kind = Unit::Kind::kLayer, .layer = layer}));
    STAGECOACH_RETURN_IF_ERROR(
        backend_->RunLayer(*workspace_, *weights, *kv_, layer - config_.first_layer, batch_));
  }
  return absl::OkStatus();
}

absl::Status Stage::Impl::GetResidual(const v1::StepHeader& step, std::span<float> residual) {
  STAGECOACH_RETURN_IF_ERROR(backend_->GetResidual(*workspace_, residual));
  const size_t d_model = params_.d_model;
  for (int row = 0; row < batch_.rows; ++row) {
    finite_[row] = AllFinite(residual.subspan(row * d_model, d_model));
  }
  MarkPoisoned(step, {finite_.data(), static_cast<size_t>(batch_.rows)}, slots_);
  return absl::OkStatus();
}

absl::Status Stage::Impl::LeaveResidual(const v1::StepHeader& step) {
  const std::span<uint8_t> finite(finite_.data(), batch_.rows);
  STAGECOACH_RETURN_IF_ERROR(backend_->LeaveResidual(*workspace_, finite));
  MarkPoisoned(step, finite, slots_);
  return absl::OkStatus();
}

absl::Status Stage::Impl::SendActivations() {
  return output_channel_->Send(static_cast<size_t>(batch_.rows) * params_.d_model);
}

Frame Stage::Impl::BeginActivations(const v1::StepHeader& step) const {
  Frame out;
  out.header.set_epoch(config_.epoch);
  *out.header.mutable_step() = step;
  out.header.mutable_step()->set_d_model(static_cast<uint32_t>(params_.d_model));
  if (config_.device_output) {
    out.header.set_nccl_floats(static_cast<size_t>(batch_.rows) * params_.d_model);
  }
  return out;
}

absl::StatusOr<Frame> Stage::Impl::MakeActivations(const Frame& frame) {
  const v1::StepHeader& step = frame.header.step();
  Frame out = BeginActivations(step);
  if (batch_.rows == 0) return out;
  if (config_.device_output) {
    STAGECOACH_RETURN_IF_ERROR(LeaveResidual(step));
    const auto start = StageClock::Clock::now();
    STAGECOACH_RETURN_IF_ERROR(SendActivations());
    clock_.Stalled(start);
    return out;
  }
  std::vector<float> residual(static_cast<size_t>(batch_.rows) * params_.d_model);
  STAGECOACH_RETURN_IF_ERROR(GetResidual(step, residual));
  out.payload = Payload(std::move(residual));
  return out;
}

// The frame tells what is known by now: the next stage can make ready meanwhile.
absl::StatusOr<Frame> Stage::Impl::SendAhead(const v1::StepHeader& step) {
  STAGECOACH_RETURN_IF_ERROR(backend_->EnqueueResidual(*workspace_));
  STAGECOACH_RETURN_IF_ERROR(SendActivations());
  Frame out = BeginActivations(step);
  *out.header.mutable_step()->add_timings() = std::exchange(untold_, {});
  return out;
}

Frame Stage::Impl::BeginResult(const v1::StepHeader& step) const {
  Frame out;
  out.header.set_epoch(config_.epoch);
  v1::StepResult& result = *out.header.mutable_result();
  result.set_step(step.step());
  result.set_vocab(static_cast<uint32_t>(params_.vocab_size));
  *result.mutable_timings() = step.timings();
  return out;
}

absl::StatusOr<Frame> Stage::Impl::MakeResult(const Frame& frame) {
  const v1::StepHeader& step = frame.header.step();
  Frame out = BeginResult(step);
  if (batch_.rows == 0) return out;
  if (residual_.empty()) {
    STAGECOACH_RETURN_IF_ERROR(LeaveResidual(step));
  } else {
    const size_t floats = static_cast<size_t>(batch_.rows) * params_.d_model;
    STAGECOACH_RETURN_IF_ERROR(GetResidual(step, {residual_.data(), floats}));
  }
  STAGECOACH_ASSIGN_OR_RETURN(const UnitLease head, Acquire({.kind = Unit::Kind::kHead}));
  std::vector<float> logits;
  v1::StepResult& result = *out.header.mutable_result();
  STAGECOACH_RETURN_IF_ERROR(output_->Run(*head, step, slots_, result, logits));
  for (const v1::SequenceResult& sequence : result.sequences()) {
    slots_.next(sequence.slot()).sampled = sequence.token_id();
  }
  out.payload = Payload(std::move(logits));
  return out;
}

Stage::Impl::End Stage::Impl::EndOf(const v1::StepHeader& step, PickingRows& picking) {
  const int most = backend_->MaxPicks();
  if (most == 0 || step.rows().empty()) return End::kAwaited;
  if (!last()) return config_.device_output ? End::kLeaves : End::kAwaited;
  const bool picks = FindPickingRows(step, slots_, params_.vocab_size, most, picking);
  return picks ? End::kPicks : End::kAwaited;
}

bool Stage::Impl::AllResident() {
  if (!resident_) {
    const std::vector<UnitState> states = store_->States();
    resident_ = std::ranges::count(states, UnitState::kResident) == std::ssize(states);
  }
  return resident_;
}

// What a pending step may yet find out (that a sequence is poisoned) must not be needed for this
// one. Nor must results that are ready wait while this one waits for weights.
bool Stage::Impl::FitsBehind(End end, const v1::StepHeader& step) {
  if (end == End::kAwaited || pending() == kStepsInFlight || !step.copies().empty() ||
      !AllResident()) {
    return false;
  }
  return std::ranges::none_of(pending_, [&](const Pending& pending) {
    return pending.frame || std::ranges::any_of(pending.step.rows(), [&](const auto& rows) {
             return std::ranges::find(step.close(), rows.slot()) != step.close().end();
           });
  });
}

absl::Status Stage::Impl::EnqueuePicks(const v1::StepHeader& step, Pending& pending) {
  STAGECOACH_ASSIGN_OR_RETURN(const UnitLease head, Acquire({.kind = Unit::Kind::kHead}));
  const PickingRows& picking = pending.picking;
  STAGECOACH_RETURN_IF_ERROR(
      backend_->EnqueuePicks(*workspace_, *head, picking.rows, picking.draws));
  std::ranges::fill(pick_of_, -1);
  for (size_t i = 0; i < picking.sequences.size(); ++i) {
    pick_of_[step.rows(picking.sequences[i]).slot()] = static_cast<int>(i);
  }
  return absl::OkStatus();
}

// On what a later step has left: that one may have been submitted, and goes on with these tokens.
absl::StatusOr<std::optional<Frame>> Stage::Impl::AwaitEnd(const Pending& pending) {
  std::vector<int32_t> tokens(pending.picking.draws.size());
  const std::span<uint8_t> finite(finite_.data(), pending.rows);
  STAGECOACH_RETURN_IF_ERROR(backend_->AwaitEnd(*workspace_, tokens, finite));
  std::optional<Frame> out;
  slots_.Begin();
  MarkPoisoned(pending.step, finite, slots_);
  if (pending.end == End::kPicks) {
    out = BeginResult(pending.step);
    AddPickedTokens(pending.step, pending.picking, tokens, slots_, *out->header.mutable_result());
  }
  slots_.Commit();
  return out;
}

absl::StatusOr<std::unique_ptr<Stage>> Stage::Create(Backend* backend,
                                                     std::shared_ptr<const ModelFile> model,
                                                     LayerStore* store, StageConfig config) {
  const ModelParams& params = model->params();
  STAGECOACH_RETURN_IF_ERROR(CheckStageConfig(config, params));
  for (const Unit& unit : StageUnits(params, config.first_layer, config.last_layer)) {
    for (const UnitTensor& entry : model->UnitTensors(unit)) {
      STAGECOACH_RETURN_IF_ERROR(backend->CheckTensor(entry.role, *entry.tensor));
    }
  }
  STAGECOACH_ASSIGN_OR_RETURN(const uint64_t weight_bytes, store->WeightBytes());
  const KvShape kv_shape = StageKvShape(config, params);
  STAGECOACH_RETURN_IF_ERROR(CheckMemory(backend->info(), kv_shape, weight_bytes));
  STAGECOACH_ASSIGN_OR_RETURN(auto kv, backend->NewKvCache(kv_shape));
  STAGECOACH_ASSIGN_OR_RETURN(auto workspace,
                              backend->NewWorkspace(params, config.max_step_tokens));
  return std::unique_ptr<Stage>(new Stage(std::make_unique<Impl>(
      backend, std::move(model), store, config, std::move(kv), std::move(workspace))));
}

Stage::Stage(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Stage::~Stage() = default;
absl::StatusOr<Stage::Submitted> Stage::Submit(const Frame& frame) { return impl_->Submit(frame); }
int Stage::pending() const { return impl_->pending(); }
absl::StatusOr<bool> Stage::Ready() { return impl_->Ready(); }
absl::StatusOr<std::optional<Frame>> Stage::Finish() { return impl_->Finish(); }
absl::StatusOr<Frame> Stage::Run(const Frame& frame) {
  STAGECOACH_ASSIGN_OR_RETURN(Submitted submitted, Submit(frame));
  STAGECOACH_ASSIGN_OR_RETURN(std::optional<Frame> finished, Finish());
  return *std::move(finished ? finished : submitted.frame);
}
absl::StatusOr<ChannelMemory> Stage::ChannelMemoryOfResidual() {
  return impl_->ChannelMemoryOfResidual();
}
void Stage::SetChannels(DeviceChannel* input, DeviceChannel* output) {
  impl_->SetChannels(input, output);
}
const StageConfig& Stage::config() const { return impl_->config_; }
uint64_t Stage::steps() const { return impl_->steps_; }
uint64_t Stage::tokens() const { return impl_->tokens_; }
double Stage::compute_seconds() const { return impl_->clock_.compute_seconds(); }
double Stage::input_wait_seconds() const { return impl_->clock_.input_wait_seconds(); }

}  // namespace stagecoach
