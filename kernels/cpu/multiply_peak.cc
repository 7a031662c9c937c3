#include "kernels/cpu/multiply_peak.h"

#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace stagecoach {

#if defined(__x86_64__)
namespace {

constexpr int kRounds = 1 << 20;
constexpr int kSums = 8;  // independent, so that the latency of none is waited for
constexpr int kPasses = 5;

using Loop = int (*)();

// Stops the compiler from knowing what is in the register.
template <typename Register>
__attribute__((target("avx2"), always_inline)) inline void Forget(Register& value) {
  asm volatile("" : "+x"(value));
}

__attribute__((target("avx2"))) int MultiplyBytes() {
  __m256i sums[kSums] = {};
  __m256i a = _mm256_set1_epi8(3);
  const __m256i b = _mm256_set1_epi8(-5);
  for (int round = 0; round < kRounds; ++round) {
#pragma GCC unroll 8
    for (int i = 0; i < kSums; ++i) {
      Forget(a);
      sums[i] = _mm256_add_epi16(sums[i], _mm256_maddubs_epi16(a, b));
    }
  }
  for (int i = 1; i < kSums; ++i) sums[0] = _mm256_add_epi32(sums[0], sums[i]);
  return _mm256_extract_epi32(sums[0], 0);
}
constexpr double kByteOps = 2.0 * 32 * kSums * kRounds;

__attribute__((target("avx2"))) int MultiplyFloats() {
  __m256 sums[kSums] = {};
  __m256 a = _mm256_set1_ps(0.5f);
  const __m256 b = _mm256_set1_ps(0.25f);
  for (int round = 0; round < kRounds; ++round) {
#pragma GCC unroll 8
    for (int i = 0; i < kSums; ++i) {
      Forget(a);
      sums[i] = _mm256_add_ps(sums[i], _mm256_mul_ps(a, b));
    }
  }
  for (int i = 1; i < kSums; ++i) sums[0] = _mm256_add_ps(sums[0], sums[i]);
  return static_cast<int>(_mm256_cvtss_f32(sums[0]));
}
constexpr double kFloatOps = 2.0 * 8 * kSums * kRounds;

// The best of some passes of all threads at once.
double Seconds(int threads, Loop loop) {
  using Clock = std::chrono::steady_clock;
  std::atomic<int> sink = 0;  // keeps the sums from being optimised away
  std::barrier sync(threads);
  double best = 1e9;
  const auto work = [&](int thread) {
    for (int pass = 0; pass < kPasses; ++pass) {
      sync.arrive_and_wait();
      const auto start = Clock::now();
      sink += loop();
      sync.arrive_and_wait();
      const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
      if (thread == 0) best = std::min(best, seconds);
    }
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work, i);
  work(0);
  for (std::thread& thread : others) thread.join();
  return best;
}

}  // namespace
#endif

MultiplyPeaks MeasureMultiplyPeaks([[maybe_unused]] int threads) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) {
    return {.int8 = threads * kByteOps / Seconds(threads, MultiplyBytes),
            .float32 = threads * kFloatOps / Seconds(threads, MultiplyFloats)};
  }
#endif
  return {};
}

}  // namespace stagecoach
