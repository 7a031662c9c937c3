#include "coordinator/event_loop.h"

#include <algorithm>
#include <chrono>
#include <utility>

namespace stagecoach {

EventLoop::EventLoop(absl::Duration interval, std::function<void()> on_tick)
    : interval_(interval), on_tick_(std::move(on_tick)) {}

EventLoop::~EventLoop() { Stop(); }

void EventLoop::Start() {
  absl::MutexLock lock(&join_mu_);
  thread_ = std::thread([this] { Run(); });
}

bool EventLoop::Post(std::function<void()> event) {
  absl::MutexLock lock(&mu_);
  if (stopping_) return false;
  events_.push_back(std::move(event));
  return true;
}

void EventLoop::Stop() {
  {
    absl::MutexLock lock(&mu_);
    stopping_ = true;
  }
  absl::MutexLock lock(&join_mu_);
  if (thread_.joinable()) thread_.join();
}

void EventLoop::Run() {
  using Clock = std::chrono::steady_clock;
  Clock::time_point last_tick = Clock::now();
  while (true) {
    std::deque<std::function<void()>> events;
    bool stopping = false;
    {
      absl::MutexLock lock(&mu_);
      const absl::Duration left = interval_ - absl::FromChrono(Clock::now() - last_tick);
      mu_.AwaitWithTimeout(absl::Condition(this, &EventLoop::Wakes),
                           std::max(left, absl::ZeroDuration()));
      events.swap(events_);
      stopping = stopping_;
    }
    for (const auto& event : events) event();
    if (stopping && events.empty()) return;
    if (on_tick_ != nullptr && absl::FromChrono(Clock::now() - last_tick) >= interval_) {
      on_tick_();
      last_tick = Clock::now();
    }
  }
}

}  // namespace stagecoach
