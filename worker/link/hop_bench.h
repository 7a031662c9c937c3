// What one hop costs: frames to and fro between two processes' worth of link, over loopback.
#ifndef STAGECOACH_WORKER_LINK_HOP_BENCH_H_
#define STAGECOACH_WORKER_LINK_HOP_BENCH_H_

#include <cstddef>

#include "absl/status/statusor.h"

namespace stagecoach {

// One-way latency in microseconds: half of a round trip over two links.
struct HopLatency {
  double p50_us = 0;
  double p90_us = 0;
  double p99_us = 0;
  double max_us = 0;
  int count = 0;  // round trips measured
};

enum class HopTransport { kInProcess, kGrpc };

// Sends `count` frames with `bytes` of payload (rounded down to whole float32), one at a time,
// after a short warm-up. Errors: those of the links; INVALID_ARGUMENT for count < 1.
absl::StatusOr<HopLatency> MeasureHop(HopTransport transport, size_t bytes, int count);

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_LINK_HOP_BENCH_H_
