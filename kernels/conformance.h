// One table of cases (operation x type x shape x rows) that every backend must pass. Two kinds:
// results within a tolerance of the float64 reference backend, and results whose bits must not
// depend on the company a row keeps, on chunking, on the place of KV blocks or on the stage split.
#ifndef STAGECOACH_KERNELS_CONFORMANCE_H_
#define STAGECOACH_KERNELS_CONFORMANCE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/backend.h"

namespace stagecoach {

struct ConformanceOptions {
  std::string filter;  // run only cases whose name contains it
};

struct ConformanceResult {
  std::string name;  // "MatMul/Q4_K/n=17,k=768/rows=3"
  bool passed = false;
  std::string detail;  // the figures and the tolerance, or the error
};

// Runs all cases in a fixed order. An operation that returns an error fails its case.
std::vector<ConformanceResult> RunConformance(Backend& candidate,
                                              const ConformanceOptions& options);

struct TimingOptions {
  std::string filter;
  double seconds_per_case = 0.2;  // at least; one run at least
};

struct TimingResult {
  std::string name;    // "Matmul/Q4_K/n=4096,k=4096/rows=8"
  std::string error;   // empty if it ran
  double seconds = 0;  // the median run
  uint64_t bytes = 0;  // weights and KV that one run must read
  uint64_t flops = 0;  // multiplications and additions of one run
  double gigabytes_per_second() const { return seconds > 0 ? 1e-9 * bytes / seconds : 0; }
  double gigaflops() const { return seconds > 0 ? 1e-9 * flops / seconds : 0; }
};

// Times prepared weights (so no repacking), at shapes of real models.
std::vector<TimingResult> TimeConformance(Backend& backend, const TimingOptions& options);

}  // namespace stagecoach

#endif  // STAGECOACH_KERNELS_CONFORMANCE_H_
