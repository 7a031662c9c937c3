// The CPU backend against the float64 reference, and its numerics contract, case by case.
#include <memory>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/conformance.h"
#include "kernels/cpu/cpu_backend.h"

namespace stagecoach {
namespace {

struct Variant {
  const char* isa;
  int threads;
};

class CpuConformance : public testing::TestWithParam<Variant> {
 protected:
  void ExpectAllPass(const std::string& filter) {
    const std::unique_ptr<Backend> backend =
        MakeCpuBackend({.threads = GetParam().threads, .isa = GetParam().isa});
    const std::vector<ConformanceResult> results = RunConformance(*backend, {.filter = filter});
    EXPECT_FALSE(results.empty());
    for (const ConformanceResult& result : results) {
      EXPECT_TRUE(result.passed) << result.name << ": " << result.detail;
    }
  }
};

TEST_P(CpuConformance, MatMul) { ExpectAllPass("MatMul/"); }
TEST_P(CpuConformance, RmsNorm) { ExpectAllPass("RmsNorm/"); }
TEST_P(CpuConformance, Rope) { ExpectAllPass("Rope/"); }
TEST_P(CpuConformance, SwiGlu) { ExpectAllPass("SwiGlu/"); }
TEST_P(CpuConformance, Attention) { ExpectAllPass("Attention/"); }
TEST_P(CpuConformance, Model) { ExpectAllPass("Model/"); }
TEST_P(CpuConformance, UnitBuilder) { ExpectAllPass("UnitBuilder/"); }

// An isa that this machine lacks runs as the best it has.
INSTANTIATE_TEST_SUITE_P(Variants, CpuConformance,
                         testing::Values(Variant{"portable", 1}, Variant{"avx2", 3},
                                         Variant{"avx512", 2}),
                         [](const auto& test) { return std::string(test.param.isa); });

}  // namespace
}  // namespace stagecoach
