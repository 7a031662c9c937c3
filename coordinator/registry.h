// Which workers there are and which of them make up the current epoch. A pure state machine:
// events and the time go in, actions come out; no thread, socket or clock inside.
//
// An epoch goes waiting -> linking -> dialling -> serving. Any loss or failure ends it and leads
// back to waiting; what then has a worker for every stage is planned as the next epoch. A worker
// keeps its stage and, as long as memory allows, its layers over epochs, so that its resident
// weights stay of use; only holes are filled, by a restarted worker or by a spare.
#ifndef STAGECOACH_COORDINATOR_REGISTRY_H_
#define STAGECOACH_COORDINATOR_REGISTRY_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/planner.h"
#include "proto/cluster.pb.h"
#include "proto/inference.pb.h"

namespace stagecoach {

using StreamId = uint64_t;  // of one control stream (Cluster.Join); never used twice
using MonotonicTime = std::chrono::steady_clock::time_point;

// What the registry's owner has to do, in the order given.
struct SendToWorker {
  StreamId stream = 0;
  v1::CoordinatorMessage message;
};
struct CloseStream {
  StreamId stream = 0;
  absl::Status reason;
};
struct ExpectResults {  // of an epoch whose last stage will dial the coordinator
  uint64_t epoch = 0;
  int stages = 0;
  int kv_blocks = 0;        // that its scheduler may hand out
  int max_step_tokens = 0;  // rows of its steps
};
struct DialFirstStage {  // then report Dialled or EpochFailed
  uint64_t epoch = 0;
  std::string address;
};
struct EndEpoch {
  uint64_t epoch = 0;
  absl::Status reason;  // UNAVAILABLE
};
using RegistryAction =
    std::variant<SendToWorker, CloseStream, ExpectResults, DialFirstStage, EndEpoch>;

struct RegistryOptions {
  int workers = 1;  // stages to plan
  int layers = 0;   // of the model
  PlanLimits limits;
  std::string model_hash;
  std::string results_address;  // where the last stage sends its results
  // In the order of the stages; see MakePlan.
  std::function<absl::StatusOr<Plan>(const std::vector<WorkerCapacity>&)> plan;
};

// Not thread-safe. Events about streams that are not open are ignored.
class Registry {
 public:
  explicit Registry(RegistryOptions options);

  // --- Events.
  void Opened(StreamId stream, MonotonicTime now);
  void Received(StreamId stream, const v1::WorkerMessage& message, MonotonicTime now);
  void Closed(StreamId stream, const absl::Status& reason, MonotonicTime now);
  void Dialled(uint64_t epoch);  // the pipeline is stepping now
  // A link of the epoch broke, or a stage refused a step.
  void EpochFailed(uint64_t epoch, const absl::Status& reason, MonotonicTime now);
  void Tick(MonotonicTime now);  // at least every 100 ms

  std::vector<RegistryAction> TakeActions();  // since the last call

  // --- State.
  // Ok while serving; else UNAVAILABLE saying which workers and layers are missing, or which read
  // of weights storage does not answer.
  absl::Status Readiness() const;
  // Fills in state, detail, epoch and stages.
  void FillStatus(v1::GetStatusResponse* response) const;
  uint64_t epoch() const { return epoch_; }
  bool streaming() const;  // some stage of the latest plan streams its weights
  // Backend numerics that all joined workers share; empty while there are none.
  const std::string& kernel_revision() const { return kernel_revision_; }

 private:
  enum class Phase { kWaiting, kLinking, kDialling, kServing, kFailing };
  struct Worker {
    StreamId stream = 0;
    v1::WorkerHello hello;
    MonotonicTime last_heard;
    // The first one tells which epoch the worker comes from; it is not planned before that.
    std::optional<v1::WorkerHeartbeat> heartbeat;
    bool nccl_failed = false;  // since it joined: its links do without, if they may
    std::string unfit;         // why it cannot be planned until it joins again; empty = it can
    bool usable() const { return heartbeat.has_value() && unfit.empty(); }
  };

  void OnHello(StreamId stream, const v1::WorkerHello& hello, MonotonicTime now);
  void OnHeartbeat(Worker& worker, const v1::WorkerHeartbeat& heartbeat, MonotonicTime now);
  void OnAssignmentFailed(Worker& worker, const v1::AssignmentFailed& failed, MonotonicTime now);
  absl::Status CheckHello(const v1::WorkerHello& hello) const;
  absl::Status CheckFleet(const v1::WorkerHello& hello) const;

  Worker* FindByStream(StreamId stream);
  const Worker* FindByName(const std::string& name) const;
  void Close(StreamId stream, const absl::Status& reason);
  void Lose(const std::string& name, const std::string& why, MonotonicTime now);
  void EndCurrentEpoch(const absl::Status& reason);
  void EndFailedEpoch(const absl::Status& reason, MonotonicTime now);  // and try again later
  void Backoff(MonotonicTime now);

  void TryPlan(MonotonicTime now);
  int UsableWorkers() const;
  bool FillSeats();
  absl::StatusOr<Plan> PlanSeats();
  std::optional<Plan> KeepRanges() const;
  v1::Transport TransportBetween(int stage, int next) const;
  void BeginEpoch(MonotonicTime now);
  void CheckLinks();

  bool seated(const std::string& name) const;
  int stage_of(const std::string& name) const;  // -1 = none in the current plan
  std::string LayersOf(const std::string& name) const;
  std::string WaitingDetail() const;
  std::string MissingLayers() const;
  std::string LinkingDetail() const;
  absl::Status StallStatus() const;

  const RegistryOptions options_;
  std::vector<RegistryAction> actions_;
  std::map<StreamId, MonotonicTime> greeting_;  // opened, no hello yet
  std::map<std::string, Worker> workers_;       // by name
  std::string backend_, kernel_revision_;       // of the joined workers

  Phase phase_ = Phase::kWaiting;
  uint64_t epoch_ = 0;
  uint64_t epoch_floor_ = 0;             // the next epoch is later than this
  std::vector<std::string> seats_;       // worker of each stage; a hole if it is not usable
  std::optional<Plan> plan_;             // the latest one
  std::vector<WorkerCapacity> planned_;  // its workers
  MonotonicTime linking_since_;
  MonotonicTime failing_since_;
  absl::Status failure_;       // kFailing
  bool plan_changed_ = true;   // workers came or went since the last attempt
  absl::Status plan_error_;    // of the last attempt
  absl::Status last_failure_;  // of the last epoch that failed without losing a worker
  MonotonicTime not_before_;   // of the next epoch
  std::chrono::milliseconds replan_delay_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_COORDINATOR_REGISTRY_H_
