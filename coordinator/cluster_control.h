// Carries out what the registry decides: the one thread on which workers come and go, epochs begin
// and end.
#ifndef STAGECOACH_COORDINATOR_CLUSTER_CONTROL_H_
#define STAGECOACH_COORDINATOR_CLUSTER_CONTROL_H_

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "coordinator/cluster_service.h"
#include "coordinator/event_loop.h"
#include "coordinator/pipeline.h"
#include "coordinator/registry.h"
#include "proto/inference.pb.h"
#include "worker/link/stage_link.h"

namespace stagecoach {

// Thread-safe.
class ClusterControl : public ControlStreamHandler {
 public:
  struct Options {
    RegistryOptions registry;  // results_address is Start's
    int d_model = 0;
    // Called on the control thread when serving starts and ends.
    std::function<void(bool serving)> on_serving;
  };

  // `pipeline` and `dialer` must outlive this object. Sets the pipeline's failure callback.
  ClusterControl(Options options, Pipeline* pipeline, LinkDialer* dialer);
  ~ClusterControl() override;  // Shutdown()

  grpc::Service* service() { return &service_; }
  // Begins to hear workers. results_address: where the last stage reaches this coordinator. What
  // arrived earlier waits until now. Call once.
  void Start(const std::string& results_address);

  // Registry::Readiness as of now.
  absl::Status Readiness() const;
  // Of the workers that make up the epoch; empty before the first.
  std::string kernel_revision() const;
  // Calls `done` on the control thread with Registry::FillStatus's fields, or at once (empty) after
  // Shutdown.
  void GetStatus(std::function<void(v1::GetStatusResponse)> done);

  // Closes all control streams and ends the epoch. Idempotent.
  void Shutdown();

  void OnOpen(StreamId stream, const std::string& peer) override;
  void OnMessage(StreamId stream, v1::WorkerMessage message) override;
  void OnClosed(StreamId stream, const absl::Status& reason) override;

 private:
  // All below: on the control thread.
  void Apply();  // the registry's actions, then publishes its state
  void Do(SendToWorker& action);
  void Do(CloseStream& action);
  void Do(ExpectResults& action);
  void Do(DialFirstStage& action);
  void Do(EndEpoch& action);
  void Dial(uint64_t epoch, const std::string& address, const std::string& kernel_revision);
  void Publish();
  void LogMessage(StreamId stream, const v1::WorkerMessage& message);

  const Options options_;
  Pipeline* const pipeline_;
  LinkDialer* const dialer_;

  std::atomic<uint64_t> dial_epoch_{0};  // the epoch whose stage 0 is wanted
  ClusterService service_;

  mutable absl::Mutex mu_;
  absl::Status readiness_ ABSL_GUARDED_BY(mu_);
  std::string kernel_revision_ ABSL_GUARDED_BY(mu_);

  // On the control thread only.
  std::optional<Registry> registry_;       // from Start on
  std::map<StreamId, std::string> names_;  // for logs: the worker, or its transport address
  bool serving_ = false;
  MonotonicTime last_refusal_log_{};
  uint64_t refusals_not_logged_ = 0;

  EventLoop dial_loop_;  // Dial blocks
  EventLoop loop_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_COORDINATOR_CLUSTER_CONTROL_H_
