// stagecoach status: the stage chain of a running service.
#include <fmt/format.h>
#include <google/protobuf/util/json_util.h>

#include <CLI/CLI.hpp>
#include <string>

#include "tools/client.h"
#include "tools/commands.h"
#include "tools/service.h"

namespace stagecoach {
namespace {

struct StatusFlags {
  std::string server = "127.0.0.1:50151";
  bool json = false;
};

const char* StateName(v1::ServiceState state) {
  switch (state) {
    case v1::SERVICE_STATE_WAITING:
      return "waiting";
    case v1::SERVICE_STATE_LOADING:
      return "loading";
    case v1::SERVICE_STATE_SERVING:
      return "serving";
    default:
      return "unknown";
  }
}

absl::Status RunStatus(const StatusFlags& flags) {
  auto status = Client(flags.server).GetStatus();
  if (!status.ok()) return status.status();
  if (flags.json) {
    google::protobuf::util::JsonPrintOptions options;
    options.add_whitespace = true;
    options.always_print_primitive_fields = true;
    options.preserve_proto_field_names = true;
    std::string out;
    const auto converted = google::protobuf::util::MessageToJsonString(*status, &out, options);
    if (!converted.ok()) return absl::InternalError(converted.ToString());
    fmt::print("{}", out);
    return absl::OkStatus();
  }
  fmt::print("{}, epoch {}, up {:.0f} s{}{}\n", StateName(status->state()), status->epoch(),
             status->uptime_seconds(), status->detail().empty() ? "" : ": ", status->detail());
  fmt::print(
      "{:.1f} tok/s over 10 s; {} running, {} waiting, {} slots; {} requests completed, "
      "{} failed; {} prompt ({} cached) and {} completion tokens\n"
      "KV blocks: {} used, {} cached, {} free; {} preemptions\n\n",
      status->recent_tokens_per_second(), status->running(), status->waiting(), status->slots(),
      status->completed_requests(), status->failed_requests(), status->prompt_tokens(),
      status->cached_tokens(), status->completion_tokens(), status->kv_blocks_used(),
      status->kv_blocks_cached(), status->kv_blocks_free(), status->preemptions());
  fmt::print("{}", FormatStages(*status));
  if (const std::string weights = FormatWeights(*status); !weights.empty()) {
    fmt::print("\n{}", weights);
  }
  for (const v1::StageStatus& stage : status->stages()) {
    if (!stage.detail().empty()) fmt::print("stage {}: {}\n", stage.stage(), stage.detail());
  }
  return absl::OkStatus();
}

}  // namespace

void AddStatusCommand(CLI::App& app, Command& run) {
  auto flags = std::make_shared<StatusFlags>();
  CLI::App* command = app.add_subcommand("status", "Show the stages of a running service");
  command->add_option("--server", flags->server, "host:port of the coordinator")
      ->capture_default_str();
  command->add_flag("--json", flags->json, "Machine-readable output");
  command->callback([flags, &run] { run = [flags] { return RunStatus(*flags); }; });
}

}  // namespace stagecoach
