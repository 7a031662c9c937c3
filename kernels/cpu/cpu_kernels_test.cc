// The kernel tables against each other and against themselves, bit by bit: portable and vector
// units, a row alone and among others, a panel alone and among others.
#include "kernels/cpu/cpu_kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/compare.h"
#include "kernels/cpu/cpu_workspace.h"
#include "kernels/cpu/pack.h"
#include "kernels/cpu/records.h"
#include "model/half.h"
#include "model/random_blocks.h"

namespace stagecoach::cpu {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<float> RandomFloats(size_t count, uint64_t seed) {
  FastRandom random(seed);
  std::vector<float> values(count);
  for (float& value : values) {
    value = random.Uniform(-1, 1);
    value *= value * value * 8;  // some large, many small
  }
  return values;
}

// The tables for vector units that this machine and build have.
std::vector<const CpuKernels*> VectorKernels() {
  std::vector<const CpuKernels*> tables;
  for (const CpuKernels* table : {Avx2Kernels(), Avx512Kernels()}) {
    if (table != nullptr) tables.push_back(table);
  }
  return tables;
}
// All of them.
std::vector<const CpuKernels*> AllKernels() {
  std::vector<const CpuKernels*> tables = VectorKernels();
  tables.push_back(&PortableKernels());
  return tables;
}

#define STAGECOACH_NEEDS_VECTORS() \
  if (VectorKernels().empty()) GTEST_SKIP() << "this machine or build has no AVX2"

struct Quantized {
  QuantBuffer buffer;
  std::vector<float> values;
  int rows, columns;
  ActivationView view() const { return buffer.View(values.data(), rows, columns); }
};

Quantized QuantizeRows(const CpuKernels& kernels, std::vector<float> x, int rows, int columns) {
  Quantized q{*QuantBuffer::Create(rows, columns), std::move(x), rows, columns};
  if (columns % kActivationBlock != 0) return q;  // float weights only
  for (int row = 0; row < rows; ++row) {
    kernels.quantize(q.values.data() + row * columns, columns,
                     q.buffer.quants.data() + row * columns,
                     q.buffer.scales.data() + row * (columns / kActivationBlock));
  }
  return q;
}

class MatmulTest : public testing::TestWithParam<TensorType> {
 protected:
  static constexpr int kOutputs = 35, kRows = 70;  // an odd panel in part, more than a slab
  int columns() const { return GetTensorTypeInfo(GetParam()).block_elements == 1 ? 77 : 768; }
  PackedMatrix Matrix() const {
    FastRandom random(3);
    const size_t blocks = kOutputs * columns() / GetTensorTypeInfo(GetParam()).block_elements;
    return *PackedMatrix::Pack(GetParam(), kOutputs, columns(),
                               MakeRandomBlocks(GetParam(), blocks, 0.3f, random));
  }
  static std::vector<float> Multiply(const CpuKernels& kernels, const PackedMatrix& w,
                                     const Quantized& x, bool accumulate = false) {
    std::vector<float> y(static_cast<size_t>(x.rows) * kOutputs, 0.25f);
    kernels.matmul(w.view(), 0, w.view().panels(), x.view(), accumulate, y.data(), kOutputs);
    return y;
  }
};

TEST_P(MatmulTest, AllTablesHaveTheSameBits) {
  STAGECOACH_NEEDS_VECTORS();
  const PackedMatrix w = Matrix();
  for (const int rows : {1, 2, 3, 4, 5, 6, 7, 9, 16, 17, 19, kRows}) {
    const std::vector<float> x = RandomFloats(static_cast<size_t>(rows) * columns(), rows);
    const Quantized portable = QuantizeRows(PortableKernels(), x, rows, columns());
    for (const bool accumulate : {false, true}) {
      const std::vector<float> expected = Multiply(PortableKernels(), w, portable, accumulate);
      for (const CpuKernels* fast : VectorKernels()) {
        const Quantized quantized = QuantizeRows(*fast, x, rows, columns());
        EXPECT_TRUE(SameBits(expected, Multiply(*fast, w, quantized, accumulate)))
            << fast->name << ", " << rows << " rows";
      }
    }
  }
}

TEST_P(MatmulTest, CompanyDoesNotMatter) {
  const PackedMatrix w = Matrix();
  const std::vector<float> x = RandomFloats(static_cast<size_t>(kRows) * columns(), 9);
  for (const CpuKernels* kernels : AllKernels()) {
    const std::vector<float> all =
        Multiply(*kernels, w, QuantizeRows(*kernels, x, kRows, columns()));
    for (const int row : {0, 1, 2, 31, 63, 64, 66, 69}) {
      const std::span<const float> together = std::span(all).subspan(row * kOutputs, kOutputs);
      const auto at = x.begin() + row * columns();
      const Quantized q = QuantizeRows(*kernels, {at, at + columns()}, 1, columns());
      EXPECT_TRUE(SameBits(Multiply(*kernels, w, q), together)) << kernels->name << ", row " << row;
      std::vector<float> by_panel(kOutputs);
      for (int panel = 0; panel < w.view().panels(); ++panel) {
        kernels->matmul(w.view(), panel, panel + 1, q.view(), false, by_panel.data(), kOutputs);
      }
      EXPECT_TRUE(SameBits(by_panel, together)) << kernels->name << ", row " << row;
    }
  }
}

TEST_P(MatmulTest, NanStaysInItsRow) {
  const PackedMatrix w = Matrix();
  for (const CpuKernels* kernels : AllKernels()) {
    for (const float bad : {kNan, std::numeric_limits<float>::infinity()}) {
      std::vector<float> x = RandomFloats(static_cast<size_t>(3) * columns(), 4);
      const std::vector<float> good =
          Multiply(*kernels, w, QuantizeRows(*kernels, x, 3, columns()));
      x[columns() + 5] = bad;
      const std::vector<float> y = Multiply(*kernels, w, QuantizeRows(*kernels, x, 3, columns()));
      for (int i = 0; i < kOutputs; ++i) {
        EXPECT_EQ(y[i], good[i]);
        EXPECT_FALSE(std::isfinite(y[kOutputs + i])) << kernels->name << " " << i;
        EXPECT_EQ(y[2 * kOutputs + i], good[2 * kOutputs + i]);
      }
    }
  }
}

std::vector<TensorType> AllTypes() {
  std::vector<TensorType> types;
  for (const TensorTypeInfo& info : AllTensorTypes()) types.push_back(info.type);
  return types;
}
INSTANTIATE_TEST_SUITE_P(EveryType, MatmulTest, testing::ValuesIn(AllTypes()),
                         [](const auto& test) {
                           return std::string(GetTensorTypeInfo(test.param).name);
                         });

// The other tests compare what there is: this one says what they left out.
TEST(CpuKernels, Avx512IsCompared) {
  if (Avx512Kernels() == nullptr) GTEST_SKIP() << "this machine or build has no AVX-512 with VNNI";
  EXPECT_EQ(&KernelsFor("avx512"), Avx512Kernels());
  EXPECT_EQ(&KernelsFor("auto"), Avx512Kernels());
  EXPECT_EQ(&KernelsFor("avx2"), Avx2Kernels());
}

// The tables keep the scaled sums of a half in different types. Those of Q6_K get the largest: just
// below 2^24, up to where a float is exact, and twice that over both halves.
TEST(CpuKernels, LargestSumsHaveTheSameBits) {
  STAGECOACH_NEEDS_VECTORS();
  constexpr int kPanels = 3, kColumns = 256;
  FastRandom random(6);
  std::vector<RecordQ6_K> records(kPanels);
  for (RecordQ6_K& record : records) {
    std::fill_n(record.d, kPanelRows, uint16_t{0x3c00});  // 1
    std::memset(record.scales, 0x80, sizeof(record.scales));
    std::memset(record.pairs, 0xff, sizeof(record.pairs));
    std::memset(record.nibbles, 0xff, sizeof(record.nibbles));
    // A few of the lowest bits differ, so that sums over both halves are odd.
    for (int i = 0; i < 40; ++i) record.nibbles[i % 8][random.Next() % 128] &= 0xee;
    for (int i = 0; i < 8; ++i) record.scales[2 * i + 1][random.Next() % kPanelRows] = 0x81;
  }
  const MatrixView w = {.type = TensorType::kQ6_K,
                        .rows = kPanels * kPanelRows,
                        .columns = kColumns,
                        .data = reinterpret_cast<const uint8_t*>(records.data()),
                        .panel_bytes = sizeof(RecordQ6_K)};
  for (const int rows : {1, 12, 20}) {
    const std::vector<float> alike(static_cast<size_t>(rows) * kColumns, -127.0f);
    const Quantized x = QuantizeRows(PortableKernels(), alike, rows, kColumns);
    ASSERT_EQ(x.buffer.quants[0], -127);
    std::vector<float> expected(static_cast<size_t>(rows) * w.rows), y = expected;
    PortableKernels().matmul(w, 0, kPanels, x.view(), false, expected.data(), w.rows);
    for (const CpuKernels* fast : VectorKernels()) {
      fast->matmul(w, 0, kPanels, x.view(), false, y.data(), w.rows);
      EXPECT_TRUE(SameBits(expected, y)) << fast->name << ", " << rows << " rows";
    }
  }
}

TEST(CpuKernels, QuantizeKeepsValuesWithinHalfAStep) {
  const std::vector<float> x = RandomFloats(96, 1);
  const Quantized q = QuantizeRows(PortableKernels(), x, 1, 96);
  for (int i = 0; i < 96; ++i) {
    const ActivationScale& scale = q.buffer.scales[i / 32];
    EXPECT_NEAR(scale.scale * q.buffer.quants[i], x[i], 0.501f * scale.scale);
  }
  // What is left over after the rest has been taken too is 127 times less.
  const QuantBuffer rest = *QuantBuffer::Create(1, 96);
  PortableKernels().quantize_rest(x.data(), q.buffer.quants.data(), q.buffer.scales.data(), 96,
                                  rest.quants.data(), rest.scales.data());
  for (int i = 0; i < 96; ++i) {
    const ActivationScale& scale = q.buffer.scales[i / 32];
    const float both =
        scale.scale * q.buffer.quants[i] + rest.scales[i / 32].scale * rest.quants[i];
    EXPECT_NEAR(both, x[i], scale.scale / 250);
  }
}

TEST(CpuKernels, QuantizeZeros) {
  const Quantized q = QuantizeRows(PortableKernels(), std::vector<float>(32, 0.0f), 1, 32);
  EXPECT_EQ(q.buffer.scales[0].scale, 0.0f);
  EXPECT_EQ(q.buffer.quants[7], 0);
}

bool SameScales(const ActivationScale* a, const ActivationScale* b, int count) {
  return SameBits({&a->scale, 4 * static_cast<size_t>(count)},
                  {&b->scale, 4 * static_cast<size_t>(count)});
}

TEST(CpuKernels, QuantsHaveTheSameBits) {
  STAGECOACH_NEEDS_VECTORS();
  constexpr int kColumns = 32 * 200, kBlocks = kColumns / kActivationBlock;
  std::vector<float> x = RandomFloats(kColumns, 8);
  std::fill_n(x.begin() + 32, 32, 0.0f);
  for (int i = 0; i < 32; ++i) x[64 + i] = 0.5f * static_cast<float>(i - 16);  // halves: to even
  x[64] = -127;
  x[96 + 31] = kNan;
  x[128 + 16] = -std::numeric_limits<float>::infinity();
  x[160 + 15] = 1e-31f;  // among the rest of its block far too small, and then alone
  std::fill_n(x.begin() + 192, 32, 1e-31f);
  struct Both {
    explicit Both(const CpuKernels& kernels, const std::vector<float>& x)
        : quants(*QuantBuffer::Create(1, kColumns)), rest(*QuantBuffer::Create(1, kColumns)) {
      kernels.quantize(x.data(), kColumns, quants.quants.data(), quants.scales.data());
      kernels.quantize_rest(x.data(), quants.quants.data(), quants.scales.data(), kColumns,
                            rest.quants.data(), rest.scales.data());
    }
    QuantBuffer quants, rest;
  };
  const Both expected(PortableKernels(), x);
  for (const CpuKernels* fast : VectorKernels()) {
    const Both y(*fast, x);
    for (const auto part : {&Both::quants, &Both::rest}) {
      const QuantBuffer &a = expected.*part, &b = y.*part;
      EXPECT_EQ(std::memcmp(a.quants.data(), b.quants.data(), kColumns), 0) << fast->name;
      EXPECT_TRUE(SameScales(a.scales.data(), b.scales.data(), kBlocks)) << fast->name;
    }
  }
}

TEST(CpuKernels, RotateHasTheSameBits) {
  STAGECOACH_NEEDS_VECTORS();
  constexpr int kHeads = 3;
  for (const int columns : {0, 2, 8, 14, 16, 30, 64, 80, 128}) {
    for (const int head_dim : {columns, columns + 5}) {  // what is not turned stays
      const std::vector<float> turns = RandomFloats(columns, 9);
      const std::vector<float> x = RandomFloats(static_cast<size_t>(kHeads) * head_dim, 10);
      std::vector<float> expected = x;
      PortableKernels().rotate(turns.data(), columns, kHeads, head_dim, expected.data());
      for (int i = 0; i < kHeads * head_dim; ++i) {
        const int column = i % head_dim, first = i - column % 2, turn = column / 2 * 2;
        if (column >= columns) {
          EXPECT_EQ(expected[i], x[i]);
          continue;
        }
        const double cosine = turns[turn], sine = turns[turn + 1];
        const double exact = column % 2 == 0 ? x[first] * cosine - x[first + 1] * sine
                                             : x[first] * sine + x[first + 1] * cosine;
        EXPECT_NEAR(expected[i], exact, 1e-5);
      }
      for (const CpuKernels* fast : VectorKernels()) {
        std::vector<float> y = x;
        fast->rotate(turns.data(), columns, kHeads, head_dim, y.data());
        EXPECT_TRUE(SameBits(expected, y)) << fast->name << ", " << columns << " of " << head_dim;
      }
    }
  }
}

TEST(CpuKernels, ElementwiseBits) {
  STAGECOACH_NEEDS_VECTORS();
  for (const int n : {1, 7, 8, 15, 16, 24, 40, 100, 256, 1003}) {
    std::vector<float> x = RandomFloats(n, n), w = RandomFloats(n, n + 1);
    x[0] = 200;  // beyond where e^x is clamped
    std::vector<float> a(n), b(n);
    PortableKernels().rms_norm(x.data(), n, w.data(), 1e-5f, a.data());
    for (const CpuKernels* fast : VectorKernels()) {
      fast->rms_norm(x.data(), n, w.data(), 1e-5f, b.data());
      EXPECT_TRUE(SameBits(a, b)) << fast->name << ", norm of " << n;
    }
    for (float& value : x) value *= 12;
    PortableKernels().swiglu(x.data(), w.data(), n, a.data());
    for (const CpuKernels* fast : VectorKernels()) {
      fast->swiglu(x.data(), w.data(), n, b.data());
      EXPECT_TRUE(SameBits(a, b)) << fast->name << ", SwiGlu of " << n;
    }
    for (int i = 0; i < n; ++i) {
      const double exact = x[i] / (1.0 + std::exp(-static_cast<double>(x[i]))) * w[i];
      EXPECT_NEAR(a[i], exact, 1e-6 * std::abs(exact) + 1e-30) << x[i];
    }
  }
}

TEST(CpuKernels, HalvesOfEveryKind) {
  STAGECOACH_NEEDS_VECTORS();
  std::vector<float> x;
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += 65521) {
    if (!std::isnan(FloatFromBits(static_cast<uint32_t>(bits)))) {
      x.push_back(FloatFromBits(static_cast<uint32_t>(bits)));
    }
  }
  const int count = static_cast<int>(x.size());
  std::vector<uint16_t> a(count), b(count);
  PortableKernels().to_half(x.data(), count, a.data());
  for (const CpuKernels* fast : VectorKernels()) {
    fast->to_half(x.data(), count, b.data());
    EXPECT_EQ(a, b) << fast->name;
  }
}

}  // namespace
}  // namespace stagecoach::cpu
