// The CUDA backend against the float64 reference, and its numerics contract, case by case.
#include <string>
#include <vector>

#include "kernels/conformance.h"
#include "kernels/cuda/cuda_test.h"

namespace stagecoach {
namespace {

class CudaConformance : public CudaTest {
 protected:
  void ExpectAllPass(const std::string& filter) {
    const std::vector<ConformanceResult> results = RunConformance(*backend_, {.filter = filter});
    EXPECT_FALSE(results.empty());
    for (const ConformanceResult& result : results) {
      if (result.name.find("KV Q8_0") != std::string::npos) continue;  // refused: see CudaKvCache
      EXPECT_TRUE(result.passed) << result.name << ": " << result.detail;
    }
    printf("%s %zu cases\n", filter.c_str(), results.size());
  }
};

TEST_F(CudaConformance, RmsNorm) { ExpectAllPass("RmsNorm/"); }
TEST_F(CudaConformance, Rope) { ExpectAllPass("Rope/"); }
TEST_F(CudaConformance, SwiGlu) { ExpectAllPass("SwiGlu/"); }
TEST_F(CudaConformance, Attention) { ExpectAllPass("Attention/"); }
TEST_F(CudaConformance, MatMul) { ExpectAllPass("MatMul/"); }
TEST_F(CudaConformance, Model) { ExpectAllPass("Model/"); }
TEST_F(CudaConformance, UnitBuilder) { ExpectAllPass("UnitBuilder/"); }

}  // namespace
}  // namespace stagecoach
