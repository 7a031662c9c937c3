// For tests of the registry: workers in short, actions sorted by kind.
#ifndef STAGECOACH_COORDINATOR_REGISTRY_FIXTURE_H_
#define STAGECOACH_COORDINATOR_REGISTRY_FIXTURE_H_

#include <gtest/gtest.h>

#include <chrono>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "coordinator/registry.h"
#include "worker/link/frame.h"

namespace stagecoach {

inline constexpr int kLayers = 32;
inline constexpr int64_t kMemory = 1 << 30;

// Even ranges; a worker under 1000 bytes holds nothing.
inline constexpr int kKvBlocks = 19;
inline constexpr int kStepTokens = 64;

inline absl::StatusOr<Plan> EvenPlan(const std::vector<WorkerCapacity>& workers) {
  Plan plan{.kv_blocks = kKvBlocks, .max_step_tokens = kStepTokens};
  const int n = static_cast<int>(workers.size());
  for (int i = 0; i < n; ++i) {
    if (workers[i].memory_bytes < 1000) return absl::ResourceExhaustedError("too small");
    plan.stages.push_back({.worker = workers[i].worker,
                           .first_layer = kLayers * i / n,
                           .last_layer = kLayers * (i + 1) / n});
  }
  return plan;
}

inline v1::WorkerHello Hello(const std::string& name) {
  v1::WorkerHello hello;
  hello.set_protocol_version(kProtocolVersion);
  hello.set_worker(name);
  hello.set_data_address(name + ".host:1");
  hello.set_backend("cpu");
  hello.set_kernel_revision("cpu-1");
  hello.set_model_hash("hash");
  hello.set_memory_bytes(kMemory);
  hello.add_transports("grpc");
  return hello;
}

inline v1::WorkerMessage Message(const v1::WorkerHello& hello) {
  v1::WorkerMessage message;
  *message.mutable_hello() = hello;
  return message;
}

inline v1::WorkerMessage Heartbeat(uint64_t epoch, bool links_ready) {
  v1::WorkerMessage message;
  message.mutable_heartbeat()->set_epoch(epoch);
  message.mutable_heartbeat()->set_links_ready(links_ready);
  return message;
}

class RegistryTest : public testing::Test {
 protected:
  void Make(int workers) {
    RegistryOptions options;
    options.workers = workers;
    options.layers = kLayers;
    options.limits = {.max_slots = 4, .max_context = 128, .kv = {.type = KvType::kQ8_0}};
    options.model_hash = "hash";
    options.results_address = "coordinator:1";
    options.plan = [this](const std::vector<WorkerCapacity>& workers) {
      ++plans_;
      planned_ = workers;
      return EvenPlan(workers);
    };
    registry_ = std::make_unique<Registry>(std::move(options));
  }

  void Apply() {
    for (RegistryAction& action : registry_->TakeActions()) {
      if (auto* send = std::get_if<SendToWorker>(&action)) {
        if (send->message.has_welcome()) ++welcomes_;
        if (send->message.has_release()) released_.push_back(send->stream);
        if (send->message.has_assignment()) assigned_[send->stream] = send->message.assignment();
      } else if (auto* close = std::get_if<CloseStream>(&action)) {
        closed_[close->stream] = close->reason;
      } else if (auto* dial = std::get_if<DialFirstStage>(&action)) {
        dialled_.push_back(dial->address);
      } else if (auto* expect = std::get_if<ExpectResults>(&action)) {
        expected_ = expect->epoch;
        EXPECT_EQ(expect->epoch, registry_->epoch());
        EXPECT_EQ(expect->kv_blocks, kKvBlocks);
        EXPECT_EQ(expect->max_step_tokens, kStepTokens);
      } else if (auto* end = std::get_if<EndEpoch>(&action)) {
        ended_.push_back(std::string(end->reason.message()));
        EXPECT_EQ(end->reason.code(), absl::StatusCode::kUnavailable);
      }
    }
  }

  StreamId Greet(const v1::WorkerHello& hello) {
    const StreamId stream = ++streams_;
    registry_->Opened(stream, now_);
    registry_->Received(stream, Message(hello), now_);
    Apply();
    return stream;
  }

  void Beat(StreamId stream, uint64_t epoch, bool ready) {
    registry_->Received(stream, Heartbeat(epoch, ready), now_);
    Apply();
  }

  StreamId Join(const v1::WorkerHello& hello, uint64_t epoch = 0) {
    const StreamId stream = Greet(hello);
    Beat(stream, epoch, false);
    return stream;
  }
  StreamId Join(const std::string& name) { return Join(Hello(name)); }

  // All links of the current epoch become ready.
  void Serve(const std::vector<StreamId>& streams) {
    for (StreamId stream : streams) Beat(stream, registry_->epoch(), true);
    registry_->Dialled(registry_->epoch());
    ASSERT_TRUE(registry_->Readiness().ok()) << registry_->Readiness();
  }

  void Close(StreamId stream) {
    registry_->Closed(stream, absl::CancelledError("reset"), now_);
    Apply();
  }

  void Advance(std::chrono::milliseconds by) {
    now_ += by;
    registry_->Tick(now_);
    Apply();
  }

  std::string Detail() const { return std::string(registry_->Readiness().message()); }

  std::unique_ptr<Registry> registry_;
  MonotonicTime now_{std::chrono::hours(1)};
  StreamId streams_ = 0;
  int plans_ = 0;
  std::vector<WorkerCapacity> planned_;  // the latest ones
  int welcomes_ = 0;
  uint64_t expected_ = 0;
  std::map<StreamId, v1::Assignment> assigned_;
  std::map<StreamId, absl::Status> closed_;
  std::vector<StreamId> released_;
  std::vector<std::string> dialled_;
  std::vector<std::string> ended_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_COORDINATOR_REGISTRY_FIXTURE_H_
