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

// A second is far more than any of them takes.
TEST_F(CudaConformance, OperationsAreTimed) {
  int timed = 0;
  TimeConformance(*backend_, {.types = {"Q4_K", "F16"}, .shapes = {{64, 512}}, .rows = {1, 40}},
                  [&](const TimingResult& result) {
                    EXPECT_EQ(result.error, "") << result.op << " " << result.shape;
                    EXPECT_GT(result.seconds, 0) << result.op << " " << result.shape;
                    EXPECT_LT(result.seconds, 1) << result.op << " " << result.shape;
                    ++timed;
                  });
  EXPECT_EQ(timed, 4 + 6 + 5);
  const auto peaks = MeasureCudaTensorPeaks(*backend_);
  ASSERT_TRUE(peaks.ok()) << peaks.status();
  EXPECT_GT(peaks->half, 1e9);
  EXPECT_GT(peaks->int8, peaks->half);
}

TEST_F(CudaConformance, RmsNorm) { ExpectAllPass("RmsNorm/"); }
TEST_F(CudaConformance, Rope) { ExpectAllPass("Rope/"); }
TEST_F(CudaConformance, SwiGlu) { ExpectAllPass("SwiGlu/"); }
TEST_F(CudaConformance, Attention) { ExpectAllPass("Attention/"); }
TEST_F(CudaConformance, MatMul) { ExpectAllPass("MatMul/"); }
TEST_F(CudaConformance, Model) { ExpectAllPass("Model/"); }
TEST_F(CudaConformance, UnitBuilder) { ExpectAllPass("UnitBuilder/"); }

}  // namespace
}  // namespace stagecoach
