#include "kernels/cpu/read_bandwidth.h"

#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <thread>
#include <vector>

namespace stagecoach {
namespace {

using Clock = std::chrono::steady_clock;

using Vector = uint64_t __attribute__((vector_size(32)));

// Eight independent sums of whole vectors, so that memory and not additions is what is waited for.
#define STAGECOACH_SUM_BODY                                                  \
  Vector sums[8] = {};                                                       \
  for (size_t i = 0; i + 8 <= count; i += 8) {                               \
    for (size_t j = 0; j < 8; ++j) sums[j] += data[i + j];                   \
  }                                                                          \
  uint64_t total = 0;                                                        \
  for (const Vector& sum : sums) total += sum[0] + sum[1] + sum[2] + sum[3]; \
  return total;

uint64_t SumPortable(const Vector* data, size_t count) { STAGECOACH_SUM_BODY }
#if defined(__x86_64__)
__attribute__((target("avx2"))) uint64_t SumAvx2(const Vector* data,
                                                 size_t count){STAGECOACH_SUM_BODY}
#endif
#undef STAGECOACH_SUM_BODY

uint64_t Sum(const Vector* data, size_t count) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) return SumAvx2(data, count);
#endif
  return SumPortable(data, count);
}

}  // namespace

double MeasureReadBandwidth(int threads, uint64_t bytes, int passes) {
  threads = std::max(threads, 1);
  const size_t count = bytes / sizeof(Vector) / static_cast<size_t>(threads);
  const std::vector<Vector> data(count * static_cast<size_t>(threads), Vector{1, 1, 1, 1});
  std::atomic<uint64_t> sink = 0;  // keeps the sums from being optimised away
  std::barrier sync(threads);
  double best_seconds = 1e9;
  const auto work = [&](int thread) {
    for (int pass = 0; pass < passes; ++pass) {
      sync.arrive_and_wait();
      const auto start = Clock::now();
      sink += Sum(data.data() + count * static_cast<size_t>(thread), count);
      sync.arrive_and_wait();
      const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
      if (thread == 0) best_seconds = std::min(best_seconds, seconds);
    }
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work, i);
  work(0);
  for (std::thread& thread : others) thread.join();
  return static_cast<double>(data.size() * sizeof(Vector)) / best_seconds;
}

}  // namespace stagecoach
