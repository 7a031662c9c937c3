// The residual stream as transports see it: in the GPU's memory.
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/cuda/cuda_test.h"
#include "kernels/random_tensor.h"

namespace stagecoach {
namespace {

constexpr int kColumns = 384;
constexpr int kMaxRows = 40;

class CudaResidualTest : public CudaTest {
 protected:
  static ModelParams Params() {
    ModelParams params;
    params.layers = 1;
    params.d_model = params.ffn_length = kColumns;
    params.heads = params.kv_heads = 3;
    params.key_length = params.value_length = params.rope_dims = 128;
    params.vocab_size = 1000;
    return params;
  }
  std::unique_ptr<Workspace> NewWorkspace() {
    return backend_->NewWorkspace(Params(), kMaxRows).value();
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

// As after a channel that ended before it had brought the rows.
TEST_F(CudaResidualTest, SpoiledRowsThatAreTakenAreNotFinite) {
  ModelParams params = Params();
  RandomSource random(1);
  const auto layer = BuildUnit(
      *backend_, params,
      MakeRandomUnit(random, params, {Unit::Kind::kLayer}, TensorType::kF16, /*biases=*/false));
  ASSERT_TRUE(layer.ok()) << layer.status();
  const auto kv = backend_->NewKvCache({.layers = 1,
                                        .kv_heads = params.kv_heads,
                                        .key_length = params.key_length,
                                        .value_length = params.value_length,
                                        .blocks = 2});
  ASSERT_TRUE(kv.ok()) << kv.status();
  const auto workspace = NewWorkspace();
  const int32_t blocks[] = {0};
  const BatchSequence sequence[] = {{.row_count = 3, .blocks = blocks}};
  const std::vector<float> residual(3 * kColumns, 0.5f);
  std::vector<uint8_t> finite(3);
  for (const bool spoiled : {false, true}) {
    ASSERT_TRUE(backend_->SetResidual(*workspace, residual).ok());
    ASSERT_TRUE(backend_->LeaveResidual(*workspace, finite).ok());
    *backend_->residual_memory(*workspace).spoiled = spoiled;
    ASSERT_TRUE(backend_->TakeResidual(*workspace, 3).ok());
    ASSERT_TRUE(
        backend_->RunLayer(*workspace, **layer, **kv, 0, {.sequences = sequence, .rows = 3}).ok());
    ASSERT_TRUE(backend_->LeaveResidual(*workspace, finite).ok());
    EXPECT_EQ(finite, std::vector<uint8_t>(3, spoiled ? 0 : 1));
  }
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
