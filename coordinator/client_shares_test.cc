#include "coordinator/client_shares.h"

#include "gtest/gtest.h"

namespace stagecoach {
namespace {

// Steps with so many rows of each client.
void RunSteps(ClientShares& shares, int steps, int rows_a, int rows_b) {
  for (int i = 0; i < steps; ++i) {
    if (rows_a > 0) shares.Charge("a", rows_a);
    if (rows_b > 0) shares.Charge("b", rows_b);
    shares.EndStep();
  }
  shares.Update();
}

TEST(ClientSharesTest, NobodyIsOverAloneOrWithEqualShares) {
  ClientShares shares;
  shares.Begin("a", 0);
  RunSteps(shares, 100, 50, 0);
  EXPECT_FALSE(shares.any_over());
  EXPECT_FALSE(shares.Over("a"));
  EXPECT_FALSE(shares.Over("unknown"));
  shares.Begin("b", 0);
  RunSteps(shares, 200, 50, 40);
  EXPECT_FALSE(shares.any_over());
  EXPECT_FALSE(shares.Over("a"));
  EXPECT_FALSE(shares.Over("b"));
}

TEST(ClientSharesTest, WhoRanAloneIsOverAtOnceWhenAnotherComes) {
  ClientShares shares;
  shares.Begin("a", 0);
  RunSteps(shares, 1, 50, 0);
  shares.Begin("b", 0);
  shares.Update();
  EXPECT_TRUE(shares.any_over());
  EXPECT_TRUE(shares.Over("a"));
  EXPECT_FALSE(shares.Over("b"));
  shares.End("a");  // nobody has to stand back, though what it had is remembered
  shares.Update();
  EXPECT_FALSE(shares.any_over());
  EXPECT_TRUE(shares.Over("a"));
  shares.Begin("a", 0);
  RunSteps(shares, 300, 10, 10);  // and no longer once it has kept to its share
  EXPECT_FALSE(shares.Over("a"));
}

TEST(ClientSharesTest, ManyOthersDoNotHideAGreedyClient) {
  ClientShares shares;
  shares.Begin("a", 0);
  for (int i = 0; i < 40; ++i) shares.Begin("other" + std::to_string(i), 0);
  for (int step = 0; step < 100; ++step) {
    shares.Charge("a", 20);
    for (int i = 0; i < 40; ++i) shares.Charge("other" + std::to_string(i), 5);
    shares.EndStep();
  }
  shares.Update();
  EXPECT_TRUE(shares.Over("a"));
  EXPECT_FALSE(shares.Over("other7"));
}

TEST(ClientSharesTest, StaysForAWhileAfterItsLastRequest) {
  ClientShares shares;
  shares.Begin("a", 0);
  shares.Begin("b", 0);
  RunSteps(shares, 1, 10, 64);
  shares.End("b");
  EXPECT_EQ(shares.away(), 1);
  RunSteps(shares, 60, 10, 0);
  EXPECT_TRUE(shares.Over("a"));
  shares.Begin("b", 0);
  EXPECT_EQ(shares.away(), 0);
  shares.End("b");
  RunSteps(shares, 200, 10, 0);
  EXPECT_EQ(shares.away(), 0);
  EXPECT_FALSE(shares.Over("a"));
}

TEST(ClientSharesTest, WhoComesWithManyRequestsIsOverBeforeItHadMuch) {
  ClientShares shares;
  shares.Begin("b", 0);
  RunSteps(shares, 100, 0, 10);
  shares.Begin("a", 0);
  shares.Begin("a", 0);
  shares.Update();
  EXPECT_FALSE(shares.Over("a"));
  shares.Begin("a", 0);
  shares.Update();
  EXPECT_TRUE(shares.Over("a"));
  shares.End("b");  // who has none does not mind
  shares.Update();
  EXPECT_FALSE(shares.Over("a"));
  shares.Begin("b", 0);
  RunSteps(shares, 100, 10, 10);  // now it is known what it takes
  EXPECT_FALSE(shares.Over("a"));
}

TEST(ClientSharesTest, LowerPrioritiesHaveNoClaimOnHigherOnes) {
  ClientShares shares;
  shares.Begin("a", 1);
  shares.Begin("b", 0);
  RunSteps(shares, 100, 50, 1);
  EXPECT_FALSE(shares.Over("a"));
  RunSteps(shares, 300, 1, 50);
  EXPECT_TRUE(shares.Over("b"));
}

}  // namespace
}  // namespace stagecoach
