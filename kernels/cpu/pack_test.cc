#include "kernels/cpu/pack.h"

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/simd_portable.h"
#include "kernels/cpu/unpack.h"
#include "model/dequantize.h"
#include "model/random_blocks.h"

namespace stagecoach::cpu {
namespace {

using S = PortableSimd;

// The weights of one panel [8][columns] as the kernels see them.
template <typename Record>
std::vector<float> UnpackPanel(const uint8_t* panel, int columns) {
  const Record* records = reinterpret_cast<const Record*>(panel);
  std::vector<float> out(static_cast<size_t>(kPanelRows) * columns);
  if constexpr (requires { Record::kGroups; }) {
    using U = Unpack<S, Record>;
    for (int group = 0; group < columns / kActivationBlock; ++group) {
      const Record& record = records[group / Record::kGroups];
      S::Bytes weights[8];
      GroupScales<S> scales;
      U::Weights(record, group % Record::kGroups, 0, weights);
      U::Scales(record, group % Record::kGroups, 0, &scales);
      for (int row = 0; row < kPanelRows; ++row) {
        for (int k = 0; k < kActivationBlock; ++k) {
          const int half = U::kHalves == 2 ? k / 16 : 0;
          const uint8_t byte = weights[k / 4].v[4 * row + k % 4];
          const int quant = U::kSigned ? static_cast<int8_t>(byte) : byte;
          const int scale = U::kUnitScale ? 1 : scales.scale[half].v[2 * row];
          const float min = U::kMin ? scales.min[half].v[row] : 0.0f;
          out[row * columns + group * kActivationBlock + k] =
              scales.delta.v[row] * static_cast<float>(scale * quant) - min;
        }
      }
    }
  } else {
    for (int k = 0; k < columns; ++k) {
      const S::Floats column = LoadColumn<S>(records[k], 0);
      for (int row = 0; row < kPanelRows; ++row) out[row * columns + k] = column.v[row];
    }
  }
  return out;
}

std::vector<float> UnpackPanel(TensorType type, const uint8_t* panel, int columns) {
  switch (type) {
#define STAGECOACH_CASE(name) \
  case TensorType::k##name:   \
    return UnpackPanel<Record##name>(panel, columns)
    STAGECOACH_CASE(F32);
    STAGECOACH_CASE(F16);
    STAGECOACH_CASE(BF16);
    STAGECOACH_CASE(Q4_0);
    STAGECOACH_CASE(Q4_1);
    STAGECOACH_CASE(Q5_0);
    STAGECOACH_CASE(Q5_1);
    STAGECOACH_CASE(Q8_0);
    STAGECOACH_CASE(Q2_K);
    STAGECOACH_CASE(Q3_K);
    STAGECOACH_CASE(Q4_K);
    STAGECOACH_CASE(Q5_K);
    STAGECOACH_CASE(Q6_K);
#undef STAGECOACH_CASE
  }
  return {};
}

class PackTest : public testing::TestWithParam<TensorType> {};

TEST_P(PackTest, RoundTrip) {
  const TensorType type = GetParam();
  constexpr int kRows = 21, kColumns = 768;  // a part of a panel at the end
  FastRandom random(7);
  const size_t blocks = kRows * kColumns / GetTensorTypeInfo(type).block_elements;
  const std::vector<std::byte> raw = MakeRandomBlocks(type, blocks, 0.5f, random);
  std::vector<float> expected(kRows * kColumns);
  ASSERT_TRUE(DequantizeRow(type, raw, expected).ok());

  const auto matrix = PackedMatrix::Pack(type, kRows, kColumns, raw);
  ASSERT_TRUE(matrix.ok()) << matrix.status();
  EXPECT_EQ(matrix->view().panels(), 3);
  EXPECT_EQ(matrix->bytes(), 3 * PanelBytes(type, kColumns));
  EXPECT_LE(PanelBytes(type, kColumns), 1.04 * (8.0 / kRows) * raw.size());
  for (int panel = 0; panel < 3; ++panel) {
    const std::vector<float> weights =
        UnpackPanel(type, matrix->view().data + panel * matrix->view().panel_bytes, kColumns);
    for (int row = 0; row < kPanelRows; ++row) {
      for (int k = 0; k < kColumns; ++k) {
        const float actual = weights[row * kColumns + k];
        const int output = panel * kPanelRows + row;
        const float wanted = output < kRows ? expected[output * kColumns + k] : 0.0f;
        // The minimum of symmetric types is subtracted after the product: one rounding more.
        ASSERT_NEAR(actual, wanted, 1e-6f * (1 + std::abs(wanted)))
            << "output " << output << ", column " << k;
      }
    }
  }
}

std::vector<TensorType> AllTypes() {
  std::vector<TensorType> types;
  for (const TensorTypeInfo& info : AllTensorTypes()) types.push_back(info.type);
  return types;
}
INSTANTIATE_TEST_SUITE_P(EveryType, PackTest, testing::ValuesIn(AllTypes()), [](const auto& test) {
  return std::string(GetTensorTypeInfo(test.param).name);
});

}  // namespace
}  // namespace stagecoach::cpu
