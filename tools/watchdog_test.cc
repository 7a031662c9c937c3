#include "tools/watchdog.h"

#include <atomic>
#include <string>

#include "absl/synchronization/notification.h"
#include "gtest/gtest.h"

namespace stagecoach {
namespace {

TEST(Watchdog, SaysOnceWhatTookTooLong) {
  absl::Notification expired;
  std::atomic<int> calls = 0;
  std::string what;
  Watchdog watchdog([] {},
                    [&](const std::string& late) {
                      what = late;
                      if (++calls == 1) expired.Notify();
                    });
  watchdog.Begin("waiting for nothing", absl::Milliseconds(30));
  ASSERT_TRUE(expired.WaitForNotificationWithTimeout(absl::Seconds(20)));
  EXPECT_EQ(what, "waiting for nothing took more than 30ms");
  watchdog.Begin("the next step", absl::Hours(1));
  absl::SleepFor(absl::Milliseconds(60));
  EXPECT_EQ(calls, 1);
}

TEST(Watchdog, LooksUntilItIsDestroyedAndLetsPassWhatEndsInTime) {
  std::atomic<int> looks = 0, calls = 0;
  {
    Watchdog watchdog([&] { ++looks; }, [&](const std::string&) { ++calls; });
    for (int i = 0; i < 3; ++i) watchdog.Begin("a short step", absl::Hours(1));
    while (looks < 3) absl::SleepFor(absl::Milliseconds(1));
  }
  const int before = looks;
  absl::SleepFor(absl::Milliseconds(50));
  EXPECT_EQ(looks, before);
  EXPECT_EQ(calls, 0);
}

}  // namespace
}  // namespace stagecoach
