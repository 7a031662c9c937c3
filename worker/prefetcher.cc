#include "worker/prefetcher.h"

#include <algorithm>
#include <system_error>
#include <utility>

namespace stagecoach {

Prefetcher::Prefetcher(int threads, int max_queued, LoadFunction load)
    : max_queued_(max_queued), load_(std::move(load)) {
  absl::MutexLock join_lock(&join_mu_);
  try {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { Work(); });
  } catch (const std::system_error&) {
    // As many threads as the system gave.
  }
  absl::MutexLock lock(&mu_);
  if (threads_.empty()) stopping_ = true;
}

Prefetcher::~Prefetcher() { Shutdown(); }

bool Prefetcher::Push(Ticket ticket) {
  absl::MutexLock lock(&mu_);
  if (stopping_ || queue_.size() >= max_queued_) return false;
  queue_.push_back(ticket);
  return true;
}

void Prefetcher::Promote(Ticket ticket) {
  absl::MutexLock lock(&mu_);
  const auto it = std::find(queue_.begin(), queue_.end(), ticket);
  if (it != queue_.end()) std::rotate(queue_.begin(), it, it + 1);
}

bool Prefetcher::Cancel(Ticket ticket) {
  absl::MutexLock lock(&mu_);
  return std::erase(queue_, ticket) > 0;
}

void Prefetcher::Shutdown() {
  {
    absl::MutexLock lock(&mu_);
    stopping_ = true;
    queue_.clear();
  }
  absl::MutexLock join_lock(&join_mu_);
  for (std::thread& thread : threads_) {
    if (thread.joinable()) thread.join();
  }
}

void Prefetcher::Work() {
  const auto has_work = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) {
    return stopping_ || !queue_.empty();
  };
  absl::MutexLock lock(&mu_);
  while (true) {
    mu_.Await(absl::Condition(&has_work));
    if (stopping_) return;
    const Ticket ticket = queue_.front();
    queue_.pop_front();
    mu_.Unlock();
    load_(ticket);
    mu_.Lock();
  }
}

}  // namespace stagecoach
