// The life of one assignment on a worker: allocate the stage, dial the next hop, run frames.
#ifndef STAGECOACH_WORKER_EPOCH_RUN_H_
#define STAGECOACH_WORKER_EPOCH_RUN_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "kernels/backend.h"
#include "model/model_file.h"
#include "proto/cluster.pb.h"
#include "worker/layer_store.h"
#include "worker/link/device_channel.h"
#include "worker/link/stage_link.h"
#include "worker/stage.h"

namespace stagecoach {

// Of the worker, over all epochs.
struct StageCounters {
  std::atomic<uint64_t> steps = 0;
  std::atomic<uint64_t> tokens = 0;
  std::atomic<int64_t> compute_ns = 0;
  // For a frame of a sequence that was already being extended, or for the payload of a frame.
  std::atomic<int64_t> wait_ns = 0;
  std::atomic<uint64_t> dropped_frames = 0;
};

// What a run works with; all of it outlives the run.
struct EpochContext {
  std::string name;  // of the worker, for the log
  Backend* backend = nullptr;
  std::string kernel_revision;
  std::shared_ptr<const ModelFile> model;
  LayerStore* store = nullptr;
  LinkDialer* dialer = nullptr;
  DeviceTransport* transport = nullptr;  // null: payloads go in frames only
  StageCounters* counters = nullptr;
  // Called without locks, from any thread.
  std::function<void(const v1::AssignmentFailed&)> on_failed;
  std::function<void()> on_changed;  // links_ready or detail changed
};

// Thread-safe. Owns one thread, which runs the stage.
class EpochRun : public std::enable_shared_from_this<EpochRun> {
 public:
  // `predecessor` (may be null) has been stopped; the run joins it before it allocates anything.
  EpochRun(EpochContext context, v1::Assignment assignment, std::shared_ptr<EpochRun> predecessor);
  ~EpochRun();  // must have been joined, or never started

  void Start();
  // Breaks both links with `reason` and lets the thread end. Idempotent; does not wait.
  void Stop(const absl::Status& reason);
  void Join();

  const v1::Assignment& assignment() const { return assignment_; }

  // The inbound link. A newer one replaces an older one: a dialler that gave up while this side
  // accepted comes back with another link. Errors: ABORTED once the run has ended;
  // FAILED_PRECONDITION for an id (LinkHello.nccl_id) where none is due, or none where one is.
  absl::Status AcceptLink(uint64_t link, const std::string& nccl_id);
  void AttachBreaker(uint64_t link, LinkBreaker breaker);
  void Push(uint64_t link, Frame frame, CreditReturn credit);  // drops and counts strangers
  void LinkClosed(uint64_t link, const absl::Status& reason);

  bool links_ready() const;
  std::string detail() const;  // why it is not running, if it is not

 private:
  struct Work {
    Frame frame;
    CreditReturn credit;
  };
  // Whose fault ended the run: decides whether the coordinator is told to plan without us, or
  // without NCCL.
  enum class Fault { kOurs, kPeer, kNccl };

  void Main();
  absl::Status Prepare();
  absl::Status CheckTransports() const;
  absl::Status DialNextHop();
  absl::Status OpenChannels();
  absl::Status AwaitInboundId(std::string* id);
  void CloseChannels();
  void Serve();
  bool Running() const;
  bool NextWork(std::optional<Work>* work);
  absl::Status SubmitStep(std::optional<Work>* work);  // takes it if the stage does
  absl::Status FinishStep();                           // the earliest pending one
  absl::Status SendOn(std::optional<Frame> frame);
  void CountWait(const Frame& frame, std::chrono::steady_clock::time_point idle_since);
  void Fail(const absl::Status& reason, Fault fault);
  void SetDetail(std::string detail);
  void CancelChannels() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool InboundIdOrEnded() const ABSL_SHARED_LOCKS_REQUIRED(mu_) {
    return ended() || !inbound_id_.empty();
  }
  bool ended() const ABSL_SHARED_LOCKS_REQUIRED(mu_) { return stopping_ || failed_; }
  bool HasWorkOrEnded() const ABSL_SHARED_LOCKS_REQUIRED(mu_) { return ended() || !queue_.empty(); }

  // Constant after construction.
  const EpochContext context_;
  const v1::Assignment assignment_;
  const std::string log_prefix_;  // "[w0 stage 1]"

  // Used by the run's thread only (predecessor_ and thread_ are set before it starts).
  std::shared_ptr<EpochRun> predecessor_;
  std::unique_ptr<Stage> stage_;
  std::string outgoing_id_;  // of the channel to the next hop; empty = none
  Fault prepare_fault_ = Fault::kOurs;
  std::thread thread_;

  mutable absl::Mutex mu_;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  bool failed_ ABSL_GUARDED_BY(mu_) = false;
  bool links_ready_ ABSL_GUARDED_BY(mu_) = false;
  std::string detail_ ABSL_GUARDED_BY(mu_);
  uint64_t inbound_ ABSL_GUARDED_BY(mu_) = 0;    // 0 = none
  std::string inbound_id_ ABSL_GUARDED_BY(mu_);  // of the channel that belongs to it
  LinkBreaker break_inbound_ ABSL_GUARDED_BY(mu_);
  std::atomic<uint64_t> arrivals_ = 0;           // frames pushed
  std::deque<Work> queue_ ABSL_GUARDED_BY(mu_);  // bounded by the credits of one link
  std::shared_ptr<LinkSender> next_hop_ ABSL_GUARDED_BY(mu_);
  // Made, used and destroyed by the run's thread; others cancel them.
  std::unique_ptr<DeviceChannel> input_ ABSL_GUARDED_BY(mu_);
  std::unique_ptr<DeviceChannel> output_ ABSL_GUARDED_BY(mu_);
};

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_EPOCH_RUN_H_
