#include "worker/control_client.h"

#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>

#include <functional>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "fmt/format.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "model/test_paths.h"
#include "proto/cluster.grpc.pb.h"
#include "worker/link/in_process_link.h"

namespace stagecoach {
namespace {

constexpr absl::Duration kTimeout = absl::Seconds(20);

using JoinStream = grpc::ServerReaderWriter<v1::CoordinatorMessage, v1::WorkerMessage>;

// Each call of Join runs the next script; the last one is repeated.
class FakeCoordinator : public v1::Cluster::Service {
 public:
  using Script = std::function<grpc::Status(JoinStream*, const v1::WorkerHello&)>;

  explicit FakeCoordinator(std::vector<Script> scripts) : scripts_(std::move(scripts)) {
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port_);
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
  }
  std::string address() const { return fmt::format("127.0.0.1:{}", port_); }
  size_t joins() {
    absl::MutexLock lock(&mu_);
    return joins_;
  }

  grpc::Status Join(grpc::ServerContext*, JoinStream* stream) override {
    Script script;
    {
      absl::MutexLock lock(&mu_);
      script = scripts_[std::min(joins_, scripts_.size() - 1)];
      ++joins_;
    }
    v1::WorkerMessage message;
    if (!stream->Read(&message) || !message.has_hello()) {
      return grpc::Status(grpc::StatusCode::INVALID_ARGUMENT, "no hello");
    }
    return script(stream, message.hello());
  }

 private:
  const std::vector<Script> scripts_;
  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
  absl::Mutex mu_;
  size_t joins_ ABSL_GUARDED_BY(mu_) = 0;
};

void Welcome(JoinStream* stream) {
  v1::CoordinatorMessage message;
  message.mutable_welcome()->set_protocol_version(kProtocolVersion);
  stream->Write(message);
}

// The first heartbeat that satisfies `wanted`; false if the stream ended before.
bool AwaitHeartbeat(JoinStream* stream,
                    const std::function<bool(const v1::WorkerHeartbeat&)>& wanted) {
  v1::WorkerMessage message;
  while (stream->Read(&message)) {
    if (message.has_heartbeat() && wanted(message.heartbeat())) return true;
  }
  return false;
}

class ControlClientTest : public testing::Test {
 protected:
  absl::Status Run(const std::string& address) {
    v1::WorkerHello hello;
    hello.set_worker("w0");
    client_ = std::make_unique<ControlClient>(address, hello, &node_);
    return client_->Run();
  }
  ~ControlClientTest() override { node_.Shutdown(); }

  std::shared_ptr<const ModelFile> model_ =
      ModelFile::Open(TestDataPath("demo2-Q8_0.gguf")).value();
  std::unique_ptr<Backend> backend_ = MakeCpuBackend({.threads = 1});
  InProcessHub hub_;
  WorkerNode node_{backend_.get(), model_, &hub_, WorkerOptions{.name = "w0"}};
  std::unique_ptr<ControlClient> client_;
};

TEST_F(ControlClientTest, ARefusalIsFinal) {
  for (const auto code :
       {grpc::StatusCode::FAILED_PRECONDITION, grpc::StatusCode::INVALID_ARGUMENT}) {
    FakeCoordinator coordinator({[&](JoinStream*, const v1::WorkerHello& hello) {
      EXPECT_EQ(hello.worker(), "w0");
      return grpc::Status(code, "another model");
    }});
    const absl::Status status = Run(coordinator.address());
    EXPECT_EQ(static_cast<int>(status.code()), static_cast<int>(code)) << status;
    EXPECT_EQ(status.message(), "another model");
    EXPECT_EQ(coordinator.joins(), 1u);
  }
}

TEST_F(ControlClientTest, JoinsAgainAfterALossAndGivesUpWhenFencedOff) {
  bool assigned = false;
  FakeCoordinator coordinator({
      [](JoinStream*, const v1::WorkerHello&) {  // before the welcome: try again
        return grpc::Status(grpc::StatusCode::UNAVAILABLE, "starting");
      },
      [&](JoinStream* stream, const v1::WorkerHello&) {
        Welcome(stream);
        v1::CoordinatorMessage message;
        v1::Assignment& assignment = *message.mutable_assignment();
        assignment.set_epoch(3);
        assignment.set_stages(1);
        assignment.set_last_layer(static_cast<uint32_t>(model_->params().layers));
        assignment.set_next_hop("nowhere");
        assignment.set_max_slots(1);
        assignment.set_max_context(32);
        assignment.set_kv_blocks(1);
        assignment.set_max_step_tokens(8);
        stream->Write(message);
        assigned = AwaitHeartbeat(stream, [](const auto& beat) { return beat.epoch() == 3; });
        return grpc::Status(grpc::StatusCode::UNAVAILABLE, "going away");
      },
      [&](JoinStream* stream, const v1::WorkerHello&) {
        Welcome(stream);
        // The assignment is over, its epoch is remembered and its weights are kept.
        EXPECT_TRUE(AwaitHeartbeat(stream, [](const auto& beat) {
          EXPECT_EQ(beat.epoch(), 3u);
          EXPECT_FALSE(beat.links_ready());
          EXPECT_GT(beat.units_size(), 0);
          return true;
        }));
        return grpc::Status(grpc::StatusCode::ABORTED, "a newer stream");
      },
  });
  const absl::Status status = Run(coordinator.address());
  EXPECT_EQ(status, absl::AbortedError("a newer stream"));
  EXPECT_TRUE(assigned);
  EXPECT_EQ(coordinator.joins(), 3u);
}

TEST_F(ControlClientTest, BeatsRegularlyAndReportsFailures) {
  FakeCoordinator coordinator({[](JoinStream* stream, const v1::WorkerHello&) {
    Welcome(stream);
    const absl::Time start = absl::Now();
    for (int i = 0; i < 3; ++i) AwaitHeartbeat(stream, [](const auto&) { return true; });
    EXPECT_GE(absl::Now() - start, kHeartbeatInterval);  // the first one comes at once
    EXPECT_LE(absl::Now() - start, 10 * kHeartbeatInterval);
    v1::CoordinatorMessage message;
    message.mutable_assignment()->set_epoch(1);
    message.mutable_assignment()->set_last_layer(1000);
    stream->Write(message);
    v1::WorkerMessage answer;
    while (stream->Read(&answer) && !answer.has_assignment_failed()) {
    }
    EXPECT_EQ(answer.assignment_failed().epoch(), 1u);
    EXPECT_EQ(answer.assignment_failed().status_code(),
              static_cast<uint32_t>(absl::StatusCode::kInvalidArgument));
    return grpc::Status(grpc::StatusCode::ABORTED, "done");
  }});
  EXPECT_EQ(Run(coordinator.address()), absl::AbortedError("done"));
}

TEST_F(ControlClientTest, StopEndsARunInAnyState) {
  {
    FakeCoordinator coordinator({[](JoinStream* stream, const v1::WorkerHello&) {
      Welcome(stream);
      AwaitHeartbeat(stream, [](const auto&) { return false; });
      return grpc::Status::OK;
    }});
    std::thread stopper([&] {
      while (coordinator.joins() == 0) absl::SleepFor(absl::Milliseconds(1));
      absl::SleepFor(absl::Milliseconds(50));
      client_->Stop();
    });
    EXPECT_TRUE(Run(coordinator.address()).ok());
    stopper.join();
  }
  const absl::Time start = absl::Now();
  std::thread stopper([&] {  // nobody listens there: between two attempts
    absl::SleepFor(absl::Milliseconds(300));
    client_->Stop();
  });
  EXPECT_TRUE(Run("127.0.0.1:1").ok());
  stopper.join();
  EXPECT_LT(absl::Now() - start, kTimeout);
}

}  // namespace
}  // namespace stagecoach
