// The numerics contract: the bits of a sequence's logits do not depend on the number of stages or
// threads, on the chunks of its prompt, on the company it keeps, or on where its KV lies and whose
// rows have put it there.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "model/test_paths.h"
#include "tests/stage_chain.h"

namespace stagecoach {
namespace {

constexpr int kVocabulary = 1024;

TokenList RandomTokens(int count, uint32_t seed) {
  std::mt19937 random(seed);
  TokenList tokens = {1};
  while (static_cast<int>(tokens.size()) < count) {
    tokens.push_back(static_cast<int32_t>(3 + random() % (kVocabulary - 3)));
  }
  return tokens;
}

std::vector<float> MustLogits(const StageChainOptions& options,
                              const std::vector<TokenList>& sequences, int chunk,
                              const std::string& model = "demo-Q4_K_M.gguf") {
  auto chain = StageChain::Create(TestDataPath(model), options);
  EXPECT_TRUE(chain.ok()) << chain.status();
  if (!chain.ok()) return {};
  auto logits = (*chain)->Logits(sequences, chunk);
  EXPECT_TRUE(logits.ok()) << logits.status();
  return logits.ok() ? (*logits)[0] : std::vector<float>();
}

void ExpectSameBits(const std::vector<float>& got, const std::vector<float>& want,
                    const std::string& what) {
  ASSERT_EQ(got.size(), want.size()) << what;
  ASSERT_FALSE(want.empty()) << what;
  if (std::memcmp(got.data(), want.data(), want.size() * sizeof(float)) == 0) return;
  size_t differing = 0, first = want.size();
  for (size_t i = 0; i < want.size(); ++i) {
    if (std::memcmp(&got[i], &want[i], sizeof(float)) != 0) {
      ++differing;
      first = std::min(first, i);
    }
  }
  FAIL() << what << ": " << differing << " of " << want.size()
         << " logits differ, the first at row " << first / kVocabulary;
}

class BitEqualityTest : public testing::Test {
 protected:
  const TokenList tokens_ = RandomTokens(150, 7);
  const std::vector<float> alone_ = MustLogits({}, {tokens_}, 512);
};

TEST_F(BitEqualityTest, AnyNumberOfStages) {
  for (const int stages : {2, 4, 32}) {
    ExpectSameBits(MustLogits({.stages = stages}, {tokens_}, 512), alone_,
                   std::to_string(stages) + " stages");
  }
}

TEST_F(BitEqualityTest, AnyNumberOfThreads) {
  for (const int threads : {2, 3, 5}) {
    ExpectSameBits(MustLogits({.threads = threads}, {tokens_}, 512), alone_,
                   std::to_string(threads) + " threads");
  }
}

TEST_F(BitEqualityTest, AnyChunksOfThePrompt) {
  for (const int chunk : {1, 7, 64}) {
    ExpectSameBits(MustLogits({}, {tokens_}, chunk), alone_, "chunks of " + std::to_string(chunk));
  }
}

TEST_F(BitEqualityTest, AmongStrangers) {
  std::vector<TokenList> company = {tokens_};
  for (uint32_t i = 1; i < 8; ++i)
    company.push_back(RandomTokens(20 + 30 * static_cast<int>(i), i));
  for (const int chunk : {1, 7, 64}) {
    ExpectSameBits(MustLogits({.stages = 2, .threads = 2}, company, chunk), alone_,
                   "batch of 8, chunks of " + std::to_string(chunk));
  }
}

TEST_F(BitEqualityTest, AReusedSlot) {
  auto chain = StageChain::Create(TestDataPath("demo-Q4_K_M.gguf"), {});
  ASSERT_TRUE(chain.ok()) << chain.status();
  ASSERT_TRUE((*chain)->Logits({RandomTokens(200, 99)}, 64).ok());
  auto logits = (*chain)->Logits({tokens_}, 64);
  ASSERT_TRUE(logits.ok()) << logits.status();
  ExpectSameBits((*logits)[0], alone_, "reused slot");
}

TEST_F(BitEqualityTest, AnyBlocks) {
  const std::vector<TokenList> company = {tokens_, RandomTokens(100, 5), RandomTokens(170, 6)};
  for (const uint32_t seed : {1, 2}) {
    ExpectSameBits(MustLogits({.stages = 2, .block_seed = seed}, company, 7), alone_,
                   "blocks shuffled with seed " + std::to_string(seed));
  }
}

// Logits of the rows from `position` on, as of the whole sequence run alone.
std::vector<float> LogitsFrom(const TokenList& tokens, int position) {
  const std::vector<float> all = MustLogits({}, {tokens}, 512);
  return {all.begin() + static_cast<std::ptrdiff_t>(position) * kVocabulary, all.end()};
}

class SharedBlocksTest : public BitEqualityTest, public testing::WithParamInterface<int> {
 protected:
  SharedBlocksTest() {
    auto chain = StageChain::Create(TestDataPath("demo-Q4_K_M.gguf"),
                                    {.stages = 2, .threads = 2, .block_seed = 3});
    EXPECT_TRUE(chain.ok()) << chain.status();
    chain_ = *std::move(chain);
    EXPECT_TRUE(chain_->Logits({tokens_}, 64).ok());
  }
  // One step with the tokens [first, last) of a sequence.
  void ExpectStep(int slot, const TokenList& tokens, int first, int last,
                  const std::vector<float>& want, const std::string& what) {
    auto logits = chain_->Step({{slot, {tokens.begin() + first, tokens.begin() + last}}});
    ASSERT_TRUE(logits.ok()) << logits.status();
    ExpectSameBits((*logits)[0], want, what);
  }
  // The first `shared` tokens of tokens_, then others.
  TokenList Cousin(int shared, uint32_t seed) const {
    TokenList tokens(tokens_.begin(), tokens_.begin() + shared);
    const TokenList rest = RandomTokens(60, seed);
    tokens.insert(tokens.end(), rest.begin() + 1, rest.end());
    return tokens;
  }

  std::unique_ptr<StageChain> chain_;
};

// On whole blocks, and in the middle of one, which is copied on write; both sequences go on.
TEST_P(SharedBlocksTest, AFork) {
  const int shared = GetParam();
  const TokenList cousin = Cousin(shared, 11);
  TokenList longer = tokens_;
  longer.insert(longer.end(), {5, 6, 7, 8, 9});
  const int child = chain_->Fork(0, shared);
  ExpectStep(child, cousin, shared, cousin.size(), LogitsFrom(cousin, shared), "the fork");
  ExpectStep(0, longer, tokens_.size(), longer.size(), LogitsFrom(longer, tokens_.size()),
             "the one it came from");
}

// A prefix that outlives the sequence that wrote it.
TEST_P(SharedBlocksTest, APrefixOfAClosedSequence) {
  const int shared = GetParam();
  const TokenList cousin = Cousin(shared, 12);
  const int child = chain_->Fork(0, shared);
  chain_->Close(0);
  const int stranger = chain_->Open();  // takes the blocks that became free
  const TokenList other = RandomTokens(90, 13);
  auto logits =
      chain_->Step({{stranger, other}, {child, TokenList(cousin.begin() + shared, cousin.end())}});
  ASSERT_TRUE(logits.ok()) << logits.status();
  ExpectSameBits((*logits)[0], LogitsFrom(other, 0), "the stranger");
  ExpectSameBits((*logits)[1], LogitsFrom(cousin, shared), "the cached prefix");
}

INSTANTIATE_TEST_SUITE_P(Positions, SharedBlocksTest, testing::Values(32, 128, 1, 70));

// Closed in the middle, its blocks lent to another, then replayed as a prompt and continued.
TEST_F(BitEqualityTest, PreemptionByRecompute) {
  auto chain = StageChain::Create(TestDataPath("demo-Q4_K_M.gguf"), {.stages = 2});
  ASSERT_TRUE(chain.ok()) << chain.status();
  const TokenList first_half(tokens_.begin(), tokens_.begin() + 75);
  ASSERT_TRUE((*chain)->Logits({RandomTokens(40, 1), first_half}, 16).ok());
  (*chain)->Close(1);
  ASSERT_TRUE((*chain)->Step({{0, RandomTokens(100, 2)}}).ok());
  const int slot = (*chain)->Open();
  std::vector<float> logits;
  for (size_t done = 0; done < tokens_.size(); done += 50) {
    auto step = (*chain)->Step(
        {{slot, TokenList(tokens_.begin() + done, tokens_.begin() + done + 50)}, {0, {9}}});
    ASSERT_TRUE(step.ok()) << step.status();
    logits.insert(logits.end(), (*step)[0].begin(), (*step)[0].end());
  }
  ExpectSameBits(logits, alone_, "replayed");
}

// Weights that come and go under a budget, with and without prefetch and the host tier.
TEST_F(BitEqualityTest, StreamedWeights) {
  const std::vector<LayerStoreOptions> variants = {
      {.weight_budget_percent = 25},
      {.reader_threads = 2, .weight_budget_percent = 40},
      {.prefetch = false, .weight_budget_percent = 25},
      {.weight_budget_percent = 25,
       .host_cache_bytes = 4 << 20,
       .host_cache_codec = HostCodec::kZstd},
  };
  for (const LayerStoreOptions& store : variants) {
    auto chain = StageChain::Create(TestDataPath("demo-Q4_K_M.gguf"), {.store = store});
    ASSERT_TRUE(chain.ok()) << chain.status();
    auto logits = (*chain)->Logits({tokens_}, 16);
    ASSERT_TRUE(logits.ok()) << logits.status();
    ExpectSameBits((*logits)[0], alone_, "streamed weights");
    const LayerStoreStats stats = (*chain)->store(0).Stats();
    EXPECT_TRUE(stats.streaming);
    EXPECT_GT(stats.evictions, 0);
    EXPECT_LE(stats.peak_resident_bytes, stats.budget_bytes);
    EXPECT_EQ(stats.host_hits > 0, store.host_cache_bytes > 0);
  }
}

TEST_F(BitEqualityTest, PortableAndVectorKernels) {
  ExpectSameBits(MustLogits({.isa = "portable"}, {tokens_}, 64), alone_, "portable");
}

// The other types of KV: other bits, the same promise.
TEST_F(BitEqualityTest, EveryKvType) {
  const std::vector<TokenList> company = {tokens_, RandomTokens(40, 4), RandomTokens(90, 5)};
  for (const KvType type : {KvType::kF32, KvType::kQ8_0}) {
    if (type == KvType::kQ8_0 && TestDevice() != "cpu") continue;  // the CUDA backend refuses it
    const std::vector<float> alone = MustLogits({.kv_type = type}, {tokens_}, 512);
    ExpectSameBits(
        MustLogits({.stages = 4, .threads = 2, .kv_type = type, .block_seed = 1}, company, 7),
        alone, "KV type " + std::to_string(static_cast<int>(type)));
    ExpectSameBits(MustLogits({.isa = "portable", .kv_type = type}, {tokens_}, 64), alone,
                   "portable");
    EXPECT_NE(alone, alone_);
  }
}

// Every tensor type: one stage whole against two stages and threads, in chunks, among others.
class BitEqualityOfTypeTest : public testing::TestWithParam<std::string> {};

TEST_P(BitEqualityOfTypeTest, ChunksStagesThreadsAndCompany) {
  const std::string model = "demo2-" + GetParam() + ".gguf";
  const TokenList tokens = RandomTokens(70, 3);
  const std::vector<float> alone = MustLogits({}, {tokens}, 512, model);
  const std::vector<TokenList> company = {tokens, RandomTokens(40, 4), RandomTokens(90, 5)};
  ExpectSameBits(MustLogits({.stages = 2, .threads = 2}, company, 7, model), alone, model);
}

INSTANTIATE_TEST_SUITE_P(AllTypes, BitEqualityOfTypeTest,
                         testing::Values("F32", "f16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1",
                                         "Q8_0", "Q2_K", "Q3_K_S", "Q4_K_S", "Q5_K_S", "Q6_K"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace stagecoach
