#include "worker/part_check.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/tensor_check.h"
#include "model/manifest.h"

namespace stagecoach {
namespace {

constexpr uint64_t kRows = 4 * kPartRows, kColumns = 512;

// Blocks of Q8_0 with the scale 1.
class PartCheckTest : public testing::Test {
 protected:
  PartCheckTest() {
    tensor_.name = "t";
    tensor_.type = TensorType::kQ8_0;
    tensor_.dims = {kColumns, kRows};
    tensor_.bytes = kRows * kRowBytes;
    raw_.resize(tensor_.bytes, std::byte{3});
    for (size_t block = 0; block < raw_.size(); block += kBlockBytes) SetScale(block, 0x3c00);
  }
  void SetScale(size_t at, uint16_t half) { std::memcpy(&raw_[at], &half, sizeof half); }

  // In runs of `step` bytes.
  void Check(size_t step, bool good) {
    const UnitPart what = {
        .role = TensorRole::kOutput, .tensor = &tensor_, .bytes = tensor_.bytes, .last = true};
    const WeightBounds bounds;
    PartCheck check(what, bounds);
    for (size_t end = step; end < raw_.size() + step; end += step) {
      check.LookThrough(std::span(raw_).first(std::min(end, raw_.size())));
    }
    ASSERT_TRUE(check.status().ok());
    EXPECT_EQ(check.hash(), HashTensorBytes(raw_)) << step;
    EXPECT_EQ(check.weights().ok(), good) << step;
    EXPECT_EQ(check.weights(), CheckTensorPart(tensor_, {.raw = raw_}, bounds)) << step;
  }

  static constexpr size_t kBlockBytes = 34, kRowBytes = kColumns / 32 * kBlockBytes;
  static constexpr size_t kGroupBytes = kRowBytes * kPartRows, kBytes = kRowBytes * kRows;
  static constexpr size_t kSteps[] = {1000, kRowBytes, kGroupBytes, 3 * kGroupBytes + 1, kBytes};
  TensorInfo tensor_;
  std::vector<std::byte> raw_;
};

TEST_F(PartCheckTest, InStepsAsAtOnce) {
  for (const size_t step : kSteps) Check(step, /*good=*/true);
}

TEST_F(PartCheckTest, FindsABadScaleWhereverItLies) {
  for (const size_t row : {size_t{0}, size_t{kPartRows}, size_t{kRows - 1}}) {
    SetScale(row * kRowBytes, 0x7e00);  // NaN
    for (const size_t step : kSteps) Check(step, /*good=*/false);
    SetScale(row * kRowBytes, 0x3c00);
  }
}

TEST_F(PartCheckTest, BytesThatAreNoRowsAreAnError) {
  tensor_.bytes -= 1;
  raw_.pop_back();
  Check(1000, /*good=*/false);
}

}  // namespace
}  // namespace stagecoach
