// The kernel tables against each other and against themselves, bit by bit: portable and AVX2, a row
// alone and among others, a panel alone and among others.
#include "kernels/cpu/cpu_kernels.h"

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/compare.h"
#include "kernels/cpu/cpu_workspace.h"
#include "kernels/cpu/pack.h"
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

const CpuKernels* Fast() { return Avx2Kernels(); }

#define STAGECOACH_NEEDS_AVX2() \
  if (Fast() == nullptr) GTEST_SKIP() << "this machine or build has no AVX2"

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
  static constexpr int kOutputs = 27, kRows = 70;  // a part of a panel, more than a slab of rows
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

TEST_P(MatmulTest, PortableAndAvx2HaveTheSameBits) {
  STAGECOACH_NEEDS_AVX2();
  const PackedMatrix w = Matrix();
  for (const int rows : {1, 2, 3, 4, 5, kRows}) {
    const std::vector<float> x = RandomFloats(static_cast<size_t>(rows) * columns(), rows);
    const Quantized portable = QuantizeRows(PortableKernels(), x, rows, columns());
    const Quantized fast = QuantizeRows(*Fast(), x, rows, columns());
    for (const bool accumulate : {false, true}) {
      EXPECT_TRUE(SameBits(Multiply(PortableKernels(), w, portable, accumulate),
                           Multiply(*Fast(), w, fast, accumulate)))
          << rows << " rows";
    }
  }
}

TEST_P(MatmulTest, CompanyDoesNotMatter) {
  const CpuKernels& kernels = Fast() != nullptr ? *Fast() : PortableKernels();
  const PackedMatrix w = Matrix();
  const std::vector<float> x = RandomFloats(static_cast<size_t>(kRows) * columns(), 9);
  const std::vector<float> all = Multiply(kernels, w, QuantizeRows(kernels, x, kRows, columns()));
  for (const int row : {0, 1, 2, 31, 63, 64, 66, 69}) {
    const std::vector<float> alone(x.begin() + row * columns(), x.begin() + (row + 1) * columns());
    const Quantized q = QuantizeRows(kernels, alone, 1, columns());
    EXPECT_TRUE(SameBits(Multiply(kernels, w, q), std::span(all).subspan(row * kOutputs, kOutputs)))
        << "row " << row;
    std::vector<float> by_panel(kOutputs);
    for (int panel = 0; panel < w.view().panels(); ++panel) {
      kernels.matmul(w.view(), panel, panel + 1, q.view(), false, by_panel.data(), kOutputs);
    }
    EXPECT_TRUE(SameBits(by_panel, std::span(all).subspan(row * kOutputs, kOutputs)));
  }
}

TEST_P(MatmulTest, NanStaysInItsRow) {
  const CpuKernels& kernels = Fast() != nullptr ? *Fast() : PortableKernels();
  const PackedMatrix w = Matrix();
  for (const float bad : {kNan, std::numeric_limits<float>::infinity()}) {
    std::vector<float> x = RandomFloats(static_cast<size_t>(3) * columns(), 4);
    const std::vector<float> good = Multiply(kernels, w, QuantizeRows(kernels, x, 3, columns()));
    x[columns() + 5] = bad;
    const std::vector<float> y = Multiply(kernels, w, QuantizeRows(kernels, x, 3, columns()));
    for (int i = 0; i < kOutputs; ++i) {
      EXPECT_EQ(y[i], good[i]);
      EXPECT_FALSE(std::isfinite(y[kOutputs + i])) << i;
      EXPECT_EQ(y[2 * kOutputs + i], good[2 * kOutputs + i]);
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

TEST(CpuKernels, ElementwiseBits) {
  STAGECOACH_NEEDS_AVX2();
  for (const int n : {1, 7, 8, 16, 100, 256, 1003}) {
    std::vector<float> x = RandomFloats(n, n), w = RandomFloats(n, n + 1);
    x[0] = 200;  // beyond where e^x is clamped
    std::vector<float> a(n), b(n);
    PortableKernels().rms_norm(x.data(), n, w.data(), 1e-5f, a.data());
    Fast()->rms_norm(x.data(), n, w.data(), 1e-5f, b.data());
    EXPECT_TRUE(SameBits(a, b)) << "norm of " << n;
    for (float& value : x) value *= 12;
    PortableKernels().swiglu(x.data(), w.data(), n, a.data());
    Fast()->swiglu(x.data(), w.data(), n, b.data());
    EXPECT_TRUE(SameBits(a, b)) << "SwiGlu of " << n;
    for (int i = 0; i < n; ++i) {
      const double exact = x[i] / (1.0 + std::exp(-static_cast<double>(x[i]))) * w[i];
      EXPECT_NEAR(b[i], exact, 1e-6 * std::abs(exact) + 1e-30) << x[i];
    }
  }
}

TEST(CpuKernels, HalvesOfEveryKind) {
  STAGECOACH_NEEDS_AVX2();
  std::vector<float> x;
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += 65521) {
    if (!std::isnan(FloatFromBits(static_cast<uint32_t>(bits)))) {
      x.push_back(FloatFromBits(static_cast<uint32_t>(bits)));
    }
  }
  const int count = static_cast<int>(x.size());
  std::vector<uint16_t> a(count), b(count);
  PortableKernels().to_half(x.data(), count, a.data());
  Fast()->to_half(x.data(), count, b.data());
  EXPECT_EQ(a, b);
}

}  // namespace
}  // namespace stagecoach::cpu
