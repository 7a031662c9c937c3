#include "coordinator/client_shares.h"

#include <algorithm>
#include <cassert>
#include <functional>
#include <map>

namespace stagecoach {

void ClientShares::Begin(const std::string& client, int priority) {
  const auto [found, added] = clients_.try_emplace(client);
  if (!added && found->second.live == 0) --away_;
  ++found->second.live;
  found->second.priority = priority;
}

void ClientShares::End(const std::string& client) {
  const auto found = clients_.find(client);
  assert(found != clients_.end() && found->second.live > 0);
  if (--found->second.live > 0) return;
  ++away_;
  found->second.steps_away = 0;
}

void ClientShares::Charge(const std::string& client, int rows) { clients_.at(client).rows += rows; }

void ClientShares::EndStep() {
  for (auto it = clients_.begin(); it != clients_.end();) {
    Client& client = it->second;
    ++client.steps_away;
    ++client.steps;
    client.rows *= 1 - 1 / kMemory;
    const bool forgotten = client.live == 0 && client.rows < 1;
    if (forgotten) --away_;
    it = forgotten ? clients_.erase(it) : std::next(it);
  }
}

void ClientShares::Update() {
  struct Level {
    int clients = 0;
    double rows = 0;
    int live = 0;
  };
  std::map<int, Level, std::greater<>> levels;  // of this priority or higher
  for (const auto& [name, client] : clients_) {
    Level& level = levels[client.priority];
    ++level.clients;
    level.rows += client.rows;
    level.live += client.live;
  }
  Level sum;
  for (auto& [priority, level] : levels) {
    sum.clients += level.clients;
    sum.rows += level.rows;
    sum.live += level.live;
    level = sum;
  }
  any_over_ = awaited_ = false;
  for (auto& [name, client] : clients_) {
    const Level& level = levels.at(client.priority);
    const double others = level.clients - 1;
    client.over = client.rows * others > kMaxExcess * (level.rows - client.rows);
    const int others_live = level.live - client.live;
    if (client.steps < kMemory && others_live > 0) {
      client.over |= client.live > kMaxExcess * std::max(1.0, others_live / others);
    }
    any_over_ |= client.over && client.live > 0;
    awaited_ |= client.live == 0 && !client.over && client.steps_away < kAwaited;
  }
}

bool ClientShares::Over(const std::string& client) const {
  const auto found = clients_.find(client);
  return found != clients_.end() && found->second.over;
}

}  // namespace stagecoach
