// For tests of the coordinator over real gRPC, with real workers in the same process.
#ifndef STAGECOACH_COORDINATOR_SERVICE_FIXTURE_H_
#define STAGECOACH_COORDINATOR_SERVICE_FIXTURE_H_

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "coordinator/coordinator.h"
#include "kernels/cpu/cpu_backend.h"
#include "model/test_paths.h"
#include "proto/inference.grpc.pb.h"
#include "worker/control_client.h"
#include "worker/link/grpc_link.h"
#include "worker/worker_node.h"

namespace stagecoach {

inline const std::string kModelPath = TestDataPath("demo-Q4_K_M.gguf");
inline constexpr char kPrompt[] = "[INST] Tell me a story about a fox and a lantern. [/INST]";
inline constexpr size_t kMaxMessageBytes = 64 << 20;
inline constexpr absl::Duration kPatience = absl::Seconds(60);

template <typename Condition>
bool Eventually(Condition condition) {
  const absl::Time end = absl::Now() + kPatience;
  while (!condition()) {
    if (absl::Now() > end) return false;
    absl::SleepFor(absl::Milliseconds(10));
  }
  return true;
}

// A worker process without the process.
class TestWorker {
 public:
  TestWorker(const std::string& coordinator, const std::string& name,
             std::shared_ptr<const ModelFile> model)
      : backend_(MakeCpuBackend({.threads = 1})),
        dialer_(MakeGrpcLinkDialer(kMaxMessageBytes)),
        node_(backend_.get(), model, dialer_.get(), {.name = name}),
        links_(&node_, kMaxMessageBytes) {
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    links_.Register(builder);
    server_ = builder.BuildAndStart();
    const BackendInfo info = backend_->info();
    v1::WorkerHello hello;
    hello.set_protocol_version(kProtocolVersion);
    hello.set_worker(name);
    hello.set_data_address("127.0.0.1:" + std::to_string(port));
    hello.set_backend(info.kind);
    hello.set_kernel_revision(info.kernel_revision);
    hello.set_model_hash(model->hash());
    hello.set_memory_bytes(1 << 30);
    hello.add_transports("grpc");
    client_ = std::make_unique<ControlClient>(coordinator, hello, &node_);
    thread_ = std::thread([this] { (void)client_->Run(); });
  }

  ~TestWorker() {
    client_->Stop();
    thread_.join();
    node_.Shutdown();
    links_.Shutdown();
    server_->Shutdown();
  }

 private:
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<LinkDialer> dialer_;
  WorkerNode node_;
  GrpcLinkService links_;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<ControlClient> client_;
  std::thread thread_;
};

// A coordinator, a stub of its services, and workers by name.
class TestCluster {
 public:
  explicit TestCluster(CoordinatorOptions options) {
    model_ = *ModelFile::Open(kModelPath);
    options.listen = "127.0.0.1:0";
    auto coordinator =
        Coordinator::Start(model_, *Tokenizer::Create(model_->gguf()), std::move(options));
    EXPECT_TRUE(coordinator.ok()) << coordinator.status();
    coordinator_ = *std::move(coordinator);
    channel_ = grpc::CreateChannel(coordinator_->address(), grpc::InsecureChannelCredentials());
    stub_ = v1::Inference::NewStub(channel_);
  }

  void StartWorker(const std::string& name) {
    workers_[name] = std::make_unique<TestWorker>(coordinator_->address(), name, model_);
  }
  void StopWorker(const std::string& name) { workers_.erase(name); }

  v1::GetStatusResponse Status() {
    grpc::ClientContext context;
    context.set_wait_for_ready(true);  // a first attempt to connect may fail
    context.set_deadline(absl::ToChronoTime(absl::Now() + kPatience));
    v1::GetStatusResponse response;
    const grpc::Status status = stub_->GetStatus(&context, {}, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return response;
  }
  bool Serving() { return Status().state() == v1::SERVICE_STATE_SERVING; }
  bool Idle() {
    const v1::GetStatusResponse status = Status();
    return status.running() + status.waiting() == 0;
  }

  v1::Inference::Stub& stub() { return *stub_; }
  Coordinator& coordinator() { return *coordinator_; }
  const std::shared_ptr<grpc::Channel>& channel() { return channel_; }
  const ModelFile& model() { return *model_; }

 private:
  std::shared_ptr<const ModelFile> model_;
  std::unique_ptr<Coordinator> coordinator_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::Inference::Stub> stub_;
  std::map<std::string, std::unique_ptr<TestWorker>> workers_;
};

struct Generation {
  grpc::Status status;
  std::string text;
  std::vector<int32_t> ids;
  std::vector<float> logprobs;
  std::vector<v1::GeneratedToken> tokens;
  v1::GenerateEvent last;
  std::multimap<std::string, std::string> trailers;
};

inline Generation Generate(v1::Inference::Stub& stub, const v1::GenerateRequest& request,
                           absl::Duration timeout = kPatience) {
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
  auto reader = stub.Generate(&context, request);
  Generation generation;
  v1::GenerateEvent event;
  while (reader->Read(&event)) {
    generation.text += event.text();
    for (const v1::GeneratedToken& token : event.tokens()) {
      EXPECT_EQ(token.index(), generation.ids.size());
      generation.ids.push_back(token.token_id());
      generation.logprobs.push_back(token.logprob().logprob());
      generation.tokens.push_back(token);
    }
    generation.last = event;
  }
  generation.status = reader->Finish();
  for (const auto& [key, value] : context.GetServerTrailingMetadata()) {
    generation.trailers.emplace(std::string(key.data(), key.size()),
                                std::string(value.data(), value.size()));
  }
  return generation;
}

inline v1::GenerateRequest Story(uint32_t max_tokens) {
  v1::GenerateRequest request;
  request.set_text(kPrompt);
  request.set_max_tokens(max_tokens);
  request.set_ignore_eos(true);
  return request;
}

// Whether the standard health service calls `service` serving.
inline bool Healthy(const std::shared_ptr<grpc::Channel>& channel, const std::string& service) {
  // grpc.health.v1.HealthCheckRequest{service = 1} and Response{status = 1; SERVING = 1}, written
  // and read by hand: the stubs are not part of the installed library.
  std::string bytes;
  if (!service.empty()) bytes = std::string("\x0a") + static_cast<char>(service.size()) + service;
  grpc::Slice slice(bytes);
  const grpc::ByteBuffer request(&slice, 1);
  grpc::ByteBuffer response;
  grpc::ClientContext context;
  grpc::Status status;
  absl::Notification done;
  grpc::GenericStub(channel).UnaryCall(&context, "/grpc.health.v1.Health/Check", {}, &request,
                                       &response, [&](grpc::Status result) {
                                         status = std::move(result);
                                         done.Notify();
                                       });
  done.WaitForNotification();
  EXPECT_TRUE(status.ok()) << status.error_message();
  std::vector<grpc::Slice> slices;
  if (!status.ok() || !response.Dump(&slices).ok() || slices.empty()) return false;
  const std::string answer(reinterpret_cast<const char*>(slices[0].begin()), slices[0].size());
  EXPECT_EQ(answer.substr(0, 1), "\x08");
  return answer == "\x08\x01";
}

}  // namespace stagecoach

#endif  // STAGECOACH_COORDINATOR_SERVICE_FIXTURE_H_
