// The residual stream as transports see it: in the GPU's memory.
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/cuda/cuda_test.h"

namespace stagecoach {
namespace {

constexpr int kColumns = 384;
constexpr int kMaxRows = 40;

class CudaResidualTest : public CudaTest {
 protected:
  std::unique_ptr<Workspace> NewWorkspace() {
    ModelParams params;
    params.layers = 1;
    params.d_model = params.ffn_length = kColumns;
    params.heads = params.kv_heads = 3;
    params.key_length = params.value_length = params.rope_dims = 128;
    params.vocab_size = 1000;
    return backend_->NewWorkspace(params, kMaxRows).value();
  }
};

TEST_F(CudaResidualTest, FlagsTheRowsThatAreNotFinite) {
  const auto workspace = NewWorkspace();
  for (const int rows : {1, 7, kMaxRows}) {
    std::vector<float> residual(rows * kColumns, -3.5f);
    std::vector<uint8_t> expected(rows, 1), finite(rows, 9);
    const float strange[] = {std::numeric_limits<float>::quiet_NaN(),
                             std::numeric_limits<float>::infinity(),
                             -std::numeric_limits<float>::infinity()};
    for (int row = 0; row < rows; row += 3) {
      residual[row * kColumns + (row * 97 + kColumns - 1) % kColumns] = strange[row % 3];
      expected[row] = 0;
    }
    residual[kColumns / 2] = std::numeric_limits<float>::max();
    residual[kColumns / 2 + 1] = std::numeric_limits<float>::denorm_min();
    ASSERT_TRUE(backend_->SetResidual(*workspace, residual).ok());
    ASSERT_TRUE(backend_->LeaveResidual(*workspace, finite).ok());
    EXPECT_EQ(finite, expected) << rows << " rows";
  }
}

TEST_F(CudaResidualTest, WhatIsTakenIsWhatLiesThere) {
  const auto workspace = NewWorkspace();
  std::vector<float> residual(5 * kColumns), got(5 * kColumns);
  for (size_t i = 0; i < residual.size(); ++i) residual[i] = static_cast<float>(i);
  std::vector<uint8_t> finite(5);
  ASSERT_TRUE(backend_->SetResidual(*workspace, residual).ok());
  ASSERT_TRUE(backend_->LeaveResidual(*workspace, finite).ok());
  ASSERT_TRUE(backend_->TakeResidual(*workspace, 5).ok());
  ASSERT_TRUE(backend_->GetResidual(*workspace, got).ok());
  EXPECT_EQ(got, residual);
}

TEST_F(CudaResidualTest, SaysWhereItIs) {
  const auto workspace = NewWorkspace();
  const ResidualMemory memory = backend_->residual_memory(*workspace);
  EXPECT_NE(memory.data, nullptr);
  EXPECT_NE(memory.stream, nullptr);
  EXPECT_EQ(backend_->info().device_uuid.size(), 32u);
}

}  // namespace
}  // namespace stagecoach
