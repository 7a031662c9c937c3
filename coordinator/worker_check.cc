#include "coordinator/worker_check.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "coordinator/limits.h"
#include "fmt/format.h"
#include "worker/link/frame.h"

namespace stagecoach {
namespace {

bool IsWord(std::string_view text, size_t max_bytes) {
  return !text.empty() && text.size() <= max_bytes &&
         std::all_of(text.begin(), text.end(), [](char c) { return c > ' ' && c < '\x7f'; });
}

absl::Status Invalid(std::string_view field, const std::string& what) {
  return absl::InvalidArgumentError(fmt::format("{}: {}", field, what));
}

absl::Status CheckWords(const v1::WorkerHello& hello) {
  const std::string limit = "must be 1 to {} characters of printable ASCII without spaces";
  if (!IsWord(hello.worker(), kMaxWorkerNameBytes)) {
    return Invalid("worker", fmt::format(fmt::runtime(limit), kMaxWorkerNameBytes));
  }
  if (!IsWord(hello.data_address(), kMaxAddressBytes) ||
      hello.data_address().find(':') == std::string::npos) {
    return Invalid("data_address",
                   fmt::format(fmt::runtime(limit + ", as host:port"), kMaxAddressBytes));
  }
  if (!IsWord(hello.kernel_revision(), kMaxAddressBytes)) {
    return Invalid("kernel_revision", fmt::format(fmt::runtime(limit), kMaxAddressBytes));
  }
  for (const auto& [field, value] :
       {std::pair("host_id", &hello.host_id()), std::pair("device_uuid", &hello.device_uuid())}) {
    if (!value->empty() && !IsWord(*value, kMaxAddressBytes)) {
      return Invalid(field, fmt::format(fmt::runtime(limit), kMaxAddressBytes));
    }
  }
  return absl::OkStatus();
}

bool Offers(const v1::WorkerHello& hello, std::string_view transport) {
  const auto& transports = hello.transports();
  return std::find(transports.begin(), transports.end(), transport) != transports.end();
}

// See StageStatus.residency. `fixed` may be shorter than `units`: the rest counts as fixed.
std::string ResidencyMap(const google::protobuf::RepeatedField<int>& units,
                         const google::protobuf::RepeatedField<bool>& fixed) {
  std::string map;
  for (int i = 0; i < std::min(units.size(), kMaxResidencyUnits); ++i) {
    switch (units[i]) {
      case v1::UNIT_STATE_RESIDENT:
        map += i >= fixed.size() || fixed[i] ? 'R' : 's';
        break;
      case v1::UNIT_STATE_READING:
        map += 'r';
        break;
      case v1::UNIT_STATE_CONVERTING:
        map += 'c';
        break;
      case v1::UNIT_STATE_QUEUED:
        map += 'q';
        break;
      case v1::UNIT_STATE_FAILED:
        map += 'F';
        break;
      default:
        map += '.';
    }
  }
  return map;
}

// 0 if there is nothing to divide by; bounded, for workers may say anything.
double Ratio(double dividend, double divisor) {
  return divisor > 0 ? std::min(dividend / divisor, 1e18) : 0;
}

// What people would work out of the counters.
void FillRatios(v1::StageStatus* stage) {
  const v1::WeightStatus& weights = stage->weights();
  const double hits = static_cast<double>(stage->prefetch_hits());
  stage->set_hit_ratio(Ratio(hits, hits + static_cast<double>(stage->prefetch_late_hits()) +
                                       static_cast<double>(stage->prefetch_misses())));
  stage->set_file_bytes_per_second(
      Ratio(static_cast<double>(weights.file_read_bytes()), weights.file_seconds()));
  stage->set_host_bytes_per_second(
      Ratio(static_cast<double>(weights.host_read_bytes()), weights.host_seconds()));
  stage->set_host_compression_ratio(Ratio(static_cast<double>(weights.host_raw_bytes()),
                                          static_cast<double>(weights.host_bytes())));
}

}  // namespace

absl::Status CheckWorkerHello(const v1::WorkerHello& hello, const std::string& model_hash) {
  if (hello.protocol_version() != kProtocolVersion) {
    return absl::FailedPreconditionError(
        fmt::format("protocol_version: the worker speaks {}, the coordinator {}; run the same "
                    "release of both",
                    hello.protocol_version(), kProtocolVersion));
  }
  if (absl::Status status = CheckWords(hello); !status.ok()) return status;
  if (hello.backend() != "cpu" && hello.backend() != "cuda" && hello.backend() != "reference") {
    return absl::FailedPreconditionError(
        fmt::format("backend: '{}' is not known here", CleanText(hello.backend(), 64)));
  }
  if (hello.model_hash() != model_hash) {
    return absl::FailedPreconditionError(
        fmt::format("model_hash: the worker has model {}, the coordinator {}; point both at the "
                    "same file",
                    CleanText(hello.model_hash(), 64), model_hash));
  }
  if (hello.memory_bytes() <= 0 || hello.memory_bytes() > kMaxWorkerMemoryBytes) {
    return Invalid("memory_bytes", fmt::format("{} is outside [1, {}]", hello.memory_bytes(),
                                               kMaxWorkerMemoryBytes));
  }
  for (const auto& [field, value] :
       {std::pair("read_bytes_per_second", hello.read_bytes_per_second()),
        std::pair("load_bytes_per_second", hello.load_bytes_per_second()),
        std::pair("weight_budget_percent", hello.weight_budget_percent())}) {
    if (!(std::isfinite(value) && value >= 0)) {
      return Invalid(field, fmt::format("{} is neither 0 nor a positive number", value));
    }
  }
  if (!Offers(hello, "grpc")) {
    return absl::FailedPreconditionError("transports: the worker does not offer 'grpc'");
  }
  if (hello.nccl_only() && !Offers(hello, "nccl")) {
    return absl::FailedPreconditionError(
        "transports: 'nccl' only, but the worker does not offer it");
  }
  return absl::OkStatus();
}

std::string NcclObstacle(const v1::WorkerHello& a, const v1::WorkerHello& b) {
  for (const v1::WorkerHello* hello : {&a, &b}) {
    if (!Offers(*hello, "nccl")) {
      return fmt::format("worker '{}' does not offer NCCL", hello->worker());
    }
  }
  if (a.device_uuid().empty() || a.device_uuid() != b.device_uuid() || a.host_id() != b.host_id()) {
    return "";
  }
  return fmt::format(
      "workers '{}' and '{}' are two ranks on one device ({} of host {}), which NCCL refuses: give "
      "each its own by --device cuda:N, or use --transport auto",
      a.worker(), b.worker(), a.device_uuid(), a.host_id());
}

std::string CleanText(std::string_view text, size_t max_bytes) {
  std::string clean(text.substr(0, max_bytes));
  std::replace_if(
      clean.begin(), clean.end(), [](char c) { return c < ' ' || c >= '\x7f'; }, '?');
  return clean;
}

void FillStageStatus(const v1::WorkerHello& hello,
                     const std::optional<v1::WorkerHeartbeat>& heartbeat, v1::StageStatus* stage) {
  stage->set_address(hello.data_address());
  stage->set_backend(hello.backend());
  if (!heartbeat.has_value()) return;
  const auto& units = heartbeat->units();
  stage->set_resident_units(static_cast<uint32_t>(
      std::count(units.begin(), units.end(), static_cast<int>(v1::UNIT_STATE_RESIDENT))));
  stage->set_units(static_cast<uint32_t>(units.size()));
  stage->set_slice_bytes(heartbeat->slice_bytes());
  stage->set_loaded_bytes(heartbeat->loaded_bytes());
  stage->set_load_seconds(heartbeat->load_seconds());
  stage->set_steps(heartbeat->steps());
  stage->set_tokens(heartbeat->tokens());
  stage->set_compute_seconds(heartbeat->compute_seconds());
  stage->set_wait_seconds(heartbeat->wait_seconds());
  stage->set_prefetch_hits(heartbeat->prefetch_hits());
  stage->set_prefetch_late_hits(heartbeat->prefetch_late_hits());
  stage->set_prefetch_misses(heartbeat->prefetch_misses());
  stage->set_stall_seconds(heartbeat->stall_seconds());
  stage->set_detail(heartbeat->detail());
  stage->set_stalled(heartbeat->stalled());
  stage->set_dropped_frames(heartbeat->dropped_frames());
  *stage->mutable_weights() = heartbeat->weights();
  stage->set_residency(ResidencyMap(units, heartbeat->fixed()));
  FillRatios(stage);
}

}  // namespace stagecoach
