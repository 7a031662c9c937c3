// Hops over NCCL, measured between two processes with a GPU each, or the same one.
#ifndef STAGECOACH_TOOLS_BENCH_HOP_NCCL_H_
#define STAGECOACH_TOOLS_BENCH_HOP_NCCL_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"

namespace stagecoach {

struct NcclHopOptions {
  std::vector<std::string> devices = {"cuda:0", "cuda:0"};  // of this process and of the other
  std::vector<uint64_t> bytes = {16 << 10, 8 << 20};
  int count = 0;  // round trips of each size
  std::string json;
  std::vector<std::string> peer_ids;  // of the other process's communicators, hexadecimal
};

// Starts the other process, measures and prints. Errors: those of OpenDevice, OpenNccl and the
// channels, with the other process's last word.
absl::Status RunNcclHop(const NcclHopOptions& options);
// The other process: on devices[0], sends back what comes.
absl::Status RunNcclHopPeer(const NcclHopOptions& options);

}  // namespace stagecoach

#endif  // STAGECOACH_TOOLS_BENCH_HOP_NCCL_H_
