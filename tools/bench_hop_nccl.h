// Hops over NCCL, measured between two processes with a GPU each, or the same one.
#ifndef STAGECOACH_TOOLS_BENCH_HOP_NCCL_H_
#define STAGECOACH_TOOLS_BENCH_HOP_NCCL_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "worker/link/hop_bench.h"

namespace stagecoach {

struct NcclHopOptions {
  std::vector<std::string> devices = {"cuda:0", "cuda:1"};  // of this process and of the other
  std::vector<uint64_t> bytes;                              // whole floats
  int count = 0;                                            // round trips of each size,
  absl::Duration limit;                                     // but no longer than this
  std::vector<std::string> peer_ids;  // of the other process's communicators, hexadecimal
};

struct NcclHopRow {
  uint64_t bytes = 0;
  HopLatency hop;     // from GPU to GPU
  HopLatency copies;  // to the host and back: what a hop by gRPC costs beside the frame
};

struct NcclHopResult {
  std::string title;  // what was measured between what
  std::vector<NcclHopRow> rows;
};

// Starts the other process and measures; a line on stderr for each step. Nothing is waited for
// without a limit: a call into CUDA or NCCL that does not return ends this process, with a line
// that names it and exit code 1. Errors: INVALID_ARGUMENT for devices that cannot be used as given
// and where there is no NCCL; those of the channels, with the other process's last word.
absl::StatusOr<NcclHopResult> RunNcclHop(const NcclHopOptions& options);
// The other process: on devices[0], sends back what comes.
absl::Status RunNcclHopPeer(const NcclHopOptions& options);

}  // namespace stagecoach

#endif  // STAGECOACH_TOOLS_BENCH_HOP_NCCL_H_
