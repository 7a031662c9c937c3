#include "kernels/cpu/thread_pool.h"

#include <atomic>
#include <thread>
#include <vector>

#include "gtest/gtest.h"

namespace stagecoach::cpu {
namespace {

TEST(ThreadPool, CoversEveryIndexOnce) {
  for (const int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.threads(), threads);
    for (const int count : {0, 1, 4, 5, 100, 1001}) {
      std::vector<std::atomic<int>> visits(count);
      pool.ParallelFor(count, 4, [&](int begin, int end) {
        EXPECT_EQ(begin % 4, 0);
        EXPECT_LT(begin, end);
        for (int i = begin; i < end; ++i) ++visits[i];
      });
      for (const auto& visit : visits) EXPECT_EQ(visit, 1) << threads << " threads, " << count;
    }
  }
}

TEST(ThreadPool, ManyShortLoops) {
  ThreadPool pool(4);  // more than this machine may have
  std::atomic<int64_t> sum = 0;
  for (int i = 0; i < 2000; ++i) {
    pool.ParallelFor(16, 1, [&](int begin, int end) { sum += end - begin; });
  }
  EXPECT_EQ(sum, 2000 * 16);
}

TEST(ThreadPool, TwoCallersAtOnce) {
  ThreadPool pool(3);
  std::atomic<int> sum = 0;
  const auto work = [&] {
    for (int i = 0; i < 500; ++i) {
      pool.ParallelFor(10, 1, [&](int begin, int end) { sum += end - begin; });
    }
  };
  std::thread other(work);
  work();
  other.join();
  EXPECT_EQ(sum, 2 * 500 * 10);
}

}  // namespace
}  // namespace stagecoach::cpu
