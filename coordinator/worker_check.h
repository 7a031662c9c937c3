// What a worker says of itself, checked and cleaned before anything relies on it. Pure.
#ifndef STAGECOACH_COORDINATOR_WORKER_CHECK_H_
#define STAGECOACH_COORDINATOR_WORKER_CHECK_H_

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "proto/cluster.pb.h"
#include "proto/inference.pb.h"

namespace stagecoach {

// Errors: FAILED_PRECONDITION for another protocol version, model or an unknown backend;
// INVALID_ARGUMENT naming the field for anything that cannot be true.
absl::Status CheckWorkerHello(const v1::WorkerHello& hello, const std::string& model_hash);

// Why the link between two workers cannot go by NCCL; empty = it can.
std::string NcclObstacle(const v1::WorkerHello& a, const v1::WorkerHello& b);

// At most `max_bytes` of `text`, with every byte outside printable ASCII replaced by '?': fit for
// logs and messages.
std::string CleanText(std::string_view text, size_t max_bytes);

// The fields of `stage` that the worker itself knows.
void FillStageStatus(const v1::WorkerHello& hello,
                     const std::optional<v1::WorkerHeartbeat>& heartbeat, v1::StageStatus* stage);

}  // namespace stagecoach

#endif  // STAGECOACH_COORDINATOR_WORKER_CHECK_H_
