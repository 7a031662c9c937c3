// The CUDA backend against the float64 reference, and its numerics contract, case by case.
#include <ostream>
#include <string>
#include <vector>

#include "fmt/format.h"
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

// Conformance cases in small shapes, together every operation and every type: few at a time, for
// tools that make kernels a hundred times slower (run_gpu_tests.sh --sanitizers).
struct SmallCases {
  std::string name;
  std::vector<std::string> filters;
};

void PrintTo(const SmallCases& cases, std::ostream* out) { *out << cases.name; }

std::vector<SmallCases> AllSmallCases() {
  std::vector<SmallCases> all = {{"Elementwise",
                                  {"RmsNorm/columns=64,rows=33", "RmsNorm/columns=100,rows=2",
                                   "Rope/plain", "Rope/part of the head", "SwiGlu/count=512,"}}};
  for (const TensorTypeInfo& info : AllTensorTypes()) {
    const std::string product =
        fmt::format("MatMul/{}/n=17,k={}/", info.name, info.block_elements == 256 ? 768 : 96);
    all.push_back({fmt::format("MatMul_{}", info.name),
                   {product + "rows=1", product + "rows=9", product + "rows=33",
                    fmt::format("UnitBuilder/{}/", info.name)}});
  }
  for (const char* heads : {"heads=8,kv=2,key=64,value=64", "heads=4,kv=1,key=128,value=128",
                            "heads=4,kv=2,key=96,value=64"}) {
    SmallCases cases = {"Attention_" + std::string(heads), {}};
    std::erase_if(cases.name, [](char c) { return c == '=' || c == ','; });
    for (const char* step :
         {"KV F16/decode at 32", "KV F16/prompts among decodes", "KV F32/chunk over a tile edge"}) {
      cases.filters.push_back(fmt::format("Attention/{}/{}", heads, step));
    }
    all.push_back(cases);
  }
  all.push_back(
      {"KvCopies", {"Attention/heads=4,kv=4,key=64,value=64/KV F16/copied blocks, layer 1"}});
  for (const char* type : {"Q4_K", "Q6_K", "Q8_0", "F16"}) {
    all.push_back({fmt::format("Model_{}", type), {fmt::format("Model/plain/{}/logits", type)}});
  }
  all.push_back({"Graphs_Q5_K", {"unequal heads/Q5_K/other chunks"}});  // biases, F16 KV
  return all;
}

class CudaSmallShapes : public CudaConformance, public testing::WithParamInterface<SmallCases> {};

TEST_P(CudaSmallShapes, Pass) {
  for (const std::string& filter : GetParam().filters) ExpectAllPass(filter);
}

INSTANTIATE_TEST_SUITE_P(Small, CudaSmallShapes, testing::ValuesIn(AllSmallCases()),
                         [](const auto& test) { return test.param.name; });

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
