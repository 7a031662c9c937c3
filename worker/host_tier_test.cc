#include "worker/host_tier.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <random>
#include <span>
#include <vector>

#include "gtest/gtest.h"

namespace stagecoach {
namespace {

using Bytes = std::vector<std::byte>;

TensorInfo Tensor(TensorType type, size_t bytes) {
  return {.name = "t", .type = type, .dims = {bytes}, .bytes = bytes};
}

// Weights as models have them: normal, of one scale. The upper half of a float32 is a bfloat16.
Bytes NormalWeights(size_t count, bool bf16) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 0.02f);
  const size_t size = bf16 ? 2 : 4;
  Bytes bytes(count * size);
  for (size_t i = 0; i < count; ++i) {
    const float value = normal(random);
    std::memcpy(bytes.data() + i * size,
                reinterpret_cast<const std::byte*>(&value) + (sizeof(float) - size), size);
  }
  return bytes;
}

Bytes Noise(size_t size) {
  std::mt19937 random(2);
  Bytes bytes(size);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  return bytes;
}

// In three parts.
void Put(HostTier& tier, const TensorInfo& tensor, const Bytes& bytes) {
  HostTierWriter writer = tier.Write(tensor);
  const size_t third = bytes.size() / 3 / 4 * 4;
  writer.Append(std::span(bytes).first(third));
  writer.Append(std::span(bytes).subspan(third, third));
  writer.Append(std::span(bytes).subspan(2 * third));
  writer.Finish();
}

bool Holds(HostTier& tier, const TensorInfo& tensor) { return tier.Find(tensor) != nullptr; }

void ExpectHeld(HostTier& tier, const TensorInfo& tensor, const Bytes& bytes) {
  const std::shared_ptr<const HostTensor> held = tier.Find(tensor);
  ASSERT_NE(held, nullptr);
  Bytes out(bytes.size());
  EXPECT_TRUE(held->Read(0, out));
  EXPECT_EQ(out, bytes);
  const size_t middle = bytes.size() / 3 + 1;  // across chunks, if there are several
  out.resize(bytes.size() - middle - 5);
  EXPECT_TRUE(held->Read(middle, out));
  EXPECT_TRUE(std::equal(out.begin(), out.end(), bytes.begin() + static_cast<ptrdiff_t>(middle)));
}

TEST(HostTierTest, GivesBackTheBytesWithEveryCodec) {
  for (const HostCodec codec : {HostCodec::kNone, HostCodec::kLz4, HostCodec::kZstd}) {
    for (const bool bf16 : {true, false}) {
      const Bytes bytes = NormalWeights(700'001, bf16);  // more than one chunk, the last one odd
      const TensorInfo tensor = Tensor(bf16 ? TensorType::kBF16 : TensorType::kF32, bytes.size());
      HostTier tier(100 << 20, codec);
      tier.SetWanted({&tensor});
      EXPECT_FALSE(Holds(tier, tensor));
      Put(tier, tensor, bytes);
      ExpectHeld(tier, tensor, bytes);
      EXPECT_EQ(tier.Stats().hits, 1);
      EXPECT_EQ(tier.Stats().raw_bytes, bytes.size());
    }
  }
}

TEST(HostTierTest, CompressesFloatsThatPayAndNothingElse) {
  const Bytes weights = NormalWeights(1 << 20, /*bf16=*/true), noise = Noise(1 << 20);
  const TensorInfo floats = Tensor(TensorType::kBF16, weights.size());
  const TensorInfo quants = Tensor(TensorType::kQ4_K, noise.size());
  HostTier tier(100 << 20, HostCodec::kZstd);
  tier.SetWanted({&floats, &quants});
  Put(tier, floats, weights);
  EXPECT_LT(tier.Stats().bytes, weights.size() / 1.2);
  const uint64_t before = tier.Stats().bytes;
  Put(tier, quants, noise);
  EXPECT_EQ(tier.Stats().bytes - before, noise.size());
  ExpectHeld(tier, quants, noise);
}

TEST(HostTierTest, ATypeThatDoesNotPayIsNotTriedAgain) {
  const Bytes noise = Noise(1 << 20), zeros(1 << 20);
  const TensorInfo first = Tensor(TensorType::kQ4_K, noise.size());
  const TensorInfo second = Tensor(TensorType::kQ4_K, zeros.size());
  const TensorInfo other = Tensor(TensorType::kQ6_K, zeros.size());
  HostTier tier(100 << 20, HostCodec::kLz4);
  tier.SetWanted({&first, &second, &other});
  Put(tier, first, noise);
  Put(tier, second, zeros);  // would compress well
  EXPECT_EQ(tier.Stats().bytes, noise.size() + zeros.size());
  EXPECT_EQ(tier.Stats().tried_raw_bytes, noise.size());
  EXPECT_GE(tier.Stats().tried_bytes, noise.size() * 9 / 10);
  Put(tier, other, zeros);
  EXPECT_LT(tier.Stats().bytes, noise.size() + zeros.size() + (64 << 10));
}

TEST(HostTierTest, HoldsNoMoreThanItsCapacityAndOnlyWhatIsWanted) {
  const Bytes bytes = Noise(1000);
  const TensorInfo a = Tensor(TensorType::kF32, 1000), b = a, c = a, unwanted = a;
  HostTier tier(2500, HostCodec::kNone);
  tier.SetWanted({&a, &b, &c});
  for (const TensorInfo* tensor : {&unwanted, &a, &b, &a, &c}) Put(tier, *tensor, bytes);
  EXPECT_EQ(tier.Stats().bytes, 2000);
  EXPECT_FALSE(Holds(tier, unwanted));
  EXPECT_TRUE(Holds(tier, a));
  EXPECT_FALSE(Holds(tier, c));
  tier.SetWanted({&b, &c});
  EXPECT_FALSE(Holds(tier, a));
  EXPECT_EQ(tier.Stats().bytes, 1000);
  Put(tier, c, bytes);
  EXPECT_TRUE(Holds(tier, c));
}

}  // namespace
}  // namespace stagecoach
