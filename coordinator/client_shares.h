// What each client has had of the pipeline lately, in rows, and who has had more than its share.
//
// A client is present from its first request until it has nothing live and what it had has been
// forgotten: one that sends its requests one after the other stays. What is remembered fades from
// step to step, so that a share is about the last kMemory steps or so. Of one that came within them
// little can be remembered: the number of its requests counts too.
#ifndef STAGECOACH_COORDINATOR_CLIENT_SHARES_H_
#define STAGECOACH_COORDINATOR_CLIENT_SHARES_H_

#include <string>
#include <unordered_map>

namespace stagecoach {

// Not thread-safe.
class ClientShares {
 public:
  static constexpr double kMemory = 32;    // steps
  static constexpr int kAwaited = 3;       // steps
  static constexpr double kMaxExcess = 2;  // times what the others had on average

  void Begin(const std::string& client, int priority);  // a request of it is live
  void End(const std::string& client);                  // no longer
  void Charge(const std::string& client, int rows);     // it is present
  void EndStep();                                       // everything fades a little
  // Looks who is over its share. Until the next call Over tells what it found.
  void Update();

  bool any_over() const { return any_over_; }  // likewise; only clients that have something live
  int away() const { return away_; }           // clients that have nothing live
  // Whether one within its share has just ended its last request: it may be back any moment.
  bool awaited() const { return awaited_; }
  // Whether the client has had more than kMaxExcess times what the other clients that are present,
  // with requests of at least the same priority, had on average, or has come lately with so many
  // times more requests than they have now. False if there are no others.
  bool Over(const std::string& client) const;

 private:
  struct Client {
    int live = 0;      // requests
    int priority = 0;  // of the latest one
    double rows = 0;
    int steps_away = 0;
    int steps = 0;  // since it came
    bool over = false;
  };

  std::unordered_map<std::string, Client> clients_;  // those present
  int away_ = 0;
  bool any_over_ = false;
  bool awaited_ = false;
};

}  // namespace stagecoach

#endif  // STAGECOACH_COORDINATOR_CLIENT_SHARES_H_
