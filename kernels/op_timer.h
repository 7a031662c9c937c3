// How often a single operation is repeated while it is timed, and how long it took.
#ifndef STAGECOACH_KERNELS_OP_TIMER_H_
#define STAGECOACH_KERNELS_OP_TIMER_H_

#include <algorithm>
#include <cstddef>
#include <vector>

namespace stagecoach {

// One operation's repeats: a backend adds them until there are enough. Not thread-safe.
class OpTimer {
 public:
  static constexpr size_t kMinRuns = 5;
  static constexpr size_t kMaxRuns = 30;

  // Enough: kMinRuns at least, then until they took `at_least` seconds together or are kMaxRuns.
  explicit OpTimer(double at_least) : at_least_(at_least) {}

  bool Enough() const {
    return seconds_.size() >= kMaxRuns || (seconds_.size() >= kMinRuns && total_ >= at_least_);
  }
  void Add(double seconds) {
    seconds_.push_back(seconds);
    total_ += seconds;
  }

  // 0 if nothing has been added: the operation did not get as far as its kernels.
  double MedianSeconds() const {
    if (seconds_.empty()) return 0;
    std::vector<double> sorted = seconds_;
    const auto middle = sorted.begin() + static_cast<std::ptrdiff_t>(sorted.size() / 2);
    std::nth_element(sorted.begin(), middle, sorted.end());
    return *middle;
  }

 private:
  const double at_least_;
  double total_ = 0;
  std::vector<double> seconds_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_KERNELS_OP_TIMER_H_
