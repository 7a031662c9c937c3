// What one hop costs: frames to and fro between two processes' worth of link, over loopback.
#ifndef STAGECOACH_WORKER_LINK_HOP_BENCH_H_
#define STAGECOACH_WORKER_LINK_HOP_BENCH_H_

#include <cstddef>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

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

// Of round trips in microseconds; at least one.
HopLatency SummariseHop(std::vector<double> round_trips);

// Sends `count` frames with `bytes` of payload (rounded down to whole float32), or as many as
// `limit` allows but one at least, one at a time, after a short warm-up. Errors: those of the
// links; INVALID_ARGUMENT for count < 1.
absl::StatusOr<HopLatency> MeasureHop(HopTransport transport, size_t bytes, int count,
                                      absl::Duration limit = absl::InfiniteDuration());

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_LINK_HOP_BENCH_H_
