// What the registry tells of itself: readiness, and the status of each stage.
#include <algorithm>
#include <string>

#include "coordinator/registry.h"
#include "coordinator/worker_check.h"
#include "fmt/format.h"

namespace stagecoach {
namespace {

std::string LayerRange(int first, int last) {
  return last - first == 1 ? fmt::format("layer {}", first)
                           : fmt::format("layers {}-{}", first, last - 1);
}

}  // namespace

bool Registry::seated(const std::string& name) const {
  return std::find(seats_.begin(), seats_.end(), name) != seats_.end();
}

int Registry::stage_of(const std::string& name) const {
  if (!plan_.has_value()) return -1;
  auto it = std::find(seats_.begin(), seats_.end(), name);
  return it == seats_.end() ? -1 : static_cast<int>(it - seats_.begin());
}

std::string Registry::LayersOf(const std::string& name) const {
  const int stage = stage_of(name);
  if (stage < 0) return "no layers";
  return LayerRange(plan_->stages[stage].first_layer, plan_->stages[stage].last_layer);
}

std::string Registry::MissingLayers() const {
  if (!plan_.has_value()) return LayerRange(0, options_.layers);
  std::string missing;
  for (size_t i = 0; i < seats_.size(); ++i) {
    const Worker* worker = FindByName(seats_[i]);
    if (worker != nullptr && worker->usable()) continue;
    missing += fmt::format("{}{} (stage {}, worker '{}')", missing.empty() ? "" : ", ",
                           LayersOf(seats_[i]), i, seats_[i]);
  }
  return missing;
}

std::string Registry::WaitingDetail() const {
  const int usable = UsableWorkers();
  std::string detail;
  if (usable < options_.workers) {
    detail = fmt::format("waiting for workers: {} of {} joined; no stage serves {}", usable,
                         options_.workers, MissingLayers());
  } else if (!plan_error_.ok()) {
    detail = fmt::format("the joined workers cannot hold the model: {}",
                         std::string(plan_error_.message()));
  } else {
    detail = fmt::format("{}; trying again", std::string(last_failure_.message()));
  }
  for (const auto& [name, worker] : workers_) {
    if (!worker.unfit.empty()) {
      detail += fmt::format("; worker '{}' cannot serve: {}", name, worker.unfit);
    }
  }
  return detail;
}

std::string Registry::LinkingDetail() const {
  if (phase_ == Phase::kDialling) {
    return fmt::format("no stage serves yet: connecting to stage 0, worker '{}'", seats_[0]);
  }
  std::string detail = "no stage serves yet: the stages are linking; waiting for";
  for (const std::string& name : seats_) {
    const auto& heartbeat = workers_.at(name).heartbeat;
    if (heartbeat->epoch() == epoch_ && heartbeat->links_ready()) continue;
    detail += fmt::format(" worker '{}' ({}){}{}", name, LayersOf(name),
                          heartbeat->detail().empty() ? "" : ": ", heartbeat->detail());
  }
  return detail;
}

// UNAVAILABLE naming the first stage whose storage does not answer.
absl::Status Registry::StallStatus() const {
  for (size_t i = 0; i < seats_.size(); ++i) {
    const auto& heartbeat = workers_.at(seats_[i]).heartbeat;
    if (!heartbeat->stalled()) continue;
    return absl::UnavailableError(
        fmt::format("stage {}, worker '{}' ({}) is held up by storage: {}", i, seats_[i],
                    LayersOf(seats_[i]), heartbeat->detail()));
  }
  return absl::OkStatus();
}

absl::Status Registry::Readiness() const {
  switch (phase_) {
    case Phase::kServing:
      return StallStatus();
    case Phase::kLinking:
    case Phase::kDialling:
      return absl::UnavailableError(LinkingDetail());
    case Phase::kFailing:
      return absl::UnavailableError(std::string(failure_.message()));
    case Phase::kWaiting:
      break;
  }
  return absl::UnavailableError(WaitingDetail());
}

bool Registry::streaming() const {
  return std::any_of(seats_.begin(), seats_.end(), [this](const std::string& name) {
    const Worker* worker = FindByName(name);
    return worker != nullptr && worker->heartbeat.has_value() &&
           worker->heartbeat->weights().streaming();
  });
}

void Registry::FillStatus(v1::GetStatusResponse* response) const {
  response->set_state(phase_ == Phase::kServing   ? v1::SERVICE_STATE_SERVING
                      : phase_ == Phase::kWaiting ? v1::SERVICE_STATE_WAITING
                                                  : v1::SERVICE_STATE_LOADING);
  response->set_detail(std::string(Readiness().message()));
  response->set_epoch(epoch_);
  if (!plan_.has_value()) return;
  for (size_t i = 0; i < seats_.size(); ++i) {
    v1::StageStatus* stage = response->add_stages();
    stage->set_stage(static_cast<uint32_t>(i));
    stage->set_worker(seats_[i]);
    stage->set_first_layer(plan_->stages[i].first_layer);
    stage->set_last_layer(plan_->stages[i].last_layer);
    stage->set_has_embedding(i == 0);
    stage->set_has_head(i + 1 == seats_.size());
    if (const Worker* worker = FindByName(seats_[i])) {
      FillStageStatus(worker->hello, worker->heartbeat, stage);
      if (!worker->unfit.empty()) stage->set_detail(worker->unfit);
    } else {
      stage->set_detail("no worker");
    }
  }
}

}  // namespace stagecoach
