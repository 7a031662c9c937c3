#include "coordinator/block_pool.h"

#include <numeric>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace stagecoach {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

std::vector<int32_t> Tokens(int count, int first = 0) {
  std::vector<int32_t> tokens(count);
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

std::span<const int32_t, kKvBlockPositions> BlockOf(const std::vector<int32_t>& tokens, int block) {
  return std::span<const int32_t>(tokens)
      .subspan(block * kKvBlockPositions)
      .first<static_cast<size_t>(kKvBlockPositions)>();
}

// Allocates and publishes the blocks of `tokens`, which it returns in use.
std::vector<int> PublishAll(BlockPool& pool, const std::vector<int32_t>& tokens,
                            std::string_view salt = "") {
  std::vector<int> blocks;
  PrefixId before = 0;
  for (size_t i = 0; i < tokens.size() / kKvBlockPositions; ++i) {
    blocks.push_back(pool.Allocate());
    const BlockPool::Published published =
        pool.Publish(blocks.back(), before, salt, BlockOf(tokens, static_cast<int>(i)));
    EXPECT_TRUE(published.known);
    before = published.id;
  }
  return blocks;
}

void ReleaseAll(BlockPool& pool, const std::vector<int>& blocks) {
  for (auto block = blocks.rbegin(); block != blocks.rend(); ++block) pool.Release(*block, false);
}

TEST(BlockPoolTest, CountsReferences) {
  BlockPool pool(3);
  const int a = pool.Allocate();
  const int b = pool.Allocate();
  EXPECT_NE(a, b);
  pool.AddReference(a);
  EXPECT_EQ(pool.references(a), 2);
  EXPECT_EQ(pool.free(), 1);
  pool.Release(a, false);
  EXPECT_EQ(pool.used(), 2);
  pool.Release(a, false);
  pool.Release(b, false);
  EXPECT_EQ(pool.free(), 3);
  EXPECT_EQ(pool.used() + pool.cached(), 0);
}

TEST(BlockPoolTest, FindsTheLongestKnownPrefix) {
  BlockPool pool(8);
  const std::vector<int32_t> tokens = Tokens(4 * 32);
  const std::vector<int> blocks = PublishAll(pool, tokens);
  EXPECT_EQ(pool.Find("", tokens, 9).blocks, blocks);
  EXPECT_EQ(pool.Find("", tokens, 9).unused, 0);
  EXPECT_THAT(pool.Find("", tokens, 2).blocks, ElementsAre(blocks[0], blocks[1]));
  EXPECT_EQ(pool.Find("", std::span(tokens).first(95), 9).blocks.size(), 2u);
  std::vector<int32_t> other = tokens;
  other[70] = 999;
  EXPECT_EQ(pool.Find("", other, 9).blocks.size(), 2u);
  // The same tokens behind others are another run.
  EXPECT_THAT(pool.Find("", std::span(tokens).subspan(32), 9).blocks, IsEmpty());
  ReleaseAll(pool, blocks);
  EXPECT_EQ(pool.cached(), 4);
  EXPECT_EQ(pool.available(), 8);
  const BlockPool::Prefix found = pool.Find("", tokens, 9);
  EXPECT_EQ(found.blocks, blocks);
  EXPECT_EQ(found.unused, 4);
  for (int block : found.blocks) pool.AddReference(block);
  EXPECT_EQ(pool.used(), 4);
  EXPECT_EQ(pool.cached(), 0);
}

TEST(BlockPoolTest, KeepsSaltsApart) {
  BlockPool pool(8);
  const std::vector<int32_t> tokens = Tokens(64);
  const std::vector<int> a = PublishAll(pool, tokens, "a");
  EXPECT_THAT(pool.Find("", tokens, 9).blocks, IsEmpty());
  EXPECT_THAT(pool.Find("b", tokens, 9).blocks, IsEmpty());
  EXPECT_EQ(pool.Find("a", tokens, 9).blocks, a);
  const std::vector<int> b = PublishAll(pool, tokens, "b");
  EXPECT_EQ(pool.Find("b", tokens, 9).blocks, b);
}

TEST(BlockPoolTest, ForgetsWhatWasUsedLongestAgoAndTailsBeforePrefixes) {
  BlockPool pool(4);
  const std::vector<int32_t> first = Tokens(64), second = Tokens(64, 500);
  const std::vector<int> a = PublishAll(pool, first);
  const std::vector<int> b = PublishAll(pool, second);
  ReleaseAll(pool, a);
  ReleaseAll(pool, b);
  EXPECT_EQ(pool.Allocate(), a[1]);
  EXPECT_EQ(pool.Find("", first, 9).blocks.size(), 1u);
  EXPECT_EQ(pool.Allocate(), a[0]);
  EXPECT_THAT(pool.Find("", first, 9).blocks, IsEmpty());
  EXPECT_EQ(pool.Find("", second, 9).blocks, b);
}

TEST(BlockPoolTest, ASecondBlockOfTheSameTokensIsNotPublished) {
  BlockPool pool(4);
  const std::vector<int32_t> tokens = Tokens(32);
  const std::vector<int> first = PublishAll(pool, tokens);
  const PrefixId run = pool.Find("", tokens, 1).runs[0];
  const int second = pool.Allocate();
  const BlockPool::Published published = pool.Publish(second, 0, "", BlockOf(tokens, 0));
  EXPECT_TRUE(published.known);
  EXPECT_EQ(published.id, run);
  pool.Release(second, false);
  EXPECT_EQ(pool.free(), 3);
  EXPECT_EQ(pool.Find("", tokens, 1).blocks, first);
}

// A run whose beginning was forgotten and published anew does not lead to what followed the old
// one.
TEST(BlockPoolTest, NumbersOfRunsAreNotReused) {
  BlockPool pool(2);
  const std::vector<int32_t> tokens = Tokens(64);
  const std::vector<int> blocks = PublishAll(pool, tokens);
  pool.Release(blocks[0], false);  // against the rule: the beginning goes first
  EXPECT_EQ(pool.Allocate(), blocks[0]);
  EXPECT_TRUE(pool.Publish(blocks[0], 0, "", BlockOf(tokens, 0)).known);
  EXPECT_EQ(pool.Find("", tokens, 9).blocks.size(), 1u);
}

TEST(BlockPoolTest, DirtyBlocksAreClearedOnceAndNeverCached) {
  BlockPool pool(2);
  const int a = pool.Allocate();
  pool.AddReference(a);
  pool.Release(a, true);
  EXPECT_THAT(pool.TakeDirty(), IsEmpty());  // somebody has it still
  pool.Release(a, true);
  EXPECT_EQ(pool.free(), 2);
  EXPECT_THAT(pool.TakeDirty(), ElementsAre(a));
  EXPECT_THAT(pool.TakeDirty(), IsEmpty());
}

TEST(BlockPoolTest, ResetForgetsEverything) {
  BlockPool pool(4);
  const std::vector<int32_t> tokens = Tokens(64);
  pool.Release(PublishAll(pool, tokens)[1], false);
  pool.Release(pool.Allocate(), true);
  pool.Reset();
  EXPECT_EQ(pool.free(), 4);
  EXPECT_THAT(pool.TakeDirty(), IsEmpty());
  EXPECT_THAT(pool.Find("", tokens, 9).blocks, IsEmpty());
}

}  // namespace
}  // namespace stagecoach
