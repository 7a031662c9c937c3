#include "coordinator/coordinator.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <mutex>
#include <utility>

#include "coordinator/cluster_control.h"
#include "coordinator/inference_service.h"
#include "coordinator/limits.h"
#include "coordinator/pipeline.h"
#include "coordinator/planner.h"
#include "fmt/format.h"
#include "worker/link/frame.h"
#include "worker/link/grpc_link.h"

namespace stagecoach {
namespace {

constexpr absl::Duration kDrainPoll = absl::Milliseconds(20);
constexpr std::chrono::seconds kServerGrace{1};
// Even a probing client may not keep more than this busy beside the callback services.
constexpr int kMaxSyncPollers = 2;

// The links of last stages: what only the fleet of workers decides is checked here, the rest by the
// pipeline, which therefore is made for no kernel revision.
class ResultLinks : public LinkHandler {
 public:
  ResultLinks(Pipeline* pipeline, const ClusterControl* cluster)
      : pipeline_(pipeline), cluster_(cluster) {}

  absl::Status OnLink(uint64_t link, const v1::LinkHello& hello) override {
    if (hello.kernel_revision() != cluster_->kernel_revision()) {
      return absl::FailedPreconditionError("the link is of another kernel revision");
    }
    v1::LinkHello rest = hello;
    rest.clear_kernel_revision();
    return pipeline_->OnLink(link, rest);
  }
  void OnFrame(uint64_t link, Frame frame, CreditReturn credit) override {
    pipeline_->OnFrame(link, std::move(frame), std::move(credit));
  }
  void OnLinkClosed(uint64_t link, const absl::Status& reason) override {
    pipeline_->OnLinkClosed(link, reason);
  }

 private:
  Pipeline* const pipeline_;
  const ClusterControl* const cluster_;
};

struct HostPort {
  std::string host;
  int port = 0;
};

absl::StatusOr<HostPort> SplitHostPort(const std::string& name, const std::string& value) {
  const size_t colon = value.rfind(':');
  const std::string port = colon == std::string::npos ? "" : value.substr(colon + 1);
  const bool digits =
      !port.empty() && port.size() <= 5 &&
      std::all_of(port.begin(), port.end(), [](char c) { return c >= '0' && c <= '9'; });
  if (colon == 0 || !digits || std::stoi(port) > 65535) {
    return absl::InvalidArgumentError(fmt::format("{}: '{}' is not host:port", name, value));
  }
  return HostPort{value.substr(0, colon), std::stoi(port)};
}

std::string JoinHostPort(const std::string& host, int port) {
  return fmt::format("{}:{}", host, port);
}

std::string ReachableHost(const std::string& listen_host) {
  if (listen_host != "0.0.0.0" && listen_host != "[::]") return listen_host;
  char name[256] = {};
  return gethostname(name, sizeof(name) - 1) == 0 ? name : "localhost";
}

absl::Status CheckOptions(const CoordinatorOptions& options, const ModelParams& params) {
  const auto check = [](const char* name, int value, int low, int high) {
    if (value >= low && value <= high) return absl::OkStatus();
    return absl::InvalidArgumentError(
        fmt::format("--{}: {} is outside [{}, {}]", name, value, low, high));
  };
  for (const absl::Status& status :
       {check("workers", options.workers, 1, params.layers),
        check("max-slots", options.max_slots, 1, kMaxSlots),
        check("context", options.max_context, 2, params.context_length),
        check("step-tokens", options.max_step_tokens, 0, kMaxStepTokens),
        check("max-waiting", options.max_waiting, 0, 1 << 20)}) {
    if (!status.ok()) return status;
  }
  const int least = KvBlocksPerSequence({.max_context = options.max_context});
  if (options.kv.blocks != 0 && options.kv.blocks < least) {
    return absl::InvalidArgumentError(
        fmt::format("--kv-blocks: {} is less than the {} that one sequence of {} positions takes",
                    options.kv.blocks, least, options.max_context));
  }
  return absl::OkStatus();
}

void SetServerLimits(size_t max_message_bytes, grpc::ServerBuilder& builder) {
  builder.SetMaxReceiveMessageSize(static_cast<int>(max_message_bytes));
  // Two coordinators on one port would each get half of the connections.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, kMaxConcurrentStreams);
  builder.AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE, kMaxRequestMetadataBytes);
  // A peer that answers nothing for the sum of the two is gone; one that pings more often than
  // once a second is sent away.
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 10000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 5000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 1000);
  builder.SetSyncServerOption(grpc::ServerBuilder::NUM_CQS, 1);
  builder.SetSyncServerOption(grpc::ServerBuilder::MAX_POLLERS, kMaxSyncPollers);
}

}  // namespace

class Coordinator::Impl {
 public:
  Impl(std::shared_ptr<const ModelFile> model, std::shared_ptr<const Tokenizer> tokenizer,
       const CoordinatorOptions& options)
      : model_(std::move(model)),
        message_bytes_(kMaxFrameHeaderBytes + kPayloadAlignment +
                       MaxPayloadBytes(0, model_->params().vocab_size, kMaxScoredRows)),
        pipeline_(MakePipelineOptions(options)),
        dialer_(MakeGrpcLinkDialer(message_bytes_)),
        cluster_(MakeClusterOptions(options), &pipeline_, dialer_.get()),
        inference_(&pipeline_, &cluster_, std::move(tokenizer), *model_, options.max_context),
        result_links_(&pipeline_, &cluster_),
        links_(&result_links_, message_bytes_) {}

  absl::Status Listen(const CoordinatorOptions& options);
  void Shutdown(absl::Duration drain);

  std::string address_, data_address_;  // constant after Listen

 private:
  PipelineOptions MakePipelineOptions(const CoordinatorOptions& options) const;
  ClusterControl::Options MakeClusterOptions(const CoordinatorOptions& options);
  absl::StatusOr<int> ListenForData(const HostPort& at);
  void SetServing(bool serving);

  const std::shared_ptr<const ModelFile> model_;
  const size_t message_bytes_;  // of one result
  Pipeline pipeline_;
  const std::unique_ptr<LinkDialer> dialer_;
  ClusterControl cluster_;
  InferenceService inference_;
  ResultLinks result_links_;
  GrpcLinkService links_;
  std::unique_ptr<grpc::Server> server_, data_server_;  // constant after Listen
  std::once_flag shut_down_;
};

PipelineOptions Coordinator::Impl::MakePipelineOptions(const CoordinatorOptions& options) const {
  PipelineOptions pipeline;
  pipeline.model_hash = model_->hash();
  pipeline.d_model = model_->params().d_model;
  pipeline.vocab_size = model_->params().vocab_size;
  pipeline.max_slots = options.max_slots;
  pipeline.max_context = options.max_context;
  pipeline.max_waiting = options.max_waiting;
  return pipeline;
}

ClusterControl::Options Coordinator::Impl::MakeClusterOptions(const CoordinatorOptions& options) {
  const PlanLimits limits = {.max_slots = options.max_slots,
                             .max_context = options.max_context,
                             .max_step_tokens = options.max_step_tokens,
                             .kv = options.kv};
  ClusterControl::Options cluster;
  cluster.registry.workers = options.workers;
  cluster.registry.layers = model_->params().layers;
  cluster.registry.limits = limits;
  cluster.registry.model_hash = model_->hash();
  cluster.registry.plan = [model = model_, limits](const std::vector<WorkerCapacity>& workers) {
    return MakePlan(*model, workers, limits);
  };
  cluster.d_model = model_->params().d_model;
  cluster.on_serving = [this](bool serving) { SetServing(serving); };
  return cluster;
}

void Coordinator::Impl::SetServing(bool serving) {
  grpc::HealthCheckServiceInterface* health = server_->GetHealthCheckService();
  health->SetServingStatus("", serving);
  health->SetServingStatus(v1::Inference::service_full_name(), serving);
}

absl::StatusOr<int> Coordinator::Impl::ListenForData(const HostPort& at) {
  grpc::ServerBuilder builder;
  int port = 0;
  const std::string address = JoinHostPort(at.host, at.port);
  builder.AddListeningPort(address, grpc::InsecureServerCredentials(), &port);
  links_.Register(builder);
  SetServerLimits(message_bytes_, builder);
  data_server_ = builder.BuildAndStart();
  if (data_server_ == nullptr || port == 0) {
    return absl::UnavailableError(fmt::format("cannot listen on {} (--data-listen)", address));
  }
  return port;
}

absl::Status Coordinator::Impl::Listen(const CoordinatorOptions& options) {
  const auto at = SplitHostPort("--listen", options.listen);
  if (!at.ok()) return at.status();
  HostPort data_at = *at;
  if (!options.data_listen.empty()) {
    const auto separate = SplitHostPort("--data-listen", options.data_listen);
    if (!separate.ok()) return separate.status();
    data_at = *separate;
    const auto port = ListenForData(data_at);
    if (!port.ok()) return port.status();
    data_at.port = *port;
  }

  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort(options.listen, grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&inference_);
  builder.RegisterService(cluster_.service());
  if (data_server_ == nullptr) links_.Register(builder);
  SetServerLimits(std::max<size_t>(kMaxRequestBytes, message_bytes_), builder);
  server_ = builder.BuildAndStart();
  if (server_ == nullptr || port == 0) {
    return absl::UnavailableError(fmt::format("cannot listen on {}", options.listen));
  }
  SetServing(false);
  if (data_server_ == nullptr) data_at.port = port;

  address_ = JoinHostPort(at->host, port);
  if (options.advertise.empty()) {
    data_address_ = JoinHostPort(ReachableHost(data_at.host), data_at.port);
  } else if (options.advertise.find(':') == std::string::npos) {
    data_address_ = JoinHostPort(options.advertise, data_at.port);
  } else {
    data_address_ = options.advertise;
  }
  cluster_.Start(data_address_);
  return absl::OkStatus();
}

void Coordinator::Impl::Shutdown(absl::Duration drain) {
  std::call_once(shut_down_, [this, drain] {
    inference_.StopAccepting();
    if (server_ != nullptr) SetServing(false);
    const auto end = std::chrono::steady_clock::now() + absl::ToChronoMilliseconds(drain);
    while (std::chrono::steady_clock::now() < end) {
      const PipelineStats stats = pipeline_.Stats();
      if (stats.running + stats.waiting == 0) break;
      absl::SleepFor(kDrainPoll);
    }
    cluster_.Shutdown();
    pipeline_.Shutdown();
    links_.Shutdown();
    for (const auto* server : {&server_, &data_server_}) {
      if (*server == nullptr) continue;
      (*server)->Shutdown(std::chrono::system_clock::now() + kServerGrace);
      (*server)->Wait();
    }
  });
}

Coordinator::Coordinator(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Coordinator::~Coordinator() { Shutdown(absl::ZeroDuration()); }

absl::StatusOr<std::unique_ptr<Coordinator>> Coordinator::Start(
    std::shared_ptr<const ModelFile> model, std::shared_ptr<const Tokenizer> tokenizer,
    const CoordinatorOptions& given) {
  CoordinatorOptions options = given;
  if (options.max_context == 0) {
    options.max_context = std::min(model->params().context_length, kDefaultMaxContext);
  }
  if (absl::Status status = CheckOptions(options, model->params()); !status.ok()) return status;
  std::unique_ptr<Coordinator> coordinator(
      new Coordinator(std::make_unique<Impl>(std::move(model), std::move(tokenizer), options)));
  if (absl::Status status = coordinator->impl_->Listen(options); !status.ok()) return status;
  return coordinator;
}

const std::string& Coordinator::address() const { return impl_->address_; }
const std::string& Coordinator::data_address() const { return impl_->data_address_; }
void Coordinator::Shutdown(absl::Duration drain) { impl_->Shutdown(drain); }

}  // namespace stagecoach
