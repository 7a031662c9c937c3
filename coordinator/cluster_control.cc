#include "coordinator/cluster_control.h"

#include <chrono>
#include <utility>

#include "coordinator/limits.h"
#include "coordinator/worker_check.h"
#include "fmt/format.h"
#include "spdlog/spdlog.h"

namespace stagecoach {
namespace {

constexpr absl::Duration kTickInterval = absl::Milliseconds(100);
constexpr absl::Duration kDialTimeout = absl::Seconds(2);
constexpr absl::Duration kCloseTimeout = absl::Seconds(1);
constexpr std::chrono::seconds kRefusalLogInterval{1};

MonotonicTime Now() { return std::chrono::steady_clock::now(); }

}  // namespace

ClusterControl::ClusterControl(Options options, Pipeline* pipeline, LinkDialer* dialer)
    : options_(std::move(options)),
      pipeline_(pipeline),
      dialer_(dialer),
      service_(this),
      loop_(kTickInterval, [this] {
        registry_->Tick(Now());
        Apply();
      }) {
  {
    absl::MutexLock lock(&mu_);
    readiness_ = absl::UnavailableError("the coordinator is starting");
  }
  pipeline_->SetFailureCallback([this](uint64_t epoch, const absl::Status& reason) {
    loop_.Post([this, epoch, reason] {
      registry_->EpochFailed(epoch, reason, Now());
      Apply();
    });
  });
}

void ClusterControl::Start(const std::string& results_address) {
  RegistryOptions registry = options_.registry;
  registry.results_address = results_address;
  registry_.emplace(std::move(registry));
  Publish();
  dial_loop_.Start();
  loop_.Start();
}

ClusterControl::~ClusterControl() { Shutdown(); }

absl::Status ClusterControl::Readiness() const {
  absl::MutexLock lock(&mu_);
  return readiness_;
}

std::string ClusterControl::kernel_revision() const {
  absl::MutexLock lock(&mu_);
  return kernel_revision_;
}

void ClusterControl::GetStatus(std::function<void(v1::GetStatusResponse)> done) {
  auto shared = std::make_shared<std::function<void(v1::GetStatusResponse)>>(std::move(done));
  const bool posted = loop_.Post([this, shared] {
    v1::GetStatusResponse response;
    registry_->FillStatus(&response);
    (*shared)(std::move(response));
  });
  if (!posted) (*shared)(v1::GetStatusResponse());
}

void ClusterControl::Shutdown() {
  const absl::Status reason = absl::UnavailableError("the coordinator is shutting down");
  dial_epoch_ = 0;
  loop_.Stop();  // from here on what streams report is dropped
  dial_loop_.Stop();
  pipeline_->SetFailureCallback(nullptr);
  pipeline_->EndEpoch(reason);
  service_.Shutdown(reason, kCloseTimeout);
  absl::MutexLock lock(&mu_);
  readiness_ = reason;
}

void ClusterControl::OnOpen(StreamId stream, const std::string& peer) {
  loop_.Post([this, stream, peer] {
    names_[stream] = CleanText(peer, kMaxAddressBytes);
    registry_->Opened(stream, Now());
    Apply();
  });
}

void ClusterControl::OnMessage(StreamId stream, v1::WorkerMessage message) {
  auto shared = std::make_shared<v1::WorkerMessage>(std::move(message));
  loop_.Post([this, stream, shared] {
    LogMessage(stream, *shared);
    registry_->Received(stream, *shared, Now());
    Apply();
    service_.ReadNext(stream);
  });
}

void ClusterControl::OnClosed(StreamId stream, const absl::Status& reason) {
  loop_.Post([this, stream, reason] {
    registry_->Closed(stream, reason, Now());
    Apply();
    names_.erase(stream);
  });
}

void ClusterControl::LogMessage(StreamId stream, const v1::WorkerMessage& message) {
  if (names_.count(stream) == 0) return;  // closed already
  if (message.has_hello()) {
    const v1::WorkerHello& hello = message.hello();
    names_[stream] = fmt::format("'{}' at {}", CleanText(hello.worker(), kMaxWorkerNameBytes),
                                 CleanText(hello.data_address(), kMaxAddressBytes));
  } else if (message.has_assignment_failed()) {
    spdlog::warn("worker {} cannot carry out its assignment of epoch {}: {}", names_[stream],
                 message.assignment_failed().epoch(),
                 CleanText(message.assignment_failed().message(), kMaxDetailBytes));
  }
}

void ClusterControl::Apply() {
  for (RegistryAction& action : registry_->TakeActions()) {
    std::visit([this](auto& what) { Do(what); }, action);
  }
  Publish();
}

void ClusterControl::Do(SendToWorker& action) {
  if (action.message.has_welcome()) spdlog::info("worker {} joined", names_[action.stream]);
  if (action.message.has_assignment()) {
    const v1::Assignment& assignment = action.message.assignment();
    spdlog::info("epoch {}: stage {} of {} = layers {}-{} on worker {}", assignment.epoch(),
                 assignment.stage(), assignment.stages(), assignment.first_layer(),
                 assignment.last_layer() - 1, names_[action.stream]);
  }
  service_.Send(action.stream, std::move(action.message));
}

void ClusterControl::Do(CloseStream& action) {
  // A peer that is refused again and again must not fill the log.
  if (Now() - last_refusal_log_ >= kRefusalLogInterval) {
    spdlog::warn("control stream of worker {} closed: {} ({} more since the last such line)",
                 names_[action.stream], std::string(action.reason.message()), refusals_not_logged_);
    last_refusal_log_ = Now();
    refusals_not_logged_ = 0;
  } else {
    ++refusals_not_logged_;
  }
  names_.erase(action.stream);
  service_.Close(action.stream, action.reason);
}

void ClusterControl::Do(ExpectResults& action) {
  pipeline_->ExpectEpoch(action.epoch, {.stages = action.stages,
                                        .kv_blocks = action.kv_blocks,
                                        .max_step_tokens = action.max_step_tokens});
}

void ClusterControl::Do(DialFirstStage& action) {
  dial_epoch_ = action.epoch;
  dial_loop_.Post([this, action, revision = registry_->kernel_revision()] {
    if (dial_epoch_ == action.epoch) Dial(action.epoch, action.address, revision);
  });
}

void ClusterControl::Do(EndEpoch& action) {
  dial_epoch_ = 0;
  spdlog::warn("epoch {} ended: {}", action.epoch, std::string(action.reason.message()));
  pipeline_->EndEpoch(action.reason);
}

// On the dialling thread.
void ClusterControl::Dial(uint64_t epoch, const std::string& address,
                          const std::string& kernel_revision) {
  v1::LinkHello hello;
  hello.set_protocol_version(kProtocolVersion);
  hello.set_epoch(epoch);
  hello.set_model_hash(options_.registry.model_hash);
  hello.set_kernel_revision(kernel_revision);
  hello.set_to_stage(0);
  hello.set_d_model(options_.d_model);
  auto fail = [this, epoch](const absl::Status& reason) {
    loop_.Post([this, epoch, reason] {
      registry_->EpochFailed(epoch, reason, Now());
      Apply();
    });
  };
  auto sender = dialer_->Dial(address, hello, kDialTimeout, [fail](const absl::Status& reason) {
    fail(absl::UnavailableError("the link to stage 0 broke: " + std::string(reason.message())));
  });
  if (!sender.ok()) {
    fail(absl::UnavailableError(fmt::format("cannot reach stage 0 at {}: {}", address,
                                            std::string(sender.status().message()))));
    return;
  }
  pipeline_->StartEpoch(epoch, std::move(*sender));
  loop_.Post([this, epoch] {
    registry_->Dialled(epoch);
    Apply();
  });
}

void ClusterControl::Publish() {
  const absl::Status readiness = registry_->Readiness();
  {
    absl::MutexLock lock(&mu_);
    readiness_ = readiness;
    kernel_revision_ = registry_->kernel_revision();
  }
  pipeline_->SetStreaming(registry_->streaming());
  if (readiness.ok() == serving_) return;
  serving_ = readiness.ok();
  if (serving_) {
    spdlog::info("epoch {}: serving on {} stages", registry_->epoch(), options_.registry.workers);
  } else {
    spdlog::warn("not serving: {}", std::string(readiness.message()));
  }
  if (options_.on_serving != nullptr) options_.on_serving(serving_);
}

}  // namespace stagecoach
