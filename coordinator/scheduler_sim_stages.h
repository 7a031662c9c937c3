// What the simulator believes of the stages: open slots, their block tables, and what each position
// of each KV block holds.
#ifndef STAGECOACH_COORDINATOR_SCHEDULER_SIM_STAGES_H_
#define STAGECOACH_COORDINATOR_SCHEDULER_SIM_STAGES_H_

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "coordinator/scheduler.h"

namespace stagecoach {

// Runs steps as a chain of stages would, and checks them. Not thread-safe.
class SimStages {
 public:
  struct Slot {
    SequenceId sequence = 0;
    int attempt = 0;
    RequestId id = 0;
    int choice = 0;
    std::string salt;
    std::vector<int32_t> tokens;  // whose keys and values the table holds
    std::vector<int> table;
    bool failing = false;            // its rows come out non-finite
    std::optional<int32_t> sampled;  // by its latest rows
  };

  SimStages(int slots, int blocks);

  // salt: of a request. fails: whether the rows of a sequence, and all that follow them, come out
  // non-finite. Returns the first thing that is wrong with the step; empty if nothing is.
  std::string Run(const Step& step, const std::function<std::string(RequestId)>& salt,
                  const std::function<bool()>& fails);

  // What the rows just run in an open slot sampled: a row ahead may follow.
  void SetSampled(int slot, int32_t token) { slots_.at(slot)->sampled = token; }

  const std::vector<std::optional<Slot>>& slots() const { return slots_; }
  int64_t copies() const { return copies_; }

 private:
  // What a position holds: a hash of all tokens up to it and the salt.
  using Value = uint64_t;
  static constexpr Value kZero = 0;
  static constexpr Value kNotFinite = 1;

  static Value First(std::string_view salt);
  static Value Next(Value before, int32_t token);
  std::string CloseAndCopy(const Step& step);
  std::string Open(const StepRows& rows, const std::string& salt);
  std::string Extend(const StepRows& rows, Slot& slot);
  std::string Write(const StepRows& rows, const int32_t* tokens, Slot& slot);
  std::string CheckHeld(const Slot& slot) const;

  std::vector<std::optional<Slot>> slots_;
  std::vector<int> users_;  // of each block: tables it is in
  std::vector<std::array<Value, kKvBlockPositions>> held_;
  int64_t copies_ = 0;
};

}  // namespace stagecoach

#endif  // STAGECOACH_COORDINATOR_SCHEDULER_SIM_STAGES_H_
