#include "coordinator/fair_queue.h"

#include <algorithm>
#include <cassert>

namespace stagecoach {

void FairQueue::Push(const FairEntry* entry) {
  Level& level = levels_[entry->priority];
  const auto [flow, added] = level.flows.try_emplace(entry->client);
  if (added) flow->second.charged = level.now;
  flow->second.entries.emplace(entry->order, entry);
  by_age_.emplace(entry->order, entry);
}

void FairQueue::Erase(const FairEntry* entry) {
  if (by_age_.erase({entry->order, entry}) == 0) return;
  const auto level = levels_.find(entry->priority);
  const auto flow = level->second.flows.find(entry->client);
  flow->second.entries.erase(entry->order);
  if (!flow->second.entries.empty()) return;
  level->second.flows.erase(flow);
  if (level->second.flows.empty()) levels_.erase(level);
}

const FairEntry* FairQueue::Front() const {
  if (empty()) return nullptr;
  if (turn_ == kAgeTurn - 1) return by_age_.begin()->second;
  return FrontWhere([](const std::string&) { return true; });
}

const FairEntry* FairQueue::FrontWhere(
    const std::function<bool(const std::string& client)>& may) const {
  const auto rank = [](const Flow& flow) {
    return std::pair(flow.charged, flow.entries.begin()->first);
  };
  for (const auto& [priority, level] : levels_) {
    const Flow* best = nullptr;
    for (const auto& [client, flow] : level.flows) {
      if ((best == nullptr || rank(flow) < rank(*best)) && may(client)) best = &flow;
    }
    if (best != nullptr) return best->entries.begin()->second;
  }
  return nullptr;
}

void FairQueue::Serve(const FairEntry* entry, int cost) {
  assert(contains(entry) && cost > 0);
  Level& level = levels_.at(entry->priority);
  Flow& flow = level.flows.at(entry->client);
  level.now = std::max(level.now, flow.charged);
  flow.charged += cost;
  turn_ = (turn_ + 1) % kAgeTurn;
}

void FairQueue::Charge(const FairEntry& entry, int cost) {
  const auto level = levels_.find(entry.priority);
  if (level == levels_.end()) return;
  const auto flow = level->second.flows.find(entry.client);
  if (flow != level->second.flows.end()) flow->second.charged += cost;
}

}  // namespace stagecoach
