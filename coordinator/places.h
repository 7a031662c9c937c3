// How many sequences may be accepted at once, and how many of one client.
#ifndef STAGECOACH_COORDINATOR_PLACES_H_
#define STAGECOACH_COORDINATOR_PLACES_H_

#include <map>
#include <string>

namespace stagecoach {

// The last eighth of the places is kept for clients that hold less than half of those taken, so
// that one client's requests cannot shut the others out. Not thread-safe.
class Places {
 public:
  explicit Places(int total) : total_(total) {}

  int total() const { return total_; }
  int taken() const { return taken_; }
  int taken_by(const std::string& client) const {
    const auto found = by_client_.find(client);
    return found == by_client_.end() ? 0 : found->second;
  }

  // All `count` places or none (false).
  bool Take(const std::string& client, int count) {
    if (count > total_ - taken_) return false;
    const int own = taken_by(client) + count;
    const bool most = taken_ > 0 && 2 * own > taken_ + count;
    if (most && taken_ + count > total_ - total_ / 8) return false;
    taken_ += count;
    by_client_[client] = own;
    return true;
  }

  void Return(const std::string& client, int count) {
    taken_ -= count;
    const auto found = by_client_.find(client);
    if ((found->second -= count) == 0) by_client_.erase(found);
  }

 private:
  const int total_;
  int taken_ = 0;
  std::map<std::string, int> by_client_;  // those that hold any
};

}  // namespace stagecoach

#endif  // STAGECOACH_COORDINATOR_PLACES_H_
