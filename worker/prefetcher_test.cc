#include "worker/prefetcher.h"

#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace stagecoach {
namespace {

using ::testing::ElementsAre;

// Notes the tickets it is given; the first load waits until it is let go.
class Recorder {
 public:
  Prefetcher::LoadFunction function() {
    return [this](Prefetcher::Ticket ticket) {
      {
        absl::MutexLock lock(&mu_);
        tickets_.push_back(ticket);
      }
      if (ticket == 0) {
        started.Notify();
        let_go.WaitForNotification();
      }
    };
  }
  std::vector<Prefetcher::Ticket> WaitFor(size_t count) {
    absl::MutexLock lock(&mu_);
    const auto enough = [this, count]()
                            ABSL_SHARED_LOCKS_REQUIRED(mu_) { return tickets_.size() >= count; };
    mu_.Await(absl::Condition(&enough));
    return tickets_;
  }
  std::vector<Prefetcher::Ticket> tickets() {
    absl::MutexLock lock(&mu_);
    return tickets_;
  }

  absl::Notification started, let_go;

 private:
  absl::Mutex mu_;
  std::vector<Prefetcher::Ticket> tickets_ ABSL_GUARDED_BY(mu_);
};

TEST(Prefetcher, KeepsOrderBoundsTheQueuePromotesAndCancels) {
  Recorder recorder;
  Prefetcher prefetcher(1, 4, recorder.function());
  ASSERT_TRUE(prefetcher.Push(0));
  recorder.started.WaitForNotification();
  for (Prefetcher::Ticket ticket = 1; ticket <= 4; ++ticket) EXPECT_TRUE(prefetcher.Push(ticket));
  EXPECT_FALSE(prefetcher.Push(5));
  EXPECT_TRUE(prefetcher.Cancel(2));
  EXPECT_FALSE(prefetcher.Cancel(2));
  EXPECT_FALSE(prefetcher.Cancel(0));  // under way
  EXPECT_TRUE(prefetcher.Push(6));
  prefetcher.Promote(4);
  prefetcher.Promote(77);  // unknown: nothing
  recorder.let_go.Notify();
  EXPECT_THAT(recorder.WaitFor(5), ElementsAre(0, 4, 1, 3, 6));
}

TEST(Prefetcher, ShutdownDropsTheQueueAndWaitsForTheLoadUnderWay) {
  Recorder recorder;
  Prefetcher prefetcher(1, 4, recorder.function());
  ASSERT_TRUE(prefetcher.Push(0));
  ASSERT_TRUE(prefetcher.Push(1));
  recorder.started.WaitForNotification();
  std::thread letting_go([&] { recorder.let_go.Notify(); });
  prefetcher.Shutdown();
  letting_go.join();
  EXPECT_FALSE(prefetcher.Push(2));
  EXPECT_EQ(recorder.tickets().front(), 0);
  prefetcher.Shutdown();
}

}  // namespace
}  // namespace stagecoach
