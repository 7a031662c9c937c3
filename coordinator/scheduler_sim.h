// A scheduler under random arrivals, cancellations, failures, deadlines, lost workers and late
// results, with tiny block pools and shared prefixes, against a model of the stages that knows what
// every KV block holds.
#ifndef STAGECOACH_COORDINATOR_SCHEDULER_SIM_H_
#define STAGECOACH_COORDINATOR_SCHEDULER_SIM_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "coordinator/scheduler.h"

namespace stagecoach {

struct SimReport {
  std::string failure;  // the first promise that was broken; empty = none
  int64_t ended_ok = 0;
  int64_t ended_otherwise = 0;
  int64_t steps = 0;
  int64_t tokens = 0;  // generated
  int64_t forks = 0;   // choices opened behind a copied block
  uint64_t cached_tokens = 0;
  uint64_t preemptions = 0;
  int64_t shared_steps = 0;  // in which a greedy client had to stand back
  int64_t rows_ahead = 0;

  void Add(const SimReport& other);
};

using SchedulerFactory = std::function<std::unique_ptr<Scheduler>(const SchedulerOptions&)>;

// What must hold after every event:
// - steps are numbered without gaps, fit their bounds, and open, fill and close slots in order;
// - positions of a sequence go on without gap or repeat, and so do the indices of its tokens;
// - what the stage samples and fills in for a row ahead is the sequence's next token, and no row
//   goes ahead of the end that is known;
// - a sequence's table covers its rows exactly, and every position in it holds the keys and values
//   of this sequence's tokens (and salt), finite ones;
// - a block that is written is in one table only;
// - the pool's references are those of the tables; used + cached + free = all;
// - the pipeline is not empty while requests are live;
// - a waiting sequence is overtaken, and one that could decode passed over, a bounded number of
//   times;
// - a client that had much more than all others has few rows of a step, and next to none beside a
//   prompt of another;
// - every accepted request ends exactly once, and nothing is said of it afterwards.
// The same seed gives the same run. At the end everything is brought to its end.
SimReport RunSchedulerSim(uint64_t seed, const SchedulerFactory& make);

}  // namespace stagecoach

#endif  // STAGECOACH_COORDINATOR_SCHEDULER_SIM_H_
