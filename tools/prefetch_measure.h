// What `bench prefetch` measures: cold starts and passes under a weight budget, with the ceilings.
#ifndef STAGECOACH_TOOLS_PREFETCH_MEASURE_H_
#define STAGECOACH_TOOLS_PREFETCH_MEASURE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "model/model_file.h"
#include "worker/layer_store.h"

namespace stagecoach {

struct PrefetchSetup {
  std::shared_ptr<const ModelFile> model;
  std::string device = "cpu";
  int threads = 1;         // compute
  int reader_threads = 0;  // as in LayerStoreOptions
  int load_threads = 0;
  int cold_stages = 2;
  bool cached = false;  // the file stays in the page cache
  int passes = 16;      // after warm-up
  int prompt_tokens = 8;
};

// Rates are bytes per second.
struct ColdStart {
  LayerStoreOptions store;  // as it was used
  double plain_rate = 0;    // of reads alone, by as many threads
  double copy_rate = 0;     // of copies from pinned memory alone; 0 if the device has no own memory
  double touch_rate = 0;    // of the host's memory; 0: not measured
  double first_layer_seconds = 0;
  double first_layer_share = 0;  // of the bytes had landed by then
  double first_token_seconds = 0;
  double first_token_share = 0;
  double resident_seconds = 0;
  double load_rate = 0;
  double read_seconds = 0;  // summed over threads
  double convert_seconds = 0;
};
absl::StatusOr<ColdStart> MeasureColdStart(const PrefetchSetup& setup);

// Copies to the device's own memory in `seconds`.
struct CopyRates {
  double total_rate = 0;  // per second that passed
  double busy_rate = 0;   // per second in which copies were under way
  double busy_share = 0;
};

// What the passes took after warm-up, per pass where nothing else is said.
struct Steady {
  double seconds = 0;  // median
  double compute_seconds = 0;
  double stall_share = 0;  // of the time
  double sync_loads = 0;   // misses
  double hit_ratio = 0;    // of all acquisitions
  double late_hits = 0;
  double evictions = 0;
  double read_bytes = 0;
  CopyRates copies;
  double acquire_seconds = 0;  // a pass that only acquires, and computes nothing
  CopyRates acquire_copies;
  std::vector<int32_t> tokens;
  LayerStoreStats stats;     // at the end
  uint64_t peak_memory = 0;  // of the process
};
// rows: of a pass. One: the last token, decoded; more: a prompt of that many.
absl::StatusOr<Steady> MeasureSteady(const PrefetchSetup& setup, const LayerStoreOptions& store,
                                     int rows);

// The number of rows of which a pass with all weights resident takes about `seconds`; at most
// kMostBalancedRows.
inline constexpr int kMostBalancedRows = 2048;
absl::StatusOr<int> BalancedRows(const PrefetchSetup& setup, double seconds);

}  // namespace stagecoach

#endif  // STAGECOACH_TOOLS_PREFETCH_MEASURE_H_
