#include "tools/watchdog.h"

#include <fmt/format.h>

#include <utility>

#include "absl/time/clock.h"

namespace stagecoach {
namespace {

constexpr absl::Duration kLookInterval = absl::Milliseconds(10);

}  // namespace

Watchdog::Watchdog(std::function<void()> look, std::function<void(const std::string& what)> expired)
    : look_(std::move(look)), expired_(std::move(expired)), thread_([this] { Run(); }) {}

Watchdog::~Watchdog() {
  {
    absl::MutexLock lock(&mu_);
    ended_ = true;
  }
  thread_.join();
}

void Watchdog::Begin(const std::string& what, absl::Duration limit) {
  absl::MutexLock lock(&mu_);
  what_ = fmt::format("{} took more than {}", what, absl::FormatDuration(limit));
  deadline_ = absl::Now() + limit;
}

void Watchdog::Run() {
  for (;;) {
    std::string late;
    {
      absl::MutexLock lock(&mu_);
      if (mu_.AwaitWithTimeout(absl::Condition(&ended_), kLookInterval)) return;
      if (absl::Now() > deadline_) {
        late = what_;
        deadline_ = absl::InfiniteFuture();
      }
    }
    look_();
    if (!late.empty()) expired_(late);
  }
}

}  // namespace stagecoach
