// stagecoach-worker: holds one stage of the pipeline.
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <climits>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>

#include "absl/status/status.h"
#include "fmt/format.h"
#include "kernels/device.h"
#include "model/model_file.h"
#include "spdlog/sinks/stdout_sinks.h"
#include "spdlog/spdlog.h"
#include "worker/control_client.h"
#include "worker/link/grpc_link.h"
#include "worker/link/nccl/nccl_transport.h"
#include "worker/load_rate.h"
#include "worker/stage.h"
#include "worker/worker_node.h"

namespace stagecoach {
namespace {

constexpr int kExitBadInput = 2;     // flags, model file, device, or refused by the coordinator
constexpr int kExitDeviceFault = 3;  // the GPU failed under us: starting again may help
constexpr int kMaxLinkStreams = 128;

struct Flags {
  std::string coordinator;
  std::string model;
  std::string listen = "127.0.0.1:0";
  std::string advertise;
  std::string name;
  int threads = 0;
  std::string device = "cpu";
  std::string transport = "auto";
  std::string prefetch = "on";
  std::string io = "auto";
  std::string manifest;
  LayerStoreOptions store;  // what no flag above names
  std::string host_cache_codec = "none";
  std::string log_level = "info";
  bool die_with_parent = false;
};

// BYTES with an optional unit, or N%. Throws CLI::ValidationError.
void SetWeightBudget(std::string text, LayerStoreOptions& options) {
  if (text.ends_with('%')) {
    const std::string number = text.substr(0, text.size() - 1);
    if (!CLI::detail::lexical_cast(number, options.weight_budget_percent) ||
        !(options.weight_budget_percent > 0)) {
      throw CLI::ValidationError("--weight-budget", text + " is not a percentage above 0");
    }
    return;
  }
  const std::string error = CLI::AsSizeValue(/*kb_is_1000=*/true)(text);  // rewrites text
  if (!error.empty() || !CLI::detail::lexical_cast(text, options.weight_budget_bytes) ||
      options.weight_budget_bytes == 0) {
    throw CLI::ValidationError("--weight-budget", "write it like 8GB or 25%");
  }
}

LayerStoreOptions StoreOptions(const Flags& flags) {
  LayerStoreOptions options = flags.store;
  options.prefetch = flags.prefetch != "off";
  options.host_cache_codec = flags.host_cache_codec == "lz4"    ? HostCodec::kLz4
                             : flags.host_cache_codec == "zstd" ? HostCodec::kZstd
                                                                : HostCodec::kNone;
  return options;
}

void AddOptions(CLI::App& app, Flags& flags) {
  app.add_option("--coordinator", flags.coordinator, "host:port of the coordinator")->required();
  app.add_option("--model", flags.model, "GGUF file; the coordinator's must be the same")
      ->required();
  app.add_option("--listen", flags.listen, "host:port for frames; port 0 = any")
      ->capture_default_str();
  app.add_option("--advertise", flags.advertise,
                 "host:port that others dial (default: the listening address)");
  app.add_option("--name", flags.name, "Unique name (default: host name and process id)");
  app.add_option("--threads", flags.threads, "Compute threads; 0 = one per core")
      ->check(CLI::Range(0, 1024));
  app.add_option("--device", flags.device,
                 "Where the stage computes: cpu, cuda:N, or auto (the first GPU, if there is one)")
      ->capture_default_str();
  app.add_option(
         "--transport", flags.transport,
         "Of activations to other GPUs: nccl, grpc (through the hosts), or auto: NCCL where "
         "both ends have it")
      ->check(CLI::IsMember({"auto", "grpc", "nccl"}))
      ->capture_default_str();
  app.add_option("--prefetch", flags.prefetch,
                 "on: load weights ahead of their use; off: when first needed")
      ->check(CLI::IsMember({"on", "off", "async"}))
      ->capture_default_str();
  app.add_option("--reader-threads", flags.store.reader_threads,
                 "Units that are loaded at once; 0 = as suits the device")
      ->check(CLI::Range(0, 64))
      ->capture_default_str();
  app.add_option("--load-threads", flags.store.load_threads,
                 "Threads that read each of them; 0 = as suits the device")
      ->check(CLI::Range(0, 64))
      ->capture_default_str();
  app.add_option("--io", flags.io,
                 "How weights are read: direct (past the page cache), buffered, or auto: direct if "
                 "the file exceeds half of the memory")
      ->check(CLI::IsMember({"auto", "direct", "buffered"}))
      ->capture_default_str();
  app.add_option("--manifest", flags.manifest,
                 "Hashes that the weights must have, from 'stagecoach inspect --hash'");
  app.add_option_function<std::string>(
      "--weight-budget", [&flags](const std::string& text) { SetWeightBudget(text, flags.store); },
      "Memory for weights, e.g. 8GB or 25% of the slice; the rest streams from the file");
  app.add_option("--host-cache", flags.store.host_cache_bytes,
                 "Memory that keeps the file's bytes of weights that stream, e.g. 16GB")
      ->transform(CLI::AsSizeValue(/*kb_is_1000=*/true));
  app.add_option("--host-cache-codec", flags.host_cache_codec, "Compression of the host cache")
      ->check(CLI::IsMember({"none", "lz4", "zstd"}))
      ->capture_default_str();
  app.add_option("--log-level", flags.log_level, "Least level to log")
      ->check(CLI::IsMember({"debug", "info", "warn", "error", "off"}))
      ->capture_default_str();
  app.add_flag("--die-with-parent", flags.die_with_parent, "End when the parent process ends");
}

std::string DefaultName() {
  char host[256] = "worker";
  gethostname(host, sizeof host - 1);
  return fmt::format("{}-{}", host, getpid());
}

absl::Status CheckTensors(const ModelFile& model, const Backend& backend) {
  for (const Unit& unit : StageUnits(model.params(), 0, model.params().layers)) {
    for (const UnitTensor& tensor : model.UnitTensors(unit)) {
      absl::Status status = backend.CheckTensor(tensor.role, *tensor.tensor);
      if (!status.ok()) return status;
    }
  }
  return absl::OkStatus();
}

// Others dial the address that we listen on, unless that is "every interface".
absl::StatusOr<std::string> AdvertisedAddress(const Flags& flags, int port) {
  if (!flags.advertise.empty()) return flags.advertise;
  const std::string host = flags.listen.substr(0, flags.listen.rfind(':'));
  if (host == "0.0.0.0" || host == "[::]" || host.empty()) {
    return absl::InvalidArgumentError(fmt::format(
        "--advertise is needed with --listen {}: others must know where to dial", flags.listen));
  }
  return fmt::format("{}:{}", host, port);
}

// Nothing more can be computed in this process: end at once, without destructors that would wait
// for the device. The coordinator sees the stream break and waits for a replacement.
void EndWithDeviceFault(const absl::Status& status) {
  spdlog::critical("the device failed: {}", std::string(status.message()));
  spdlog::shutdown();
  _exit(kExitDeviceFault);
}

// Null: activations go in frames only.
absl::StatusOr<std::unique_ptr<DeviceTransport>> OpenTransport(const Flags& flags,
                                                               const Backend& backend) {
  if (flags.transport == "grpc") return nullptr;
  const bool gpu = !backend.info().device_uuid.empty();
  absl::StatusOr<std::unique_ptr<DeviceTransport>> nccl =
      gpu ? OpenNccl({.on_stuck = EndWithDeviceFault})
          : absl::InvalidArgumentError("NCCL needs a GPU: --device cuda:N");
  if (nccl.ok()) return nccl;
  if (flags.transport == "nccl") return nccl.status();
  if (gpu) {
    spdlog::info("[{}] activations go through the host: {}", flags.name,
                 std::string(nccl.status().message()));
  }
  return nullptr;
}

v1::WorkerHello MakeHello(const Flags& flags, const std::string& address, const Backend& backend,
                          bool nccl, double read_bytes_per_second, const ModelFile& model) {
  const BackendInfo info = backend.info();
  const int threads = flags.threads > 0
                          ? flags.threads
                          : static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  v1::WorkerHello hello;
  hello.set_protocol_version(kProtocolVersion);
  hello.set_worker(flags.name);
  std::random_device random;
  hello.set_incarnation(fmt::format("{:08x}{:08x}", random(), random()));
  hello.set_data_address(address);
  hello.set_backend(info.kind);
  hello.set_kernel_revision(info.kernel_revision);
  hello.set_model_hash(model.hash());
  hello.set_memory_bytes(static_cast<int64_t>(std::min<uint64_t>(info.memory_bytes, INT64_MAX)));
  hello.set_read_bytes_per_second(read_bytes_per_second);
  hello.set_threads(static_cast<uint32_t>(threads));
  hello.set_weight_budget_bytes(flags.store.weight_budget_bytes);
  hello.set_weight_budget_percent(flags.store.weight_budget_percent);
  if (flags.store.weight_budget_bytes > 0 || flags.store.weight_budget_percent > 0) {
    hello.set_load_bytes_per_second(MeasureLoadRate(model));
  }
  hello.add_transports("grpc");
  if (nccl) hello.add_transports("nccl");
  hello.set_nccl_only(flags.transport == "nccl");
  hello.set_host_id(NcclHostId());
  hello.set_device_uuid(info.device_uuid);
  return hello;
}

size_t MaxMessageBytes(const ModelParams& params, int vocab_size) {
  const size_t payload = MaxPayloadBytes(params.d_model, vocab_size, kMaxStepTokens);
  return std::min<size_t>(payload, 1 << 30) + kMaxFrameHeaderBytes + kPayloadAlignment;
}

absl::Status Serve(const Flags& flags, Backend* backend, std::shared_ptr<const ModelFile> model,
                   const sigset_t& signals) {
  const std::unique_ptr<LinkDialer> dialer =
      MakeGrpcLinkDialer(MaxMessageBytes(model->params(), model->params().vocab_size));
  const absl::StatusOr<std::unique_ptr<DeviceTransport>> transport = OpenTransport(flags, *backend);
  if (!transport.ok()) return transport.status();
  WorkerNode node(
      backend, model, dialer.get(),
      {.name = flags.name, .store = StoreOptions(flags), .transport = transport->get()});
  GrpcLinkService links(&node, MaxMessageBytes(model->params(), 0));
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort(flags.listen, grpc::InsecureServerCredentials(), &port);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);  // a port in use is an error
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, kMaxLinkStreams);
  links.Register(builder);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (server == nullptr || port == 0) {
    return absl::InvalidArgumentError(fmt::format("cannot listen on {}", flags.listen));
  }
  const absl::StatusOr<std::string> address = AdvertisedAddress(flags, port);
  if (!address.ok()) return address.status();
  spdlog::info("[{}] listening on {}, {}", flags.name, *address, backend->info().description);

  const absl::StatusOr<double> bandwidth = MeasureDeviceBandwidth(*backend, flags.threads);
  if (!bandwidth.ok()) return bandwidth.status();
  ControlClient client(
      flags.coordinator,
      MakeHello(flags, *address, *backend, *transport != nullptr, *bandwidth, *model), &node);
  std::thread stopper([&] {
    int signal = 0;
    while (sigwait(&signals, &signal) == 0 && signal == SIGUSR1) {
      fmt::print(stderr, "{}", node.Metrics());
    }
    client.Stop();
  });
  const absl::Status status = client.Run();
  kill(getpid(), SIGTERM);  // ends the stopper, if no signal has
  stopper.join();
  node.Shutdown();
  links.Shutdown();
  server->Shutdown();
  return status;
}

int Fail(const absl::Status& status) {
  fmt::print(stderr, "stagecoach-worker: {}\n", std::string(status.message()));
  return kExitBadInput;
}

int Main(int argc, char** argv) {
  CLI::App app("Holds one stage of a Stagecoach pipeline");
  Flags flags;
  AddOptions(app, flags);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kExitBadInput;
  }
  if (flags.name.empty()) flags.name = DefaultName();
  if (flags.die_with_parent) {
    const pid_t parent = getppid();
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != parent) return 0;  // it ended before we asked
  }
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGUSR1);                   // prints the metrics
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);  // inherited by every thread
  signal(SIGPIPE, SIG_IGN);
  spdlog::set_default_logger(spdlog::stderr_logger_mt("worker"));
  spdlog::set_pattern("%v");
  spdlog::set_level(spdlog::level::from_str(flags.log_level));

  const ReadMode mode = flags.io == "direct"     ? ReadMode::kDirect
                        : flags.io == "buffered" ? ReadMode::kBuffered
                                                 : ReadMode::kAuto;
  auto model = ModelFile::Open(flags.model, {.read_mode = mode, .manifest = flags.manifest});
  if (!model.ok()) return Fail(model.status());
  spdlog::info("[{}] reads of weights are {}", flags.name,
               (*model)->file(0).read_alignment() > 1 ? "direct" : "buffered");
  auto backend =
      OpenDevice(flags.device, {.threads = flags.threads, .on_device_fault = EndWithDeviceFault});
  if (!backend.ok()) return Fail(backend.status());
  if (absl::Status status = CheckTensors(**model, **backend); !status.ok()) return Fail(status);
  if (absl::Status status = CheckWeightBudget(**backend, **model, StoreOptions(flags));
      !status.ok()) {
    return Fail(status);
  }
  for (const std::string& tensor : (*model)->unused_tensors()) {
    spdlog::warn("[{}] tensor '{}' is not used by this architecture", flags.name, tensor);
  }
  const absl::Status status = Serve(flags, backend->get(), *std::move(model), signals);
  return status.ok() ? 0 : Fail(status);
}

}  // namespace
}  // namespace stagecoach

int main(int argc, char** argv) { return stagecoach::Main(argc, argv); }
