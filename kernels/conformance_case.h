// The rows of the conformance table.
#ifndef STAGECOACH_KERNELS_CONFORMANCE_CASE_H_
#define STAGECOACH_KERNELS_CONFORMANCE_CASE_H_

#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace stagecoach {

// Makes its own inputs from a seed of its own, so that any backend gets the same ones.
using ConformanceRun = std::function<absl::StatusOr<std::vector<float>>(Backend&)>;

struct ConformanceCase {
  std::string name;
  ConformanceRun run;
  // Relative RMS allowed between candidate and reference, and the magnitude of a usual result (see
  // Compare), if `same_bits_as` is empty.
  double tolerance = 0;
  double typical = 0;
  // Otherwise: both runs on the candidate must agree to the bit.
  ConformanceRun same_bits_as = nullptr;
};

std::vector<ConformanceCase> MatMulCases();
std::vector<ConformanceCase> ElementwiseCases();  // RmsNorm, Rope, SwiGlu
std::vector<ConformanceCase> AttentionCases();
std::vector<ConformanceCase> LayerCases();  // embedding, layers and head together; unit builders

// What one matrix product may differ from the reference: types with quantised activations round
// each input to 8 bits, float types only accumulate in float32.
double MatMulTolerance(TensorType type);
double AttentionTolerance(KvType type);
const char* KvTypeName(KvType type);  // "F16"

}  // namespace stagecoach

#endif  // STAGECOACH_KERNELS_CONFORMANCE_CASE_H_
