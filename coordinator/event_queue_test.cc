#include "coordinator/event_queue.h"

#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace stagecoach {
namespace {

// Events that begin with the same letter can be joined.
bool JoinAlike(std::string& waiting, const std::string& next) {
  if (waiting[0] != next[0]) return false;
  waiting += next;
  return true;
}

void Push(EventQueue<std::string>& queue, const std::vector<std::string>& events) {
  for (const std::string& event : events) queue.Push(event, JoinAlike);
}

std::vector<std::string> WriteAll(EventQueue<std::string>& queue) {
  std::vector<std::string> written;
  while (!queue.empty()) {
    written.push_back(*queue.BeginWrite());
    queue.EndWrite();
  }
  return written;
}

using Events = std::vector<std::string>;

TEST(EventQueue, JoinsToTheLastOneOnlySoThatTheOrderStays) {
  EventQueue<std::string> queue;
  Push(queue, {"a1", "a2", "b1", "a3", "b2", "b3"});
  EXPECT_EQ(WriteAll(queue), (Events{"a1a2", "b1", "a3", "b2b3"}));
}

TEST(EventQueue, LeavesWhatIsBeingWrittenAlone) {
  EventQueue<std::string> queue;
  Push(queue, {"a1"});
  const std::string* const written = queue.BeginWrite();
  Push(queue, {"a2", "a3"});
  EXPECT_TRUE(queue.writing());
  EXPECT_EQ(*written, "a1");
  queue.EndWrite();
  EXPECT_FALSE(queue.writing());
  EXPECT_EQ(WriteAll(queue), (Events{"a2a3"}));
}

TEST(EventQueue, CountsEachEventThatWasJoined) {
  EventQueue<std::string> queue;
  Push(queue, {"a1", "a2", "a3"});
  EXPECT_EQ(queue.unread(), 3u);
  queue.BeginWrite();
  Push(queue, {"a4", "b1"});
  EXPECT_EQ(queue.unread(), 5u);
  queue.EndWrite();
  EXPECT_EQ(queue.unread(), 2u);
  WriteAll(queue);
  EXPECT_EQ(queue.unread(), 0u);
}

TEST(EventQueue, DropsAllButWhatIsBeingWritten) {
  EventQueue<std::string> queue;
  Push(queue, {"a1", "a2"});
  const std::string* const written = queue.BeginWrite();
  Push(queue, {"b1", "c1"});
  queue.DropWaiting();
  EXPECT_EQ(*written, "a1a2");
  EXPECT_EQ(queue.unread(), 2u);
  queue.EndWrite();
  EXPECT_TRUE(queue.empty());
  EXPECT_EQ(queue.unread(), 0u);
  Push(queue, {"a1"});
  queue.DropWaiting();
  EXPECT_TRUE(queue.empty());
}

}  // namespace
}  // namespace stagecoach
