// Who is served next: by priority, and within one priority in turns by client, so that a client's
// share does not grow with the number of its requests.
//
// Each (priority, client) that has something queued carries a virtual time, the cost it was charged
// so far; of one priority the client with the least goes first, and a client that comes anew starts
// where the others have got to. Every kAgeTurn-th time the oldest entry of all goes first whatever
// its priority: nothing starves, an entry waits for at most kAgeTurn turns for each older one.
#ifndef STAGECOACH_COORDINATOR_FAIR_QUEUE_H_
#define STAGECOACH_COORDINATOR_FAIR_QUEUE_H_

#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <utility>

namespace stagecoach {

// What the queue orders; owned by the caller, at a fixed address and unchanged while it is queued.
struct FairEntry {
  uint64_t order = 0;  // by arrival; no two entries have the same
  int priority = 0;    // higher goes first
  std::string client;
};

// Not thread-safe.
class FairQueue {
 public:
  static constexpr int kAgeTurn = 8;

  bool empty() const { return by_age_.empty(); }
  size_t size() const { return by_age_.size(); }
  bool contains(const FairEntry* entry) const { return by_age_.contains({entry->order, entry}); }

  void Push(const FairEntry* entry);   // not queued yet
  void Erase(const FairEntry* entry);  // no effect if it is not queued
  // The entry whose turn it is; nullptr if there is none. The same until something changes.
  const FairEntry* Front() const;
  // The first entry, whatever the turn, of a client that `may` go; nullptr if there is none.
  const FairEntry* FrontWhere(const std::function<bool(const std::string& client)>& may) const;
  // A queued entry was served, for `cost` > 0 units of work. It stays queued.
  void Serve(const FairEntry* entry, int cost);
  // Work that a client had outside its turns; counts only while it has something queued.
  void Charge(const FairEntry& entry, int cost);

 private:
  struct Flow {
    uint64_t charged = 0;
    std::map<uint64_t, const FairEntry*> entries;  // by order
  };
  struct Level {
    uint64_t now = 0;  // what the client served last had been charged
    std::map<std::string, Flow> flows;
  };

  std::map<int, Level, std::greater<>> levels_;  // none is empty
  std::set<std::pair<uint64_t, const FairEntry*>> by_age_;
  int turn_ = 0;
};

}  // namespace stagecoach

#endif  // STAGECOACH_COORDINATOR_FAIR_QUEUE_H_
