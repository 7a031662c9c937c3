#include "kernels/conformance.h"

#include <iterator>
#include <memory>
#include <string>
#include <utility>

#include "fmt/format.h"
#include "kernels/compare.h"
#include "kernels/conformance_case.h"
#include "kernels/reference/reference_backend.h"

namespace stagecoach {
namespace {

std::vector<ConformanceCase> AllCases() {
  std::vector<ConformanceCase> all;
  for (auto* make : {MatMulCases, ElementwiseCases, AttentionCases, LayerCases}) {
    std::vector<ConformanceCase> cases = make();
    std::move(cases.begin(), cases.end(), std::back_inserter(all));
  }
  return all;
}

ConformanceResult RunCase(const ConformanceCase& test, Backend& candidate, Backend& reference) {
  ConformanceResult result{.name = test.name, .passed = false, .detail = ""};
  const absl::StatusOr<std::vector<float>> actual = test.run(candidate);
  const absl::StatusOr<std::vector<float>> expected =
      test.same_bits_as ? test.same_bits_as(candidate) : test.run(reference);
  if (!actual.ok() || !expected.ok()) {
    result.detail = (actual.ok() ? expected : actual).status().ToString();
    return result;
  }
  const Comparison comparison = Compare(*actual, *expected, test.typical);
  result.detail = ToString(comparison);
  if (test.same_bits_as) {
    result.passed = comparison.Within(0) && SameBits(*actual, *expected);
    result.detail += result.passed ? "; same bits" : "; bits differ";
  } else {
    result.passed = comparison.Within(test.tolerance);
    result.detail += fmt::format("; tolerance {:.1e}", test.tolerance);
  }
  return result;
}

}  // namespace

std::vector<ConformanceResult> RunConformance(Backend& candidate,
                                              const ConformanceOptions& options) {
  const std::unique_ptr<Backend> reference = MakeReferenceBackend();
  std::vector<ConformanceResult> results;
  for (const ConformanceCase& test : AllCases()) {
    if (test.name.find(options.filter) == std::string::npos) continue;
    results.push_back(RunCase(test, candidate, *reference));
  }
  return results;
}

}  // namespace stagecoach
