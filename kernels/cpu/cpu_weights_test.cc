#include "kernels/cpu/cpu_weights.h"

#include <memory>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "model/model_file.h"
#include "model/test_paths.h"

namespace stagecoach {
namespace {

class CpuWeightsTest : public testing::TestWithParam<std::string> {};

TEST_P(CpuWeightsTest, ResidentBytesAreToldBeforeLoading) {
  const std::unique_ptr<Backend> backend = MakeCpuBackend({.threads = 1});
  const auto model = ModelFile::Open(TestDataPath("demo2-") + GetParam() + ".gguf");
  ASSERT_TRUE(model.ok()) << model.status();
  const ModelParams& params = (*model)->params();
  for (const Unit& unit : StageUnits(params, 0, params.layers)) {
    const std::unique_ptr<UnitBuilder> builder = backend->NewUnitBuilder(params, unit);
    uint64_t told = 0;
    for (const UnitTensor& entry : (*model)->UnitTensors(unit)) {
      std::vector<std::byte> raw(entry.tensor->bytes);
      ASSERT_TRUE(ReadFully((*model)->file(0), entry.tensor->offset, raw).ok());
      ASSERT_TRUE(builder->Add(entry.role, *entry.tensor, raw).ok());
      told += backend->ResidentBytes(entry.role, *entry.tensor);
    }
    const auto weights = builder->Finish();
    ASSERT_TRUE(weights.ok());
    EXPECT_EQ((*weights)->bytes(), told) << UnitName(unit);
  }
}

INSTANTIATE_TEST_SUITE_P(AllTypes, CpuWeightsTest,
                         testing::Values("F32", "f16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1",
                                         "Q8_0", "Q2_K", "Q3_K_S", "Q4_K_S", "Q5_K_S", "Q6_K"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace stagecoach
