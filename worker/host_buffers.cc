#include "worker/host_buffers.h"

#include <string>
#include <utility>

#include "spdlog/spdlog.h"

namespace stagecoach {

std::shared_ptr<HostMemory> HostAllocator::New(size_t bytes) {
  absl::StatusOr<std::shared_ptr<HostMemory>> memory = backend_->NewHostMemory(bytes);
  if (memory.ok()) return *std::move(memory);
  {
    absl::MutexLock lock(&mu_);
    if (!std::exchange(fell_back_, true)) {
      spdlog::warn("weights go through ordinary memory from now on, which is slower: {}",
                   std::string(memory.status().message()));
    }
  }
  return NewPageMemory(bytes);
}

std::shared_ptr<HostMemory> HostBufferPool::Take(size_t least_bytes, size_t bytes) {
  std::vector<std::shared_ptr<HostMemory>> unused;  // freed after the mutex
  absl::MutexLock lock(&mu_);
  size_t best = free_.size();
  for (size_t i = 0; i < free_.size(); ++i) {
    if (free_[i]->size() < least_bytes || free_[i]->size() > bytes + kReadRounding) continue;
    if (best == free_.size() || free_[i]->size() > free_[best]->size()) best = i;
  }
  if (best == free_.size()) {
    if (!keep_) unused.swap(free_);
    return nullptr;
  }
  std::swap(free_[best], free_.back());
  std::shared_ptr<HostMemory> buffer = std::move(free_.back());
  free_.pop_back();
  return buffer;
}

void HostBufferPool::Give(std::shared_ptr<HostMemory> buffer) {
  if (buffer == nullptr) return;
  absl::MutexLock lock(&mu_);
  free_.push_back(std::move(buffer));
}

void HostBufferPool::FreeIdle() {
  std::vector<std::shared_ptr<HostMemory>> unused;  // freed after the mutex
  absl::MutexLock lock(&mu_);
  if (!keep_) unused.swap(free_);
}

}  // namespace stagecoach
