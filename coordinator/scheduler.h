// Continuous batching: which rows go into the next step of the pipeline. A pure state machine: no
// clock, thread or socket; time is passed in.
//
// Every sequence is a list of tokens of which a prefix has been sent through the pipeline. A prompt
// is sent in chunks, several of which may be in flight behind each other because frames keep their
// order; a decode row is the same thing with one token left to send. Decoding sequences are spread
// over as many steps as there are stages, so that all stages have work - unless weights are
// streamed, where each step costs a pass over them all: then the fewest steps win.
#ifndef STAGECOACH_COORDINATOR_SCHEDULER_H_
#define STAGECOACH_COORDINATOR_SCHEDULER_H_

#include <cstdint>
#include <deque>
#include <optional>
#include <set>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace stagecoach {

using RequestId = uint64_t;

enum class Finish { kStop, kLength };

// Rows of one step that may return log-probabilities or logits: bounds the payload of a result.
inline constexpr int kMaxScoredRows = 32;
// A prompt is cut into chunks no smaller than this to fill the stages.
inline constexpr int kMinChunkRows = 32;

struct SchedulerOptions {
  int stages = 1;
  int max_slots = 8;
  int max_context = 0;        // positions per slot
  int max_step_tokens = 256;  // rows per step
  int max_waiting = 256;      // requests queued beyond the slots
  int max_in_flight = 0;      // steps; 0 = stages + 1, so that stage 0 always finds the next one
};

struct SchedulerRequest {
  RequestId id = 0;             // not used by another live request
  std::vector<int32_t> prompt;  // >= 1 token
  int max_tokens = 0;           // >= 1 unless score
  std::vector<int32_t> stop_token_ids;
  absl::Duration deadline = absl::InfiniteDuration();  // on the clock passed to Tick
  bool score = false;
  bool logits = false;  // with score
};

// Rows of one sequence, consecutive in Step::token_ids.
struct StepRows {
  RequestId id = 0;
  int slot = 0;
  int start_position = 0;
  int row_count = 0;
  bool open = false;    // this step opens the sequence in its slot
  bool sample = false;  // sample the token after the last row
  bool score = false;   // return log p(targets[i] | ... row i)
  bool logits = false;
  std::vector<int32_t> targets;  // score: the token after each row; one fewer at the prompt's end
};

struct Step {
  uint64_t number = 0;     // from 1, without gaps
  std::vector<int> close;  // slots closed before anything is opened
  std::vector<StepRows> rows;
  std::vector<int32_t> token_ids;
  int decode_rows = 0;  // of them, rows that continue a sampled token
};

// What came back for one StepRows.
struct RowsResult {
  absl::Status status;   // not ok: this sequence failed
  int32_t token_id = 0;  // if a sample was asked for
};

struct SchedulerEvent {
  enum class Kind { kToken, kScores, kEnd };
  Kind kind = Kind::kEnd;
  RequestId id = 0;
  int rows = 0;                   // kToken, kScores: index into the step's rows
  uint32_t index = 0;             // kToken: from 0; kScores: first position
  absl::Status status;            // kEnd
  Finish finish = Finish::kStop;  // kEnd with an Ok status
};

// The slots of the pipeline. A slot that was opened must be closed by a later step before it is
// opened again; frames keep their order, so the step that reuses it may be the one that closes it.
class SlotPool {
 public:
  explicit SlotPool(int slots);
  bool empty() const { return free_.empty(); }
  int Acquire();                        // not empty
  void Release(int slot, bool opened);  // opened: the stages know the slot
  std::vector<int> TakeClosing();       // for the next step

 private:
  std::deque<int> free_;
  std::vector<int> closing_;
};

// Not thread-safe. Every request that Add accepted ends with exactly one kEnd event.
class Scheduler {
 public:
  explicit Scheduler(SchedulerOptions options);

  // Errors: RESOURCE_EXHAUSTED if the queue is full; ALREADY_EXISTS; INVALID_ARGUMENT for an empty
  // prompt, one that exceeds the context, or max_tokens < 1.
  absl::Status Add(SchedulerRequest request);
  void Cancel(RequestId id);            // ends with CANCELLED; unknown ids are ignored
  void FinishEarly(RequestId id);       // ends as if a stop token had come
  void Tick(absl::Duration now);        // ends what has passed its deadline with DEADLINE_EXCEEDED
  absl::Duration NextDeadline() const;  // infinite if there is none

  // While a stage streams its weights, a step is as large as it can be: all decoding sequences in
  // one, prompts in chunks of max_step_tokens, and rows that do not fill a step wait for the
  // decoding one in flight, to go with its next. At first false.
  void SetStreaming(bool streaming) { streaming_ = streaming; }

  // The next step to send, or nothing if nothing is ready or enough steps are in flight. Call until
  // nothing comes, after every input.
  std::optional<Step> Next();

  // The results of a step's rows, in their order. Steps come back in the order they were sent.
  // Errors (nothing changed): NOT_FOUND for a step that is not in flight, OUT_OF_RANGE for one
  // that overtook another, INVALID_ARGUMENT for a wrong count of results.
  absl::Status OnResult(uint64_t step, std::span<const RowsResult> results);
  // The rows of a step in flight; nullptr if it is not. Valid until the next call.
  const Step* FindInFlight(uint64_t step) const;

  // The stages have forgotten everything: all requests end with `reason`, steps restart at 1.
  void Reset(const absl::Status& reason);

  std::vector<SchedulerEvent> TakeEvents();  // since the last call, in order

  int running() const { return static_cast<int>(sequences_.size() - waiting_.size()); }
  int waiting() const { return static_cast<int>(waiting_.size()); }
  int in_flight() const { return static_cast<int>(in_flight_.size()); }
  const SchedulerOptions& options() const { return options_; }

 private:
  struct Sequence {
    SchedulerRequest request;     // prompt moved into tokens
    std::vector<int32_t> tokens;  // prompt, then what was sampled
    int prompt_tokens = 0;
    int slot = -1;  // -1 while waiting
    int sent = 0;   // leading tokens given to the pipeline
    int pending() const { return static_cast<int>(tokens.size()) - sent; }
  };

  void Admit();
  void AddDecodeRows(Step& step);
  void AddPromptRows(Step& step);
  void AddRows(Sequence& sequence, int count, Step& step);
  bool WorthAPass() const;
  int DecodeRowLimit() const;
  int PromptRowLimit() const;
  int64_t PendingPromptRows() const;
  void OnRows(const StepRows& rows, int index, const RowsResult& result);
  void OnToken(Sequence& sequence, int index, int32_t token);
  void End(RequestId id, const absl::Status& status, Finish finish = Finish::kStop);

  const SchedulerOptions options_;
  bool streaming_ = false;
  uint64_t steps_ = 0;
  SlotPool slots_;
  std::unordered_map<RequestId, Sequence> sequences_;
  std::deque<RequestId> waiting_;  // no slot yet, in order of arrival
  std::deque<RequestId> prompts_;  // prompt rows to send, in admission order
  std::deque<RequestId> ready_;    // a sampled token to send
  std::set<std::pair<absl::Duration, RequestId>> deadlines_;  // finite ones
  std::deque<Step> in_flight_;
  int decode_steps_in_flight_ = 0;
  int decoding_ = 0;  // generating sequences whose prompt has been sent
  std::vector<SchedulerEvent> events_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_COORDINATOR_SCHEDULER_H_
