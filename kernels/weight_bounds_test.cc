#include "kernels/weight_bounds.h"

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/tensor_check.h"
#include "model/block_decode.h"
#include "model/model_error.h"

namespace stagecoach {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr int kRows = 3, kRowBlocks = 4;
// As of a backend that multiplies halves (kernels/cuda/weight_bounds.h).
constexpr WeightBounds kBounds = {.delta = 64, .delta_min = 64, .scale = 2, .weight = 65504};

template <typename Block>
struct Matrix {
  explicit Matrix(TensorType type) : blocks(kRows * kRowBlocks) {
    info.name = "blk.7.ffn_up.weight";
    info.type = type;
    info.dims = {uint64_t{kRowBlocks} * Block::kElements, kRows};
    memset(blocks.data(), 0, blocks.size() * sizeof(Block));
  }
  absl::Status Check(const WeightBounds& bounds, size_t first_row = 0) const {
    return CheckWeights(info, first_row, std::as_bytes(std::span(blocks)), bounds);
  }
  Block& at(int row, int block) { return blocks[row * kRowBlocks + block]; }

  TensorInfo info;
  std::vector<Block> blocks;
};

void ExpectRefused(const absl::Status& status, const std::string& where, const std::string& what) {
  EXPECT_EQ(GetModelError(status), ModelError::kUnsupported) << status;
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr("blk.7.ffn_up.weight"), HasSubstr(where), HasSubstr(what)));
}

TEST(WeightBounds, TheProductOfBlockScaleAndGroupScaleCounts) {
  Matrix<BlockQ4_K> matrix(TensorType::kQ4_K);
  BlockQ4_K& block = matrix.at(1, 2);
  block.d = FloatToHalf(1);
  block.scales[3] = 1;
  EXPECT_TRUE(matrix.Check(kBounds).ok());
  block.scales[3] = 2;
  ExpectRefused(matrix.Check(kBounds), "row 1, Q4_K block 2 has", "a scale of 2 (less than 2");
  ExpectRefused(matrix.Check(kBounds, 256), "row 257, Q4_K block 2", "a scale of 2");
  EXPECT_TRUE(matrix.Check({}).ok());
  // 63 * 0.0317 = 1.9975 is a half below 2; 63 * 0.03174 = 1.99963 is rounded to 2.
  block.scales[3] = 63;
  block.d = FloatToHalf(0.0317f);
  EXPECT_TRUE(matrix.Check(kBounds).ok());
  block.d = FloatToHalf(2 / 63.0f);
  ExpectRefused(matrix.Check(kBounds), "row 1", "a scale of 2");
  block.d = FloatToHalf(-2);
  block.scales[3] = 1;
  ExpectRefused(matrix.Check(kBounds), "row 1", "a scale of -2");
}

TEST(WeightBounds, BlockScalesAreBoundByThemselves) {
  Matrix<BlockQ5_K> matrix(TensorType::kQ5_K);
  matrix.at(2, 3).dmin = FloatToHalf(63.9f);  // its integers are zero
  EXPECT_TRUE(matrix.Check(kBounds).ok());
  matrix.at(2, 3).dmin = FloatToHalf(64);
  ExpectRefused(matrix.Check(kBounds), "row 2, Q5_K block 3", "a block scale of 64 (less than 64");
  EXPECT_TRUE(matrix.Check({.scale = 2, .weight = 65504}).ok());

  // Those of minimums have another bound.
  Matrix<BlockQ4_K> apart(TensorType::kQ4_K);
  constexpr WeightBounds kApart = {.delta = 1.0f / 32, .delta_min = 8192};
  apart.at(0, 1).d = FloatToHalf(0.0312f);
  apart.at(0, 1).dmin = FloatToHalf(8188);
  EXPECT_TRUE(apart.Check(kApart).ok());
  apart.at(0, 1).dmin = FloatToHalf(8192);
  ExpectRefused(apart.Check(kApart), "row 0, Q4_K block 1", "scale of 8192 (less than 8192");
  apart.at(0, 1).dmin = 0;
  apart.at(0, 1).d = FloatToHalf(-1.0f / 32);
  ExpectRefused(apart.Check(kApart), "row 0, Q4_K block 1", "scale of -0.03125 (less than 0.03125");
}

TEST(WeightBounds, WeightsWithoutScales) {
  Matrix<BlockBF16> matrix(TensorType::kBF16);
  matrix.at(1, 2).bits = FloatToBfloat16(-65280);
  EXPECT_TRUE(matrix.Check(kBounds).ok());
  matrix.at(1, 2).bits = FloatToBfloat16(-65536);
  ExpectRefused(matrix.Check(kBounds), "row 1, column 2", "a weight of -65536 (65504 at most");
  EXPECT_TRUE(matrix.Check({}).ok());
  matrix.at(1, 1).bits = 0x7fc0;  // NaN, and before the other
  EXPECT_EQ(GetModelError(matrix.Check(kBounds)), ModelError::kCorrupt);
}

TEST(WeightBounds, WeightsAndMinimums) {
  Matrix<BlockQ8_0> matrix(TensorType::kQ8_0);
  matrix.at(0, 0).d = FloatToHalf(600);
  matrix.at(0, 0).quants[5] = 109;
  const WeightBounds halves = {.scale = 65504, .weight = 65504};
  EXPECT_TRUE(matrix.Check(halves).ok());
  matrix.at(0, 0).quants[5] = -110;
  ExpectRefused(matrix.Check(halves), "row 0, Q8_0 block 0", "a weight of -66000 (65504 at most");

  Matrix<BlockQ2_K> mins(TensorType::kQ2_K);
  mins.at(0, 1).dmin = FloatToHalf(30000);
  mins.at(0, 1).scales[15] = 2 << 4;
  EXPECT_TRUE(mins.Check(halves).ok());
  mins.at(0, 1).scales[15] = 3 << 4;
  ExpectRefused(mins.Check(halves), "Q2_K block 1", "a minimum of 90000");
}

// For every type: a block scale whose weights are far inside of the bounds passes, one that reaches
// the bound with the least integer does not.
TEST(WeightBounds, EveryQuantisedType) {
  for (const TensorTypeInfo& info : AllTensorTypes()) {
    if (info.block_elements == 1) continue;
    VisitBlockType(info.type, [&]<typename Block>() {
      if constexpr (Block::kElements > 1) {
        Matrix<Block> matrix(info.type);
        memset(&matrix.at(1, 1), 0x11, sizeof(Block));
        matrix.at(1, 1).d = FloatToHalf(1e-3f);
        EXPECT_TRUE(matrix.Check(kBounds).ok()) << info.name;
        matrix.at(1, 1).d = FloatToHalf(60);
        ExpectRefused(matrix.Check(kBounds), "row 1", " block 1 has a scale of");
        matrix.at(1, 1).d = 0x7c00;  // infinite: as without bounds
        EXPECT_EQ(GetModelError(matrix.Check(kBounds)), ModelError::kCorrupt) << info.name;
        EXPECT_EQ(matrix.Check(kBounds), matrix.Check({})) << info.name;
        matrix.at(1, 1).d = 0xffff;  // NaN
        EXPECT_EQ(GetModelError(matrix.Check(kBounds)), ModelError::kCorrupt) << info.name;
      }
    });
  }
}

TEST(WeightBounds, WithoutBoundsAllFiniteWeightsAreHeld) {
  Matrix<BlockF32> matrix(TensorType::kF32);
  matrix.at(0, 0).element = 1e30f;
  EXPECT_TRUE(matrix.Check({}).ok());
  matrix.at(2, 1).element = NAN;
  EXPECT_EQ(GetModelError(matrix.Check({})), ModelError::kCorrupt);
}

TEST(WeightBounds, PartsAreCheckedUnlessTheySaySo) {
  Matrix<BlockQ4_0> matrix(TensorType::kQ4_0);
  matrix.at(2, 0).d = FloatToHalf(3);
  TensorPart part = {.raw = std::as_bytes(std::span(matrix.blocks))};
  ExpectRefused(CheckTensorPart(matrix.info, part, kBounds), "row 2, Q4_0 block 0", "scale of 3");
  EXPECT_TRUE(CheckTensorPart(matrix.info, part).ok());
  part.checked = true;
  EXPECT_TRUE(CheckTensorPart(matrix.info, part, kBounds).ok());
}

}  // namespace
}  // namespace stagecoach
