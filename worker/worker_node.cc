#include "worker/worker_node.h"

#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/escaping.h"
#include "absl/synchronization/mutex.h"
#include "fmt/format.h"
#include "spdlog/spdlog.h"
#include "worker/epoch_run.h"
#include "worker/metrics.h"

namespace stagecoach {
namespace {

v1::UnitState ToProto(UnitState state) {
  switch (state) {
    case UnitState::kAbsent:
      return v1::UNIT_STATE_ABSENT;
    case UnitState::kQueued:
      return v1::UNIT_STATE_QUEUED;
    case UnitState::kReading:
      return v1::UNIT_STATE_READING;
    case UnitState::kConverting:
      return v1::UNIT_STATE_CONVERTING;
    case UnitState::kResident:
      return v1::UNIT_STATE_RESIDENT;
    case UnitState::kFailed:
      return v1::UNIT_STATE_FAILED;
  }
  return v1::UNIT_STATE_ABSENT;
}

void FillWeightStatus(const LayerStoreStats& stats, v1::WeightStatus* weights) {
  weights->set_streaming(stats.streaming);
  weights->set_budget_bytes(stats.budget_bytes);
  weights->set_resident_bytes(stats.resident_bytes);
  weights->set_peak_resident_bytes(stats.peak_resident_bytes);
  weights->set_evictions(stats.evictions);
  weights->set_fixed_units(stats.fixed_units);
  weights->set_window_units(stats.window_units);
  weights->set_distance(stats.distance);
  weights->set_queued_units(stats.queued_units);
  weights->set_failed_prefetches(stats.failed_prefetches);
  weights->set_file_read_bytes(stats.read_bytes);
  weights->set_file_seconds(stats.read_seconds);
  weights->set_convert_seconds(stats.convert_seconds);
  weights->set_host_tier(stats.host_tier);
  weights->set_host_hits(stats.host_hits);
  weights->set_host_read_bytes(stats.host_read_bytes);
  weights->set_host_seconds(stats.host_seconds);
  weights->set_host_bytes(stats.host_bytes);
  weights->set_host_raw_bytes(stats.host_raw_bytes);
}

// Units of an assignment, or nothing if its layers do not exist (Stage::Create says what is wrong).
std::vector<Unit> AssignedUnits(const ModelParams& params, const v1::Assignment& assignment) {
  const bool possible = assignment.first_layer() < assignment.last_layer() &&
                        assignment.last_layer() <= static_cast<uint32_t>(params.layers);
  if (!possible) return {};
  return StageUnits(params, static_cast<int>(assignment.first_layer()),
                    static_cast<int>(assignment.last_layer()));
}

}  // namespace

class WorkerNode::Impl {
 public:
  Impl(Backend* backend, std::shared_ptr<const ModelFile> model, LinkDialer* dialer,
       WorkerOptions options)
      : name_(options.name),
        kernel_revision_(backend->info().kernel_revision),
        model_(std::move(model)),
        store_(backend, model_, options.store),
        context_{.name = name_,
                 .backend = backend,
                 .kernel_revision = kernel_revision_,
                 .model = model_,
                 .store = &store_,
                 .dialer = dialer,
                 .transport = options.transport,
                 .counters = &counters_,
                 .on_failed = [](const v1::AssignmentFailed&) {},
                 .on_changed = [] {}} {}
  ~Impl() { Shutdown(); }

  EpochContext& context() { return context_; }

  void Assign(const v1::Assignment& assignment) {
    std::shared_ptr<EpochRun> old;
    absl::MutexLock calls(&assign_mu_);
    {
      absl::MutexLock lock(&mu_);
      if (shut_down_ || assignment.epoch() <= epoch_) return;
      epoch_ = assignment.epoch();
      old = std::exchange(run_, nullptr);
    }
    if (old != nullptr) old->Stop(NewEpoch(assignment.epoch()));
    store_.Assign(AssignedUnits(model_->params(), assignment));
    const std::shared_ptr<EpochRun> predecessor =
        old != nullptr ? std::move(old) : std::exchange(retired_, nullptr);
    auto run = std::make_shared<EpochRun>(context_, assignment, predecessor);
    run->Start();
    absl::MutexLock lock(&mu_);
    run_ = std::move(run);
  }

  void Release(const v1::Release& release) {
    absl::MutexLock calls(&assign_mu_);
    {
      absl::MutexLock lock(&mu_);
      if (shut_down_ || release.epoch() != epoch_) return;
    }
    Retire(absl::AbortedError(fmt::format("epoch {} was released", release.epoch())));
    store_.Assign({});
    spdlog::info("[{}] epoch {} released", name_, release.epoch());
  }

  void LoseCoordinator() {
    absl::MutexLock calls(&assign_mu_);
    Retire(absl::UnavailableError("the worker lost its coordinator"));
  }

  void Shutdown() {
    absl::MutexLock calls(&assign_mu_);
    {
      absl::MutexLock lock(&mu_);
      if (std::exchange(shut_down_, true)) return;
    }
    Retire(absl::UnavailableError("the worker is shutting down"));
    store_.Shutdown();  // wakes a stage that waits for weights
    if (retired_ != nullptr) retired_->Join();
    retired_ = nullptr;
  }

  v1::WorkerHeartbeat Heartbeat() const {
    v1::WorkerHeartbeat heartbeat;
    std::shared_ptr<EpochRun> run;
    {
      absl::MutexLock lock(&mu_);
      heartbeat.set_epoch(epoch_);
      run = run_;
    }
    if (run != nullptr) {
      heartbeat.set_links_ready(run->links_ready());
      heartbeat.set_detail(run->detail());
    } else {
      heartbeat.set_detail("no assignment");
    }
    const StorageTrouble trouble = store_.Trouble();
    heartbeat.set_stalled(trouble.stalled);
    if (heartbeat.detail().empty()) heartbeat.set_detail(absl::CHexEscape(trouble.detail));
    for (UnitState state : store_.States()) heartbeat.add_units(ToProto(state));
    const LayerStoreStats stats = store_.Stats();
    heartbeat.set_slice_bytes(stats.slice_bytes);
    heartbeat.set_loaded_bytes(stats.loaded_bytes);
    heartbeat.set_load_seconds(stats.load_seconds);
    heartbeat.set_prefetch_hits(stats.hits);
    heartbeat.set_prefetch_late_hits(stats.late_hits);
    heartbeat.set_prefetch_misses(stats.misses);
    heartbeat.set_stall_seconds(stats.stall_seconds);
    for (const bool fixed : stats.fixed) heartbeat.add_fixed(fixed);
    FillWeightStatus(stats, heartbeat.mutable_weights());
    heartbeat.set_steps(counters_.steps);
    heartbeat.set_tokens(counters_.tokens);
    heartbeat.set_compute_seconds(counters_.compute_ns * 1e-9);
    heartbeat.set_wait_seconds(counters_.wait_ns * 1e-9);
    heartbeat.set_dropped_frames(counters_.dropped_frames);
    return heartbeat;
  }

  std::string Metrics() const { return FormatMetrics(store_.Stats(), store_.States()); }

  absl::Status OnLink(uint64_t link, const v1::LinkHello& hello) {
    if (absl::Status same = CheckSameModel(hello); !same.ok()) return same;
    std::shared_ptr<EpochRun> run;
    {
      absl::MutexLock lock(&mu_);
      if (hello.epoch() < epoch_) {
        return absl::AbortedError(fmt::format("epoch {} is over, it is {}", hello.epoch(), epoch_));
      }
      if (hello.epoch() > epoch_) {
        return absl::UnavailableError(fmt::format("epoch {} has not begun here", hello.epoch()));
      }
      run = run_;
    }
    if (run == nullptr) {  // between Assign's steps, or given up
      return absl::UnavailableError(fmt::format("epoch {} is not being served", hello.epoch()));
    }
    if (hello.to_stage() != run->assignment().stage()) {
      return absl::FailedPreconditionError(fmt::format("the link is for stage {}, this is stage {}",
                                                       hello.to_stage(),
                                                       run->assignment().stage()));
    }
    return run->AcceptLink(link, hello.nccl_id());
  }

  std::shared_ptr<EpochRun> run() const {
    absl::MutexLock lock(&mu_);
    return run_;
  }

  void CountDropped() { counters_.dropped_frames += 1; }

 private:
  static absl::Status NewEpoch(uint64_t epoch) {
    return absl::AbortedError(fmt::format("epoch {} begins", epoch));
  }

  void Retire(const absl::Status& reason) ABSL_EXCLUSIVE_LOCKS_REQUIRED(assign_mu_) {
    std::shared_ptr<EpochRun> old;
    {
      absl::MutexLock lock(&mu_);
      old = std::exchange(run_, nullptr);
    }
    if (old == nullptr) return;
    old->Stop(reason);
    retired_ = std::move(old);
  }

  absl::Status CheckSameModel(const v1::LinkHello& hello) const {
    if (hello.protocol_version() != kProtocolVersion) {
      return absl::FailedPreconditionError(fmt::format("the link has protocol version {}, not {}",
                                                       hello.protocol_version(), kProtocolVersion));
    }
    if (hello.model_hash() != model_->hash()) {
      return absl::FailedPreconditionError("the link is of another model file");
    }
    if (hello.kernel_revision() != kernel_revision_) {
      return absl::FailedPreconditionError(
          fmt::format("the link is of another kernel revision than '{}'", kernel_revision_));
    }
    if (hello.d_model() != static_cast<uint32_t>(model_->params().d_model)) {
      return absl::FailedPreconditionError(fmt::format("the link has d_model {}, this model {}",
                                                       hello.d_model(), model_->params().d_model));
    }
    return absl::OkStatus();
  }

  // Constant after construction.
  const std::string name_;
  const std::string kernel_revision_;
  const std::shared_ptr<const ModelFile> model_;

  // Synchronise themselves.
  LayerStore store_;
  StageCounters counters_;

  EpochContext context_;  // callbacks are set before the first Assign, constant then

  absl::Mutex assign_mu_;  // one change of assignment at a time; taken before mu_
  std::shared_ptr<EpochRun> retired_ ABSL_GUARDED_BY(assign_mu_);  // stopped, to be joined

  mutable absl::Mutex mu_;
  bool shut_down_ ABSL_GUARDED_BY(mu_) = false;
  uint64_t epoch_ ABSL_GUARDED_BY(mu_) = 0;
  std::shared_ptr<EpochRun> run_ ABSL_GUARDED_BY(mu_);
};

WorkerNode::WorkerNode(Backend* backend, std::shared_ptr<const ModelFile> model, LinkDialer* dialer,
                       WorkerOptions options)
    : impl_(std::make_unique<Impl>(backend, std::move(model), dialer, std::move(options))) {}
WorkerNode::~WorkerNode() { Shutdown(); }

void WorkerNode::SetFailureCallback(std::function<void(const v1::AssignmentFailed&)> callback) {
  impl_->context().on_failed = std::move(callback);
}
void WorkerNode::SetChangeCallback(std::function<void()> callback) {
  impl_->context().on_changed = std::move(callback);
}
void WorkerNode::Assign(const v1::Assignment& assignment) { impl_->Assign(assignment); }
void WorkerNode::Release(const v1::Release& release) { impl_->Release(release); }
void WorkerNode::LoseCoordinator() { impl_->LoseCoordinator(); }
std::string WorkerNode::Metrics() const { return impl_->Metrics(); }
v1::WorkerHeartbeat WorkerNode::Heartbeat() const { return impl_->Heartbeat(); }
void WorkerNode::Shutdown() { impl_->Shutdown(); }

absl::Status WorkerNode::OnLink(uint64_t link, const v1::LinkHello& hello) {
  return impl_->OnLink(link, hello);
}
void WorkerNode::OnLinkOpened(uint64_t link, LinkBreaker breaker) {
  if (const auto run = impl_->run()) {
    run->AttachBreaker(link, std::move(breaker));
  } else {
    breaker(absl::AbortedError("the epoch is over"));
  }
}
void WorkerNode::OnFrame(uint64_t link, Frame frame, CreditReturn credit) {
  if (const auto run = impl_->run()) {
    run->Push(link, std::move(frame), std::move(credit));
  } else {
    impl_->CountDropped();
  }
}
void WorkerNode::OnLinkClosed(uint64_t link, const absl::Status& reason) {
  if (const auto run = impl_->run()) run->LinkClosed(link, reason);
}

}  // namespace stagecoach
