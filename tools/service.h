// The service that a command talks to: one that runs already (--server), or a private one that is
// started for the call (--model FILE [--workers N]).
#ifndef STAGECOACH_TOOLS_SERVICE_H_
#define STAGECOACH_TOOLS_SERVICE_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "tools/client.h"
#include "tools/local_cluster.h"

namespace CLI {
class App;
}

namespace stagecoach {

struct ServiceFlags {
  std::string server;
  std::string model;
  int workers = 1;
  std::string device = "cpu";  // of each worker; "{}" stands for its index
  std::string transport = "auto";
  std::vector<std::string> worker_env;  // NAME=VALUE, "{}" likewise
  int threads = 0;
  int max_slots = 64;
  int context = 0;
  int step_tokens = 0;  // 0 = the coordinator's default
  std::string prefetch = "async";
  std::string kv_type = "f16";
  std::string kv_memory;      // empty = the coordinator's default
  std::string weight_budget;  // of each worker; empty = none
  bool verbose = false;
};

// Declares --server, --model, --workers, --device, --threads, --context, --step-tokens, --kv-type,
// --kv-memory, --prefetch, --transport, --worker-env, --verbose.
void AddServiceFlags(CLI::App& command, ServiceFlags& flags);
// Those of them that a private service needs, without --server and --model.
void AddPipelineFlags(CLI::App& command, ServiceFlags& flags);

// Of these, how the workers pass activations on: --transport, --worker-env.
void AddTransportFlags(CLI::App& command, ServiceFlags& flags);

LocalClusterOptions ToClusterOptions(const ServiceFlags& flags);

class Service {
 public:
  // Returns once the service is serving. Logs of a private one go to stderr with --verbose.
  // Errors: INVALID_ARGUMENT if not exactly one of --server and --model is given; what the
  // processes said.
  static absl::StatusOr<std::unique_ptr<Service>> Open(const ServiceFlags& flags);
  // Over a cluster that is already started; waits until it serves.
  static absl::StatusOr<std::unique_ptr<Service>> Adopt(std::unique_ptr<LocalCluster> cluster);

  Client& client() { return *client_; }
  LocalCluster* cluster() { return cluster_.get(); }  // nullptr with --server

 private:
  Service() = default;
  std::unique_ptr<LocalCluster> cluster_;
  std::unique_ptr<Client> client_;
};

// "3.21 tok/s"-style summary lines of a service's stages, one row per stage.
std::string FormatStages(const v1::GetStatusResponse& status);
// What the layer stores do, one row per stage; empty if no stage streams its weights
// or has a host tier.
std::string FormatWeights(const v1::GetStatusResponse& status);

}  // namespace stagecoach

#endif  // STAGECOACH_TOOLS_SERVICE_H_
