// One table of cases (operation x type x shape x rows) that every backend must pass. Two kinds:
// results within a tolerance of the float64 reference backend, and results whose bits must not
// depend on the company a row keeps, on chunking, on the place of KV blocks or on the stage split.
#ifndef STAGECOACH_KERNELS_CONFORMANCE_H_
#define STAGECOACH_KERNELS_CONFORMANCE_H_

#include <cstdint>
#include <functional>
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

struct MatrixShape {
  int n = 0;  // outputs
  int k = 0;  // columns, of whole blocks
};

struct TimingOptions {
  std::string filter;              // run only operations whose name contains it
  double seconds_per_case = 0.05;  // of measured time, at least; see OpTimer
  std::vector<std::string> types;  // of weights and KV; empty: all
  std::vector<MatrixShape> shapes = {{4096, 4096}, {14336, 4096}, {4096, 14336}};  // of products
  std::vector<int> rows = {1, 2, 4, 8, 16, 32, 64, 512};
};

struct TimingResult {
  std::string op;      // "MatMul"
  std::string type;    // of the weights or the KV; empty if there are none
  std::string shape;   // "n=4096 k=4096"
  int rows = 0;        // of activations
  std::string error;   // empty if it ran and was right
  double seconds = 0;  // the median run, of the kernels alone
  uint64_t bytes = 0;  // that one run must read and write in the backend's memory
  uint64_t flops =
      0;              // multiplications and additions of one run; 0 where memory is all that counts
  bool int8 = false;  // they are of bytes
};

// Compares each single operation, at shapes of real models, with the float64 reference, and times
// it if it is right. The backend must offer SetOpTimer. `consume` gets each result as it comes.
void TimeConformance(Backend& backend, const TimingOptions& options,
                     const std::function<void(const TimingResult&)>& consume);

}  // namespace stagecoach

#endif  // STAGECOACH_KERNELS_CONFORMANCE_H_
