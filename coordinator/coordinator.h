// The coordinator process apart from its command line: servers, services and the pipeline, wired.
#ifndef STAGECOACH_COORDINATOR_COORDINATOR_H_
#define STAGECOACH_COORDINATOR_COORDINATOR_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "coordinator/planner.h"
#include "model/model_file.h"
#include "model/tokenizer.h"

namespace stagecoach {

inline constexpr int kDefaultMaxContext = 4096;

struct CoordinatorOptions {
  std::string listen = "127.0.0.1:50151";  // host:port for clients and workers; port 0 = any free
  std::string data_listen;                 // host:port for the last stage; empty = the same server
  // How workers reach the data port: host, or host:port. Empty: the listening host, or this
  // machine's name if that is all interfaces.
  std::string advertise;
  int workers = 1;
  int max_slots = 64;
  int max_context = 0;      // positions of prompt and output; 0 = min(trained, kDefaultMaxContext)
  int max_step_tokens = 0;  // see PlanLimits
  KvOptions kv;
  int max_waiting = 256;
};

// Thread-safe.
class Coordinator {
 public:
  // Listens on return. Errors: INVALID_ARGUMENT naming the option; UNAVAILABLE if a port cannot be
  // bound.
  static absl::StatusOr<std::unique_ptr<Coordinator>> Start(
      std::shared_ptr<const ModelFile> model, std::shared_ptr<const Tokenizer> tokenizer,
      const CoordinatorOptions& options);
  ~Coordinator();  // Shutdown without a drain

  const std::string& address() const;       // host:port for clients
  const std::string& data_address() const;  // host:port that the last stage is told

  // Refuses new requests, gives those under way at most `drain` to end, then ends everything.
  // Idempotent.
  void Shutdown(absl::Duration drain);

 private:
  class Impl;
  explicit Coordinator(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_COORDINATOR_COORDINATOR_H_
