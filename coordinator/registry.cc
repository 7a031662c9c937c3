#include "coordinator/registry.h"

#include <algorithm>
#include <string_view>
#include <utility>

#include "coordinator/limits.h"
#include "coordinator/worker_check.h"
#include "fmt/format.h"
#include "worker/link/frame.h"

namespace stagecoach {
namespace {

// Workers measure their rates while others use the same memory and disks: up to this ratio,
// differences are noise, and an even split is the better plan.
constexpr double kScatter = 2.5;

void IgnoreScatter(double WorkerCapacity::*rate, std::vector<WorkerCapacity>& workers) {
  double sum = 0, slowest = workers[0].*rate, fastest = slowest;
  for (const WorkerCapacity& worker : workers) {
    sum += worker.*rate;
    slowest = std::min(slowest, worker.*rate);
    fastest = std::max(fastest, worker.*rate);
  }
  if (fastest > kScatter * slowest) return;
  for (WorkerCapacity& worker : workers) worker.*rate = sum / static_cast<double>(workers.size());
}

WorkerCapacity Capacity(const v1::WorkerHello& hello) {
  return {.worker = hello.worker(),
          .memory_bytes = static_cast<uint64_t>(hello.memory_bytes()),
          .read_bytes_per_second = hello.read_bytes_per_second(),
          .weight_budget_bytes = hello.weight_budget_bytes(),
          .weight_budget_percent = hello.weight_budget_percent(),
          .load_bytes_per_second = hello.load_bytes_per_second(),
          .gpu = !hello.device_uuid().empty()};
}

// Whether one worker has at least the other's room for a stage.
bool HasRoomOf(const WorkerCapacity& worker, const WorkerCapacity& other) {
  const auto no_less = [](auto budget, auto than) {  // 0 = no limit
    return budget == 0 || (than != 0 && budget >= than);
  };
  return worker.memory_bytes >= other.memory_bytes &&
         no_less(worker.weight_budget_bytes, other.weight_budget_bytes) &&
         no_less(worker.weight_budget_percent, other.weight_budget_percent);
}

v1::KvType ToWire(KvType type) {
  switch (type) {
    case KvType::kF16:
      return v1::KV_TYPE_F16;
    case KvType::kF32:
      return v1::KV_TYPE_F32;
    case KvType::kQ8_0:
      return v1::KV_TYPE_Q8_0;
  }
  return v1::KV_TYPE_F16;
}

// Failures of an assignment that say nothing against the worker itself.
bool IsTransient(uint32_t code) {
  switch (static_cast<absl::StatusCode>(code)) {
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kDeadlineExceeded:
    case absl::StatusCode::kAborted:
    case absl::StatusCode::kCancelled:
      return true;
    default:
      return false;
  }
}

}  // namespace

Registry::Registry(RegistryOptions options)
    : options_(std::move(options)), replan_delay_(kReplanDelay) {}

std::vector<RegistryAction> Registry::TakeActions() { return std::exchange(actions_, {}); }

// --- Events.

void Registry::Opened(StreamId stream, MonotonicTime now) {
  if (greeting_.size() + workers_.size() >= kMaxControlStreams) {
    Close(stream, absl::ResourceExhaustedError("too many control streams"));
    return;
  }
  greeting_[stream] = now;
}

void Registry::Received(StreamId stream, const v1::WorkerMessage& message, MonotonicTime now) {
  Worker* worker = FindByStream(stream);
  if (worker == nullptr) {
    if (greeting_.count(stream) == 0) return;
    if (message.has_hello()) {
      OnHello(stream, message.hello(), now);
    } else {
      Close(stream, absl::InvalidArgumentError("the first message must be a hello"));
    }
    return;
  }
  worker->last_heard = now;
  if (message.has_heartbeat()) {
    OnHeartbeat(*worker, message.heartbeat(), now);
  } else if (message.has_assignment_failed()) {
    OnAssignmentFailed(*worker, message.assignment_failed(), now);
  } else {
    const std::string name = worker->hello.worker();
    const char* what = message.has_hello() ? "a second hello" : "an empty or unknown message";
    Close(stream, absl::InvalidArgumentError(fmt::format("{} on one control stream", what)));
    Lose(name, fmt::format("it sent {}", what), now);
  }
}

void Registry::Closed(StreamId stream, const absl::Status& reason, MonotonicTime now) {
  greeting_.erase(stream);
  if (const Worker* worker = FindByStream(stream)) {
    Lose(worker->hello.worker(),
         fmt::format("its control stream ended{}{}", reason.message().empty() ? "" : ": ",
                     CleanText(std::string(reason.message()), kMaxDetailBytes)),
         now);
  }
}

void Registry::Tick(MonotonicTime now) {
  std::vector<StreamId> silent;
  for (const auto& [stream, since] : greeting_) {
    if (now - since >= kHelloTimeout) silent.push_back(stream);
  }
  for (StreamId stream : silent) Close(stream, absl::DeadlineExceededError("no hello in time"));

  std::vector<std::string> lost;
  for (const auto& [name, worker] : workers_) {
    if (now - worker.last_heard >= kHeartbeatTimeout) lost.push_back(name);
  }
  for (const std::string& name : lost) {
    const std::string why = fmt::format(
        "no heartbeat for {} ms",
        std::chrono::duration_cast<std::chrono::milliseconds>(kHeartbeatTimeout).count());
    Close(workers_.at(name).stream, absl::DeadlineExceededError(why));
    Lose(name, why, now);
  }

  if ((phase_ == Phase::kLinking || phase_ == Phase::kDialling) &&
      now - linking_since_ >= kLinkTimeout) {
    EndFailedEpoch(absl::DeadlineExceededError(LinkingDetail()), now);
  }
  if (phase_ == Phase::kFailing && now - failing_since_ >= kFailureGrace) {
    EndFailedEpoch(failure_, now);
  }
  TryPlan(now);
}

void Registry::Dialled(uint64_t epoch) {
  if (epoch != epoch_ || phase_ != Phase::kDialling) return;
  phase_ = Phase::kServing;
  replan_delay_ = kReplanDelay;
  last_failure_ = absl::OkStatus();
}

void Registry::EpochFailed(uint64_t epoch, const absl::Status& reason, MonotonicTime now) {
  if (epoch != epoch_ || phase_ == Phase::kWaiting || phase_ == Phase::kFailing) return;
  if (phase_ != Phase::kServing) {
    EndFailedEpoch(reason, now);
    return;
  }
  // A link that breaks while serving is mostly the first sign of a worker that is gone; its control
  // stream, which names it, ends within moments.
  phase_ = Phase::kFailing;
  failing_since_ = now;
  failure_ = reason;
}

void Registry::EndFailedEpoch(const absl::Status& reason, MonotonicTime now) {
  last_failure_ = absl::UnavailableError(
      fmt::format("epoch {} failed: {}", epoch_, std::string(reason.message())));
  EndCurrentEpoch(last_failure_);
  Backoff(now);
}

void Registry::OnHello(StreamId stream, const v1::WorkerHello& hello, MonotonicTime now) {
  absl::Status status = CheckHello(hello);
  if (!status.ok()) {
    Close(stream, status);
    return;
  }
  if (workers_.count(hello.worker()) > 0) {
    Close(workers_.at(hello.worker()).stream,
          absl::AbortedError(fmt::format("worker '{}' joined again on a newer stream; this one is "
                                         "fenced off",
                                         hello.worker())));
    Lose(hello.worker(), "it joined again on a newer stream", now);
  }
  greeting_.erase(stream);
  if (workers_.empty()) {
    backend_ = hello.backend();
    kernel_revision_ = hello.kernel_revision();
  }
  workers_[hello.worker()] = {.stream = stream, .hello = hello, .last_heard = now};
  SendToWorker welcome{.stream = stream};
  welcome.message.mutable_welcome()->set_protocol_version(kProtocolVersion);
  actions_.push_back(std::move(welcome));
}

absl::Status Registry::CheckHello(const v1::WorkerHello& hello) const {
  absl::Status status = CheckWorkerHello(hello, options_.model_hash);
  if (!status.ok()) return status;
  return CheckFleet(hello);
}

// What only shows beside the other workers.
absl::Status Registry::CheckFleet(const v1::WorkerHello& hello) const {
  if (hello.data_address() == options_.results_address) {
    return absl::InvalidArgumentError("data_address: this is the coordinator's own address");
  }
  bool others = false;
  for (const auto& [name, worker] : workers_) {
    if (name == hello.worker()) continue;
    others = true;
    if (worker.hello.data_address() == hello.data_address()) {
      return absl::InvalidArgumentError(
          fmt::format("data_address: '{}' belongs to worker '{}'", hello.data_address(), name));
    }
    const std::string obstacle = NcclObstacle(worker.hello, hello);
    if ((hello.nccl_only() || worker.hello.nccl_only()) && !obstacle.empty()) {
      return absl::FailedPreconditionError(
          fmt::format("transports: worker '{}' has --transport nccl, but {}",
                      hello.nccl_only() ? hello.worker() : worker.hello.worker(), obstacle));
    }
  }
  if (others && (hello.backend() != backend_ || hello.kernel_revision() != kernel_revision_)) {
    return absl::FailedPreconditionError(
        fmt::format("kernel_revision: '{}' on backend '{}' does not go with the other workers' "
                    "'{}' on '{}'; all must have the same numerics",
                    hello.kernel_revision(), hello.backend(), kernel_revision_, backend_));
  }
  if (others && workers_.size() >= kMaxWorkers) {
    return absl::ResourceExhaustedError(fmt::format("{} workers have joined", kMaxWorkers));
  }
  return absl::OkStatus();
}

void Registry::OnHeartbeat(Worker& worker, const v1::WorkerHeartbeat& heartbeat,
                           MonotonicTime now) {
  const bool first = !worker.heartbeat.has_value();
  const uint64_t known = first ? kMaxEpoch : std::max(epoch_, epoch_floor_);
  if (heartbeat.epoch() > known) {
    const std::string why =
        fmt::format("its heartbeat names epoch {}, which was never planned", heartbeat.epoch());
    const std::string name = worker.hello.worker();
    Close(worker.stream, absl::InvalidArgumentError(why));
    Lose(name, why, now);
    return;
  }
  worker.heartbeat = heartbeat;
  worker.heartbeat->set_detail(CleanText(heartbeat.detail(), kMaxDetailBytes));
  if (first) {
    // A worker that outlived another coordinator accepts only newer epochs than it has seen.
    epoch_floor_ = std::max(epoch_floor_, heartbeat.epoch());
    plan_changed_ = true;
    TryPlan(now);
  }
  CheckLinks();
}

void Registry::OnAssignmentFailed(Worker& worker, const v1::AssignmentFailed& failed,
                                  MonotonicTime now) {
  const std::string& name = worker.hello.worker();
  if (failed.epoch() != epoch_ || phase_ == Phase::kWaiting || stage_of(name) < 0) return;
  const std::string why = fmt::format("worker '{}' ({}): {}", name, LayersOf(name),
                                      CleanText(failed.message(), kMaxDetailBytes));
  worker.nccl_failed |= failed.nccl();
  if (IsTransient(failed.status_code()) || failed.nccl()) {
    EpochFailed(epoch_, absl::UnavailableError(why), now);
    return;
  }
  worker.unfit = CleanText(failed.message(), kMaxDetailBytes);
  if (worker.unfit.empty()) worker.unfit = "the assignment failed";
  SendToWorker release{.stream = worker.stream};
  release.message.mutable_release()->set_epoch(epoch_);
  EndCurrentEpoch(absl::UnavailableError("a stage cannot be served: " + why));
  actions_.push_back(std::move(release));
  plan_changed_ = true;
  TryPlan(now);
}

// --- Workers and epochs.

Registry::Worker* Registry::FindByStream(StreamId stream) {
  for (auto& [name, worker] : workers_) {
    if (worker.stream == stream) return &worker;
  }
  return nullptr;
}

const Registry::Worker* Registry::FindByName(const std::string& name) const {
  auto it = workers_.find(name);
  return it == workers_.end() ? nullptr : &it->second;
}

void Registry::Close(StreamId stream, const absl::Status& reason) {
  greeting_.erase(stream);
  actions_.push_back(CloseStream{.stream = stream, .reason = reason});
}

void Registry::Lose(const std::string& name_ref, const std::string& why, MonotonicTime now) {
  const std::string name = name_ref;  // may lie inside the entry that goes
  const int stage = stage_of(name);
  workers_.erase(name);
  plan_changed_ = true;
  if (phase_ != Phase::kWaiting && stage >= 0) {
    EndCurrentEpoch(absl::UnavailableError(
        fmt::format("stage {} was lost: worker '{}' ({}): {}", stage, name, LayersOf(name), why)));
  }
  TryPlan(now);
}

void Registry::EndCurrentEpoch(const absl::Status& reason) {
  if (phase_ == Phase::kWaiting) return;
  phase_ = Phase::kWaiting;
  actions_.push_back(EndEpoch{.epoch = epoch_, .reason = reason});
}

void Registry::Backoff(MonotonicTime now) {
  not_before_ = now + replan_delay_;
  replan_delay_ = std::min(2 * replan_delay_, kMaxReplanDelay);
  plan_changed_ = true;
}

// --- Planning.

void Registry::TryPlan(MonotonicTime now) {
  if (phase_ != Phase::kWaiting || !plan_changed_ || now < not_before_) return;
  if (!FillSeats()) return;
  plan_changed_ = false;
  auto plan = PlanSeats();
  plan_error_ = plan.status();
  if (!plan.ok()) return;
  plan_ = *std::move(plan);
  planned_.clear();
  for (const std::string& name : seats_) planned_.push_back(Capacity(workers_.at(name).hello));
  BeginEpoch(now);
}

int Registry::UsableWorkers() const {
  return static_cast<int>(std::count_if(workers_.begin(), workers_.end(),
                                        [](const auto& entry) { return entry.second.usable(); }));
}

// Gives every hole to a usable worker without a seat, in order of names. False: too few of them.
bool Registry::FillSeats() {
  if (UsableWorkers() < options_.workers) return false;
  seats_.resize(options_.workers);
  for (std::string& seat : seats_) {
    const Worker* worker = FindByName(seat);
    if (worker != nullptr && worker->usable()) continue;
    auto spare = std::find_if(workers_.begin(), workers_.end(), [this](const auto& entry) {
      return entry.second.usable() && !seated(entry.first);
    });
    seat = spare->first;  // exists: there are at least as many usable workers as seats
  }
  return true;
}

absl::StatusOr<Plan> Registry::PlanSeats() {
  if (std::optional<Plan> kept = KeepRanges()) return *std::move(kept);
  auto plan_for = [this](const std::vector<std::string>& names) {
    std::vector<WorkerCapacity> capacities;
    for (const std::string& name : names) {
      capacities.push_back(Capacity(workers_.at(name).hello));
    }
    if (backend_ == "cpu") IgnoreScatter(&WorkerCapacity::read_bytes_per_second, capacities);
    IgnoreScatter(&WorkerCapacity::load_bytes_per_second, capacities);
    return options_.plan(capacities);
  };
  absl::StatusOr<Plan> plan = plan_for(seats_);
  if (plan.ok()) return plan;
  // Perhaps it fits with the largest workers instead, spares included.
  std::vector<std::string> largest;
  for (const auto& [name, worker] : workers_) {
    if (worker.usable()) largest.push_back(name);
  }
  if (largest.size() == seats_.size()) return plan;
  std::stable_sort(largest.begin(), largest.end(), [this](const auto& a, const auto& b) {
    return workers_.at(a).hello.memory_bytes() > workers_.at(b).hello.memory_bytes();
  });
  largest.resize(seats_.size());
  std::sort(largest.begin(), largest.end());
  absl::StatusOr<Plan> other = plan_for(largest);
  if (!other.ok()) return plan;
  seats_ = std::move(largest);
  return other;
}

// The latest plan with its holes filled by workers that have at least the room of the old ones.
std::optional<Plan> Registry::KeepRanges() const {
  if (!plan_.has_value()) return std::nullopt;
  Plan plan = *plan_;
  for (size_t i = 0; i < seats_.size(); ++i) {
    if (!HasRoomOf(Capacity(workers_.at(seats_[i]).hello), planned_[i])) return std::nullopt;
    plan.stages[i].worker = seats_[i];
  }
  return plan;
}

// Between neighbours; TRANSPORT_GRPC to and from the coordinator.
v1::Transport Registry::TransportBetween(int stage, int next) const {
  if (stage < 0 || next >= static_cast<int>(seats_.size())) return v1::TRANSPORT_GRPC;
  const Worker& from = workers_.at(seats_[stage]);
  const Worker& to = workers_.at(seats_[next]);
  if (!NcclObstacle(from.hello, to.hello).empty()) return v1::TRANSPORT_GRPC;
  const bool required = from.hello.nccl_only() || to.hello.nccl_only();
  const bool failed = from.nccl_failed || to.nccl_failed;
  return failed && !required ? v1::TRANSPORT_GRPC : v1::TRANSPORT_NCCL;
}

void Registry::BeginEpoch(MonotonicTime now) {
  epoch_ = std::max(epoch_, epoch_floor_) + 1;
  phase_ = Phase::kLinking;
  linking_since_ = now;
  const int stages = static_cast<int>(seats_.size());
  actions_.push_back(ExpectResults{.epoch = epoch_,
                                   .stages = stages,
                                   .kv_blocks = plan_->kv_blocks,
                                   .max_step_tokens = plan_->max_step_tokens});
  for (int i = 0; i < stages; ++i) {
    SendToWorker send{.stream = workers_.at(seats_[i]).stream};
    v1::Assignment& assignment = *send.message.mutable_assignment();
    assignment.set_epoch(epoch_);
    assignment.set_stage(i);
    assignment.set_stages(stages);
    assignment.set_first_layer(plan_->stages[i].first_layer);
    assignment.set_last_layer(plan_->stages[i].last_layer);
    assignment.set_next_hop(i + 1 < stages ? workers_.at(seats_[i + 1]).hello.data_address()
                                           : options_.results_address);
    assignment.set_max_slots(options_.limits.max_slots);
    assignment.set_max_context(options_.limits.max_context);
    assignment.set_max_step_tokens(plan_->max_step_tokens);
    assignment.set_kv_blocks(plan_->kv_blocks);
    assignment.set_kv_type(ToWire(options_.limits.kv.type));
    assignment.set_incoming(TransportBetween(i - 1, i));
    assignment.set_outgoing(TransportBetween(i, i + 1));
    actions_.push_back(std::move(send));
  }
}

void Registry::CheckLinks() {
  if (phase_ != Phase::kLinking) return;
  for (const std::string& name : seats_) {
    const auto& heartbeat = workers_.at(name).heartbeat;
    if (heartbeat->epoch() != epoch_ || !heartbeat->links_ready()) return;
  }
  phase_ = Phase::kDialling;
  actions_.push_back(
      DialFirstStage{.epoch = epoch_, .address = workers_.at(seats_[0]).hello.data_address()});
}

}  // namespace stagecoach
