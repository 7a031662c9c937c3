#include "coordinator/fair_queue.h"

#include <deque>
#include <map>
#include <vector>

#include "coordinator/places.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace stagecoach {
namespace {

using ::testing::ElementsAre;

class FairQueueTest : public testing::Test {
 protected:
  const FairEntry* Push(const std::string& client, int priority = 0) {
    entries_.push_back({.order = entries_.size() + 1, .priority = priority, .client = client});
    queue_.Push(&entries_.back());
    return &entries_.back();
  }
  // Serves and removes the first; its number by arrival.
  int Take(int cost = 1) {
    const FairEntry* front = queue_.Front();
    queue_.Serve(front, cost);
    queue_.Erase(front);
    return static_cast<int>(front->order);
  }

  std::deque<FairEntry> entries_;
  FairQueue queue_;
};

TEST_F(FairQueueTest, IsFirstComeFirstServedForOneClient) {
  for (int i = 0; i < 20; ++i) Push("a");
  for (int i = 1; i <= 20; ++i) EXPECT_EQ(Take(), i);
  EXPECT_EQ(queue_.Front(), nullptr);
}

TEST_F(FairQueueTest, TakesTurnsByClient) {
  for (int i = 0; i < 6; ++i) Push("greedy");  // 1 .. 6
  EXPECT_EQ(Take(), 1);
  Push("b");  // 7
  Push("c");  // 8
  Push("b");  // 9
  std::vector<int> order;
  for (int i = 0; i < 5; ++i) order.push_back(Take());
  EXPECT_THAT(order, ElementsAre(7, 8, 2, 9, 3));
}

TEST_F(FairQueueTest, SharesWorkNotTurns) {
  const FairEntry* big = Push("big");
  const FairEntry* small = Push("small");
  int64_t work[2] = {};
  for (int i = 0; i < 1000; ++i) {
    const FairEntry* front = queue_.Front();
    const int cost = front == big ? 30 : 10;
    work[front == small] += cost;
    queue_.Serve(front, cost);
  }
  EXPECT_NEAR(static_cast<double>(work[0]) / work[1], 1.0, 0.02);
}

TEST_F(FairQueueTest, CountsWorkOutsideTheTurns) {
  const FairEntry* a = Push("a");
  Push("b");
  queue_.Charge(*a, 100);
  queue_.Charge({.order = 99, .priority = 3, .client = "unknown"}, 100);
  int turns_of_b = 0;
  for (int i = 0; i < 40; ++i) {
    const FairEntry* front = queue_.Front();
    if (front != a) ++turns_of_b;
    queue_.Serve(front, 1);
  }
  EXPECT_GE(turns_of_b, 30);
}

TEST_F(FairQueueTest, ServesHigherPrioritiesFirst) {
  Push("a");
  Push("a", -3);
  Push("b", 2);
  Push("a", 2);
  std::vector<int> order;
  while (!queue_.empty()) order.push_back(Take());
  EXPECT_THAT(order, ElementsAre(3, 4, 1, 2));
}

TEST_F(FairQueueTest, StarvesNobody) {
  const FairEntry* low = Push("a", -8);
  int turns = 0;
  while (queue_.contains(low)) {
    Push("b", 8);
    Take();
    ASSERT_LE(++turns, FairQueue::kAgeTurn);
  }
}

TEST_F(FairQueueTest, ForgetsWhatIsErased) {
  const FairEntry* a = Push("a");
  const FairEntry* b = Push("b", 1);
  queue_.Erase(b);
  queue_.Erase(b);
  EXPECT_EQ(queue_.Front(), a);
  EXPECT_EQ(queue_.size(), 1u);
  queue_.Erase(a);
  EXPECT_TRUE(queue_.empty());
}

TEST(PlacesTest, KeepsAnEighthForOthers) {
  Places places(16);
  EXPECT_FALSE(places.Take("a", 17));
  for (int i = 0; i < 14; ++i) EXPECT_TRUE(places.Take("a", 1)) << i;
  EXPECT_FALSE(places.Take("a", 1));
  EXPECT_TRUE(places.Take("b", 2));
  EXPECT_FALSE(places.Take("b", 1));
  EXPECT_EQ(places.taken(), 16);
  EXPECT_EQ(places.taken_by("a"), 14);
  places.Return("b", 2);
  places.Return("a", 14);
  EXPECT_EQ(places.taken(), 0);
  EXPECT_TRUE(places.Take("a", 16));  // nobody else is there
}

TEST(PlacesTest, FewPlacesAreForAnybody) {
  Places places(3);
  EXPECT_TRUE(places.Take("", 1));
  EXPECT_TRUE(places.Take("", 2));
  EXPECT_FALSE(places.Take("b", 1));
}

}  // namespace
}  // namespace stagecoach
