#include "worker/epoch_run.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/time/time.h"
#include "fmt/format.h"
#include "model/model_error.h"
#include "model/status_macros.h"
#include "spdlog/spdlog.h"
#include "worker/link/spin_wait.h"

namespace stagecoach {
namespace {

using Clock = std::chrono::steady_clock;

// A dial cannot be cancelled, so it is made of short ones with a look at `stopping_` in between.
constexpr absl::Duration kDialSlice = absl::Milliseconds(250);
constexpr std::chrono::seconds kDialTimeout{30};

// Peers' words go to logs and messages only in this form.
std::string Printable(const absl::Status& status) {
  return absl::CHexEscape(status.ToString().substr(0, 512));
}

// Whether Stage::Run refused the frame, as opposed to failing to run it.
bool IsContractViolation(const absl::Status& status) {
  if (GetModelError(status).has_value()) return false;  // weights that could not be loaded
  switch (status.code()) {
    case absl::StatusCode::kAborted:
    case absl::StatusCode::kAlreadyExists:
    case absl::StatusCode::kOutOfRange:
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kFailedPrecondition:
      return true;
    default:
      return false;
  }
}

KvType ToKvType(v1::KvType type) {
  switch (type) {
    case v1::KV_TYPE_F32:
      return KvType::kF32;
    case v1::KV_TYPE_Q8_0:
      return KvType::kQ8_0;
    default:
      return KvType::kF16;
  }
}

StageConfig MakeConfig(const v1::Assignment& assignment) {
  const auto to_int = [](uint32_t value) {  // Create refuses what is out of range
    return static_cast<int>(std::min<uint32_t>(value, INT32_MAX));
  };
  return {.epoch = assignment.epoch(),
          .stage = to_int(assignment.stage()),
          .stages = to_int(assignment.stages()),
          .first_layer = to_int(assignment.first_layer()),
          .last_layer = to_int(assignment.last_layer()),
          .max_slots = to_int(assignment.max_slots()),
          .max_context = to_int(assignment.max_context()),
          .kv_blocks = to_int(assignment.kv_blocks()),
          .max_step_tokens = to_int(assignment.max_step_tokens()),
          .kv_type = ToKvType(assignment.kv_type()),
          .device_input = assignment.incoming() == v1::TRANSPORT_NCCL,
          .device_output = assignment.outgoing() == v1::TRANSPORT_NCCL};
}

}  // namespace

EpochRun::EpochRun(EpochContext context, v1::Assignment assignment,
                   std::shared_ptr<EpochRun> predecessor)
    : context_(std::move(context)),
      assignment_(std::move(assignment)),
      log_prefix_(fmt::format("[{} stage {}]", context_.name, assignment_.stage())),
      predecessor_(std::move(predecessor)),
      detail_("starting") {}

EpochRun::~EpochRun() = default;

void EpochRun::Start() { thread_ = std::thread(&EpochRun::Main, this); }

void EpochRun::Join() {
  if (thread_.joinable()) thread_.join();
}

void EpochRun::Stop(const absl::Status& reason) {
  LinkBreaker break_inbound;
  std::shared_ptr<LinkSender> next_hop;
  std::deque<Work> unwanted;
  {
    absl::MutexLock lock(&mu_);
    if (std::exchange(stopping_, true)) return;
    links_ready_ = false;
    inbound_ = 0;
    CancelChannels();
    break_inbound = std::exchange(break_inbound_, nullptr);
    next_hop = std::move(next_hop_);
    unwanted.swap(queue_);
  }
  if (break_inbound) break_inbound(reason);
  if (next_hop) next_hop->Close();
}

absl::Status EpochRun::AcceptLink(uint64_t link, const std::string& nccl_id) {
  const bool nccl = assignment_.incoming() == v1::TRANSPORT_NCCL;
  if (nccl == nccl_id.empty()) {
    return absl::FailedPreconditionError(
        fmt::format("stage {} takes activations {}, the link is for them {}", assignment_.stage(),
                    nccl ? "by NCCL" : "in frames", nccl ? "in frames" : "by NCCL"));
  }
  LinkBreaker replaced;
  std::deque<Work> unwanted;
  {
    absl::MutexLock lock(&mu_);
    if (ended()) return absl::AbortedError(fmt::format("epoch {} is over", assignment_.epoch()));
    inbound_ = link;
    inbound_id_ = nccl_id;
    if (links_ready_) detail_.clear();
    replaced = std::exchange(break_inbound_, nullptr);
    unwanted.swap(queue_);
  }
  if (replaced) replaced(absl::AbortedError("a newer link took this one's place"));
  return absl::OkStatus();
}

void EpochRun::AttachBreaker(uint64_t link, LinkBreaker breaker) {
  {
    absl::MutexLock lock(&mu_);
    if (!ended() && inbound_ == link) {
      break_inbound_ = std::move(breaker);
      return;
    }
  }
  breaker(absl::AbortedError(fmt::format("epoch {} is over", assignment_.epoch())));
}

void EpochRun::Push(uint64_t link, Frame frame, CreditReturn credit) {
  Work dropped{std::move(frame), std::move(credit)};  // freed after the lock
  absl::MutexLock lock(&mu_);
  if (ended() || link != inbound_ || dropped.frame.header.epoch() != assignment_.epoch()) {
    context_.counters->dropped_frames += 1;
    return;
  }
  queue_.push_back(std::move(dropped));
  arrivals_.fetch_add(1, std::memory_order_release);
}

void EpochRun::LinkClosed(uint64_t link, const absl::Status& reason) {
  const std::string what =
      fmt::format("the link from the previous stage closed: {}", Printable(reason));
  bool channel_lost;
  {
    absl::MutexLock lock(&mu_);
    if (ended() || link != inbound_) return;
    inbound_ = 0;
    break_inbound_ = nullptr;
    detail_ = what;
    channel_lost = links_ready_ && input_ != nullptr;
  }
  // The channel that belongs to it cannot be made anew in this epoch.
  if (channel_lost) return Fail(absl::UnavailableError(what), Fault::kOurs);
  spdlog::info("{} inbound link closed: {}", log_prefix_, Printable(reason));
  context_.on_changed();
}

bool EpochRun::links_ready() const {
  absl::MutexLock lock(&mu_);
  return links_ready_;
}

std::string EpochRun::detail() const {
  absl::MutexLock lock(&mu_);
  return detail_;
}

void EpochRun::SetDetail(std::string detail) {
  absl::MutexLock lock(&mu_);
  if (!ended()) detail_ = std::move(detail);
}

void EpochRun::Fail(const absl::Status& reason, Fault fault) {
  LinkBreaker break_inbound;
  std::shared_ptr<LinkSender> next_hop;
  std::deque<Work> unwanted;
  {
    absl::MutexLock lock(&mu_);
    if (ended()) return;
    failed_ = true;
    links_ready_ = false;
    detail_ = Printable(reason);
    CancelChannels();
    break_inbound = std::exchange(break_inbound_, nullptr);
    next_hop = std::move(next_hop_);
    unwanted.swap(queue_);
  }
  spdlog::warn("{} epoch {} failed: {}", log_prefix_, assignment_.epoch(), Printable(reason));
  if (fault != Fault::kPeer) {
    v1::AssignmentFailed failed;
    failed.set_epoch(assignment_.epoch());
    failed.set_status_code(static_cast<uint32_t>(reason.code()));
    failed.set_message(Printable(reason));
    failed.set_nccl(fault == Fault::kNccl);
    context_.on_failed(failed);
  }
  if (break_inbound) break_inbound(reason);
  if (next_hop) next_hop->Close();
  context_.on_changed();
}

void EpochRun::Main() {
  if (predecessor_ != nullptr) {
    predecessor_->Join();
    predecessor_.reset();
  }
  if (absl::Status status = Prepare(); status.ok()) {
    Serve();
  } else {
    Fail(status, prepare_fault_);
  }
  CloseChannels();  // they use the workspace
  stage_.reset();   // KV and workspace, before a successor allocates its own
}

absl::Status EpochRun::Prepare() {
  {
    absl::MutexLock lock(&mu_);
    if (ended()) return absl::CancelledError("stopped");
  }
  if (!v1::KvType_IsValid(assignment_.kv_type())) {
    return absl::InvalidArgumentError(fmt::format("KV type {} is unknown to this worker",
                                                  static_cast<int>(assignment_.kv_type())));
  }
  STAGECOACH_RETURN_IF_ERROR(CheckTransports());
  const StageConfig config = MakeConfig(assignment_);
  auto stage = Stage::Create(context_.backend, context_.model, context_.store, config);
  if (!stage.ok()) return stage.status();
  stage_ = *std::move(stage);
  spdlog::info("{} epoch {}: layers [{}, {}) of {} stages, next hop {}", log_prefix_, config.epoch,
               config.first_layer, config.last_layer, config.stages,
               absl::CHexEscape(assignment_.next_hop()));
  prepare_fault_ = Fault::kNccl;
  if (assignment_.outgoing() == v1::TRANSPORT_NCCL) {
    STAGECOACH_ASSIGN_OR_RETURN(outgoing_id_, context_.transport->NewId());
  }
  prepare_fault_ = Fault::kOurs;
  STAGECOACH_RETURN_IF_ERROR(DialNextHop());
  STAGECOACH_RETURN_IF_ERROR(OpenChannels());
  absl::MutexLock lock(&mu_);
  if (ended()) return absl::CancelledError("stopped");
  links_ready_ = true;
  detail_.clear();
  return absl::OkStatus();
}

absl::Status EpochRun::CheckTransports() const {
  for (const v1::Transport transport : {assignment_.incoming(), assignment_.outgoing()}) {
    if (!v1::Transport_IsValid(transport)) {
      return absl::InvalidArgumentError(
          fmt::format("transport {} is unknown to this worker", static_cast<int>(transport)));
    }
    if (transport == v1::TRANSPORT_NCCL && context_.transport == nullptr) {
      return absl::FailedPreconditionError(
          "the assignment asks for NCCL, which this worker did not offer");
    }
  }
  return absl::OkStatus();
}

absl::Status EpochRun::DialNextHop() {
  SetDetail(fmt::format("connecting to {}", absl::CHexEscape(assignment_.next_hop())));
  v1::LinkHello hello;
  hello.set_protocol_version(kProtocolVersion);
  hello.set_epoch(assignment_.epoch());
  hello.set_model_hash(context_.model->hash());
  hello.set_kernel_revision(context_.kernel_revision);
  hello.set_to_stage(assignment_.stage() + 1);
  hello.set_d_model(static_cast<uint32_t>(context_.model->params().d_model));
  hello.set_nccl_id(outgoing_id_);
  const auto on_broken = [weak = weak_from_this()](const absl::Status& reason) {
    const std::shared_ptr<EpochRun> run = weak.lock();
    if (run == nullptr) return;
    run->Fail(
        absl::UnavailableError(fmt::format("the next hop broke the link: {}", Printable(reason))),
        Fault::kOurs);
  };
  const Clock::time_point deadline = Clock::now() + kDialTimeout;
  for (;;) {
    auto sender = context_.dialer->Dial(assignment_.next_hop(), hello, kDialSlice, on_broken);
    if (!sender.ok() && !absl::IsDeadlineExceeded(sender.status())) return sender.status();
    absl::MutexLock lock(&mu_);
    if (ended()) return absl::CancelledError("stopped");
    if (sender.ok()) {
      next_hop_ = *std::move(sender);
      return absl::OkStatus();
    }
    if (Clock::now() > deadline) return absl::UnavailableError(Printable(sender.status()));
  }
}

// Both ends are opened before either is waited for: the pairs of a chain meet at the same time.
absl::Status EpochRun::OpenChannels() {
  const bool incoming = assignment_.incoming() == v1::TRANSPORT_NCCL;
  if (!incoming && outgoing_id_.empty()) return absl::OkStatus();
  STAGECOACH_ASSIGN_OR_RETURN(const ChannelMemory memory, stage_->ChannelMemoryOfResidual());
  std::string inbound_id;
  if (incoming) STAGECOACH_RETURN_IF_ERROR(AwaitInboundId(&inbound_id));
  SetDetail("setting up NCCL");
  prepare_fault_ = Fault::kNccl;
  std::unique_ptr<DeviceChannel> input, output;
  if (!outgoing_id_.empty()) {
    const std::string peer = fmt::format("stage {} at {}", assignment_.stage() + 1,
                                         absl::CHexEscape(assignment_.next_hop()));
    STAGECOACH_ASSIGN_OR_RETURN(output, context_.transport->OpenSender(outgoing_id_, memory, peer));
  }
  if (incoming) {
    const std::string peer = fmt::format("stage {}", assignment_.stage() - 1);
    STAGECOACH_ASSIGN_OR_RETURN(input, context_.transport->OpenReceiver(inbound_id, memory, peer));
  }
  DeviceChannel* const channels[] = {output.get(), input.get()};
  stage_->SetChannels(input.get(), output.get());
  {
    absl::MutexLock lock(&mu_);
    input_ = std::move(input);
    output_ = std::move(output);
    if (ended()) return absl::CancelledError("stopped");
  }
  for (DeviceChannel* const channel : channels) {
    if (channel != nullptr) STAGECOACH_RETURN_IF_ERROR(channel->AwaitReady());
  }
  spdlog::info("{} activations{}{} by {}", log_prefix_, incoming ? " come" : "",
               outgoing_id_.empty() ? "" : (incoming ? " and go" : " go"),
               context_.transport->description());
  return absl::OkStatus();
}

absl::Status EpochRun::AwaitInboundId(std::string* id) {
  SetDetail("waiting for the previous stage to connect");
  absl::MutexLock lock(&mu_);
  if (!mu_.AwaitWithTimeout(absl::Condition(this, &EpochRun::InboundIdOrEnded),
                            absl::FromChrono(kDialTimeout))) {
    return absl::UnavailableError("the previous stage did not connect");
  }
  if (ended()) return absl::CancelledError("stopped");
  *id = inbound_id_;
  return absl::OkStatus();
}

void EpochRun::CancelChannels() {
  if (input_ != nullptr) input_->Cancel();
  if (output_ != nullptr) output_->Cancel();
}

void EpochRun::CloseChannels() {
  std::unique_ptr<DeviceChannel> input, output;
  {
    absl::MutexLock lock(&mu_);
    input = std::move(input_);
    output = std::move(output_);
  }
  if (input == nullptr && output == nullptr) return;
  const Clock::time_point start = Clock::now();
  input.reset();
  output.reset();
  spdlog::info("{} epoch {}: NCCL communicators aborted in {:.1f} ms", log_prefix_,
               assignment_.epoch(),
               std::chrono::duration<double, std::milli>(Clock::now() - start).count());
}

void EpochRun::Serve() {
  context_.on_changed();
  Clock::time_point idle_since = Clock::now();
  uint64_t taken = 0;
  std::optional<Work> work;
  bool refused = false;  // the work, until a step ends
  const WhenWanted when_wanted = assignment_.stages() > 1 ? WhenWanted::kStay : WhenWanted::kSleep;
  while (Running()) {
    const absl::StatusOr<bool> ends = stage_->pending() > 0 ? stage_->Ready() : false;
    absl::Status status = ends.status();
    if (status.ok() && *ends) {
      status = FinishStep();
      refused = false;
    } else if (status.ok()) {
      const bool came = !work && NextWork(&work);
      if (came && stage_->pending() == 0) CountWait(work->frame, idle_since);
      if (!work || refused) {
        std::this_thread::yield();
        continue;
      }
      status = SubmitStep(&work);
      refused = work.has_value();
      if (!refused) ++taken;
    }
    if (!status.ok()) {
      Fail(status, IsContractViolation(status) ? Fault::kPeer : Fault::kOurs);
      return;
    }
    if (work || stage_->pending() > 0) continue;
    idle_since = Clock::now();
    SpinUntilArrival(arrivals_, taken, when_wanted);
  }
}

bool EpochRun::Running() const {
  absl::MutexLock lock(&mu_);
  return !ended();
}

// Waits for work unless steps are pending, whose ends are not to wait for it.
bool EpochRun::NextWork(std::optional<Work>* work) {
  absl::MutexLock lock(&mu_);
  if (stage_->pending() == 0) mu_.Await(absl::Condition(this, &EpochRun::HasWorkOrEnded));
  if (ended() || queue_.empty()) return false;
  *work = std::move(queue_.front());
  queue_.pop_front();
  return true;
}

// The pipeline had work while we waited if the frame goes on with a sequence begun before.
void EpochRun::CountWait(const Frame& frame, Clock::time_point idle_since) {
  const auto& rows = frame.header.step().rows();
  const bool had_work = std::any_of(rows.begin(), rows.end(), [](const v1::SequenceRows& row) {
    return row.start_position() > 0;
  });
  if (!had_work) return;
  context_.counters->wait_ns +=
      std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - idle_since).count();
}

// Refused behind steps that are pending: it must wait for one of them.
absl::Status EpochRun::SubmitStep(std::optional<Work>* work) {
  STAGECOACH_ASSIGN_OR_RETURN(Stage::Submitted submitted, stage_->Submit((*work)->frame));
  if (!submitted.taken) return absl::OkStatus();
  work->reset();  // gives the credit back
  return SendOn(std::move(submitted.frame));
}

absl::Status EpochRun::FinishStep() {
  const uint64_t tokens_before = stage_->tokens();
  const double compute_before = stage_->compute_seconds();
  const double wait_before = stage_->input_wait_seconds();
  STAGECOACH_ASSIGN_OR_RETURN(std::optional<Frame> out, stage_->Finish());
  StageCounters& counters = *context_.counters;
  counters.steps += 1;
  counters.tokens += stage_->tokens() - tokens_before;
  counters.compute_ns += static_cast<int64_t>((stage_->compute_seconds() - compute_before) * 1e9);
  counters.wait_ns += static_cast<int64_t>((stage_->input_wait_seconds() - wait_before) * 1e9);
  return SendOn(std::move(out));
}

absl::Status EpochRun::SendOn(std::optional<Frame> frame) {
  if (!frame) return absl::OkStatus();
  std::shared_ptr<LinkSender> next_hop;
  {
    absl::MutexLock lock(&mu_);
    next_hop = next_hop_;
  }
  if (next_hop == nullptr) return absl::UnavailableError("the next hop is gone");
  const absl::Status sent = next_hop->Send(*std::move(frame));
  if (sent.ok() || absl::IsResourceExhausted(sent)) return sent;
  return absl::UnavailableError(fmt::format("the next hop is gone: {}", Printable(sent)));
}

}  // namespace stagecoach
