#include "model/dequantize.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/block_decode.h"
#include "model/model_error.h"

namespace stagecoach {
namespace {

constexpr uint16_t kHalfTwo = 0x4000;      // 2.0
constexpr uint16_t kHalfQuarter = 0x3400;  // 0.25
constexpr uint16_t kHalfInfinity = 0x7c00;
constexpr uint16_t kHalfNan = 0x7e00;

template <typename Block>
std::span<const std::byte> Bytes(const Block& block) {
  return std::as_bytes(std::span(&block, 1));
}

template <typename Block>
std::vector<float> Decode(const Block& block) {
  std::vector<float> out(Block::kElements);
  DecodeBlock(block, out.data());
  return out;
}

TEST(Half, AllValuesConvertAsTheFormatSays) {
  for (int sign = 0; sign < 2; ++sign) {
    for (int exponent = 0; exponent < 31; ++exponent) {
      for (int mantissa = 0; mantissa < 1024; ++mantissa) {
        const auto half = static_cast<uint16_t>(sign << 15 | exponent << 10 | mantissa);
        const double magnitude =
            exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
        const float value = HalfToFloat(half);
        ASSERT_EQ(value, static_cast<float>(sign ? -magnitude : magnitude)) << half;
        ASSERT_EQ(std::signbit(value), sign == 1) << half;
        ASSERT_EQ(FloatToHalf(value), half);
        ASSERT_TRUE(HalfIsFinite(half));
      }
    }
  }
  EXPECT_EQ(HalfToFloat(kHalfInfinity), std::numeric_limits<float>::infinity());
  EXPECT_TRUE(std::isnan(HalfToFloat(kHalfNan)));
  EXPECT_FALSE(HalfIsFinite(kHalfInfinity));
  EXPECT_FALSE(HalfIsFinite(kHalfNan));
}

TEST(Half, RoundsToNearestTiesToEven) {
  for (uint16_t half = 0; half + 1 < kHalfInfinity; ++half) {
    const float low = HalfToFloat(half);
    const float high = HalfToFloat(half + 1);
    const float middle = (low + high) / 2;  // exact in float
    ASSERT_EQ(FloatToHalf(middle), half % 2 == 0 ? half : half + 1) << half;
    ASSERT_EQ(FloatToHalf(std::nextafter(middle, 0.0f)), half) << half;
    ASSERT_EQ(FloatToHalf(-std::nextafter(middle, 1e9f)), 0x8000 | (half + 1)) << half;
  }
  EXPECT_EQ(FloatToHalf(65519.99f), 0x7bff);
  EXPECT_EQ(FloatToHalf(65520.0f), kHalfInfinity);
  EXPECT_EQ(FloatToHalf(-std::numeric_limits<float>::infinity()), 0x8000 | kHalfInfinity);
  EXPECT_TRUE(std::isnan(HalfToFloat(FloatToHalf(std::nanf("")))));
  EXPECT_EQ(FloatToHalf(1e-30f), 0);
}

TEST(Bfloat16, RoundsToNearestTiesToEven) {
  EXPECT_EQ(Bfloat16ToFloat(0x3fc0), 1.5f);
  EXPECT_EQ(FloatToBfloat16(1.5f), 0x3fc0);
  EXPECT_EQ(FloatToBfloat16(FloatFromBits(0x3f808000)), 0x3f80);
  EXPECT_EQ(FloatToBfloat16(FloatFromBits(0x3f818000)), 0x3f82);
  EXPECT_EQ(FloatToBfloat16(FloatFromBits(0x3f808001)), 0x3f81);
  EXPECT_TRUE(std::isnan(Bfloat16ToFloat(FloatToBfloat16(FloatFromBits(0x7f800001)))));
}

// Each format: one or two elements are set by hand at their published bit positions; all others
// must keep the value of a zero code.

TEST(BlockDecode, Q4_0) {
  BlockQ4_0 block = {.d = kHalfTwo};
  block.nibbles[3] = 0xf1;  // element 3: 1, element 19: 15
  const std::vector<float> out = Decode(block);
  EXPECT_EQ(out[3], 2.0f * (1 - 8));
  EXPECT_EQ(out[19], 2.0f * (15 - 8));
  EXPECT_EQ(out[0], -16.0f);
}

TEST(BlockDecode, Q4_1) {
  BlockQ4_1 block = {.d = kHalfTwo, .m = kHalfQuarter};
  block.nibbles[15] = 0x52;
  const std::vector<float> out = Decode(block);
  EXPECT_EQ(out[15], 2.0f * 2 + 0.25f);
  EXPECT_EQ(out[31], 2.0f * 5 + 0.25f);
  EXPECT_EQ(out[0], 0.25f);
}

TEST(BlockDecode, Q5_0) {
  BlockQ5_0 block = {.d = kHalfTwo};
  block.nibbles[4] = 0x37;
  block.high_bits[2] = 1 << 4;  // element 20
  const std::vector<float> out = Decode(block);
  EXPECT_EQ(out[4], 2.0f * (7 - 16));
  EXPECT_EQ(out[20], 2.0f * (3 + 16 - 16));
  EXPECT_EQ(out[5], -32.0f);
}

TEST(BlockDecode, Q5_1) {
  BlockQ5_1 block = {.d = kHalfTwo, .m = kHalfQuarter};
  block.nibbles[9] = 0x37;
  block.high_bits[1] = 1 << 1;  // element 9
  const std::vector<float> out = Decode(block);
  EXPECT_EQ(out[9], 2.0f * (7 + 16) + 0.25f);
  EXPECT_EQ(out[25], 2.0f * 3 + 0.25f);
  EXPECT_EQ(out[0], 0.25f);
}

TEST(BlockDecode, Q8_0) {
  BlockQ8_0 block = {.d = kHalfQuarter};
  block.quants[31] = -128;
  block.quants[0] = 127;
  const std::vector<float> out = Decode(block);
  EXPECT_EQ(out[31], -32.0f);
  EXPECT_EQ(out[0], 127 * 0.25f);
  EXPECT_EQ(out[1], 0.0f);
}

TEST(BlockDecode, Q2_K) {
  BlockQ2_K block = {.d = kHalfTwo, .dmin = kHalfQuarter};
  // Element 128 + 2 * 32 + 17: second half, third run of 32, second group of 16 in it: group 13.
  block.crumbs[32 + 17] = 3 << 4;
  block.scales[13] = 0x5a;
  const std::vector<float> out = Decode(block);
  EXPECT_EQ(out[209], 2.0f * 10 * 3 - 0.25f * 5);
  EXPECT_EQ(out[208], -0.25f * 5);
  EXPECT_EQ(out[207], 0.0f);
}

TEST(BlockDecode, Q3_K) {
  BlockQ3_K block = {.d = kHalfTwo};
  // Element 145: second half, first run, byte 17, group 9; its high bit is bit 4 of byte 17.
  block.crumbs[32 + 17] = 2;
  block.high_bits[17] = 1 << 4;
  block.scales[1] = 0xb0;          // low nibble of scale 9 (scale 1 lies in the other half)
  block.scales[8 + 1] = 0x3 << 4;  // its upper bits: 0x3b - 32 = 27
  const std::vector<float> out = Decode(block);
  EXPECT_EQ(out[145], 2.0f * 27 * 2);
  EXPECT_EQ(out[144], 2.0f * 27 * -4);
  EXPECT_EQ(out[17], 2.0f * -32 * -4);
}

// Scales and minimums of Q4_K and Q5_K: those of groups 4..7 are spread over two bytes.
void SetPackedScales(uint8_t scales[12]) {
  scales[1] = 0x80 | 33;  // scale 1 = 33; upper bits of scale 5 = 2
  scales[5] = 0x40 | 44;  // min 1 = 44; upper bits of min 5 = 1
  scales[9] = 0x7c;       // scale 5 = 2 << 4 | 12 = 44, min 5 = 1 << 4 | 7 = 23
}

TEST(BlockDecode, Q4_K) {
  BlockQ4_K block = {.d = kHalfTwo, .dmin = kHalfQuarter};
  SetPackedScales(block.scales);
  block.nibbles[7] = 0xe0;       // element 32 + 7, group 1
  block.nibbles[64 + 7] = 0x90;  // element 160 + 7, group 5
  const std::vector<float> out = Decode(block);
  EXPECT_EQ(out[39], 2.0f * 33 * 14 - 0.25f * 44);
  EXPECT_EQ(out[167], 2.0f * 44 * 9 - 0.25f * 23);
  EXPECT_EQ(out[166], -0.25f * 23);
  EXPECT_EQ(out[0], 0.0f);
}

TEST(BlockDecode, Q5_K) {
  BlockQ5_K block = {.d = kHalfTwo, .dmin = kHalfQuarter};
  SetPackedScales(block.scales);
  block.nibbles[7] = 0xe0;
  block.high_bits[7] = 1 << 5;  // fifth bit of element 160 + 7
  block.nibbles[64 + 7] = 0x90;
  const std::vector<float> out = Decode(block);
  EXPECT_EQ(out[39], 2.0f * 33 * 14 - 0.25f * 44);
  EXPECT_EQ(out[167], 2.0f * 44 * (9 + 16) - 0.25f * 23);
}

TEST(BlockDecode, Q6_K) {
  BlockQ6_K block = {.d = kHalfTwo};
  // Element 128 + 64 + 40 = 232: byte 64 + 40, high half; crumb byte 32 + 8, bits 6..7; group 14.
  block.nibbles[64 + 40] = 0xd0;
  block.crumbs[32 + 8] = 2 << 6;
  block.scales[14] = -3;
  const std::vector<float> out = Decode(block);
  EXPECT_EQ(out[232], 2.0f * -3 * (13 + 32 - 32));
  EXPECT_EQ(out[231], 2.0f * -3 * -32);
  EXPECT_EQ(out[0], 0.0f);
}

TEST(DequantizeRow, SeveralBlocksAtAnyAlignment) {
  BlockQ8_0 blocks[2] = {{.d = kHalfTwo}, {.d = kHalfQuarter}};
  blocks[0].quants[1] = 3;
  blocks[1].quants[2] = 8;
  std::vector<std::byte> raw(1 + sizeof(blocks));
  memcpy(raw.data() + 1, blocks, sizeof(blocks));
  std::vector<float> out(64);
  ASSERT_TRUE(DequantizeRow(TensorType::kQ8_0, std::span(raw).subspan(1), out).ok());
  EXPECT_EQ(out[1], 6.0f);
  EXPECT_EQ(out[34], 2.0f);
}

TEST(DequantizeRow, RefusesSizesThatDisagree) {
  for (const TensorTypeInfo& info : AllTensorTypes()) {
    std::vector<std::byte> raw(2 * info.block_bytes);
    std::vector<float> out(2 * info.block_elements);
    EXPECT_TRUE(DequantizeRow(info.type, raw, out).ok()) << info.name;
    const auto short_raw = std::span(raw).first(raw.size() - 1);
    EXPECT_EQ(GetModelError(DequantizeRow(info.type, short_raw, out)), ModelError::kBadShape);
    const auto short_out = std::span(out).first(out.size() - 1);
    EXPECT_EQ(GetModelError(DequantizeRow(info.type, raw, short_out)), ModelError::kBadShape);
  }
}

TEST(FiniteScales, NamesTheFirstBadBlock) {
  for (uint16_t bad : {kHalfInfinity, kHalfNan, uint16_t{0xfc00}}) {
    BlockQ4_K blocks[3] = {{.d = kHalfTwo}, {.d = kHalfTwo, .dmin = bad}, {.d = bad}};
    const absl::Status status = FiniteScales(TensorType::kQ4_K, std::as_bytes(std::span(blocks)));
    EXPECT_EQ(GetModelError(status), ModelError::kCorrupt);
    EXPECT_THAT(std::string(status.message()), testing::HasSubstr("block 1 "));
    EXPECT_TRUE(FiniteScales(TensorType::kQ4_K, Bytes(blocks[0])).ok());
  }
}

TEST(FiniteScales, SeesEveryScaleOfEveryType) {
  for (const TensorTypeInfo& info : AllTensorTypes()) {
    const std::vector<std::byte> zeros(2 * info.block_bytes);
    EXPECT_TRUE(FiniteScales(info.type, zeros).ok()) << info.name;
    // All ones: every scale is a NaN.
    const std::vector<std::byte> ones(2 * info.block_bytes, std::byte{0xff});
    EXPECT_EQ(GetModelError(FiniteScales(info.type, ones)), ModelError::kCorrupt) << info.name;
    EXPECT_FALSE(FiniteScales(info.type, std::span(ones).first(1)).ok()) << info.name;
  }
}

}  // namespace
}  // namespace stagecoach
