// Continuous batching over paged KV: which rows go into the next step of the pipeline, and which KV
// blocks they use. A pure state machine: no clock, thread or socket; time is passed in.
//
// A request asks for n >= 1 continuations (choices) of a prompt; each is a sequence. A sequence is
// a list of tokens of which a prefix has been sent through the pipeline. A prompt is sent in
// chunks, several of which may be in flight behind each other because frames keep their order; a
// decode row is the same thing with one token left to send. Decoding sequences are spread over as
// many steps as there are stages, so that all stages have work - unless weights are streamed, where
// each step costs a pass over them all: then the fewest steps win.
//
// Rows ahead. One stage would have nothing to do while the tokens of a step are on their way and
// the next step on its own. So there the next decode step goes out before they have come back: the
// stage, which samples them, fills them in. It holds all decoding sequences but those that are
// known to end with the token in flight, so that all stay together in one step; if there is no
// room for all, none goes ahead. What comes back for a sequence that has ended meanwhile is
// ignored.
//
// Blocks. A sequence is admitted when there are blocks for all its tokens, less those that the
// prefix cache holds, and one to spare; later blocks are taken as it grows. When none is left, the
// sequence of the lowest priority, the newest of them, is preempted: its blocks are given away, it
// waits again, and its tokens are replayed as a prompt, which gives the same continuation bit for
// bit (ARCHITECTURE.md, numerics contract), so nobody can tell from its stream. Every preemption
// raises its priority against the next one. A sequence that ends or is preempted gives its blocks
// up at once, with steps that use them in flight: that is safe because frames keep their order, so
// that in every stage whatever uses a block next runs after those steps. Blocks that unanswered
// rows may have left non-finite are zeroed by the step that comes next, before its rows run. A
// block is published to the prefix cache once it is full and its rows came back finite. The other
// choices of a request begin when its prompt has come back: they share its full blocks, and the one
// partly filled is copied for each, so that a block that is written has one user. A sequence most
// of whose prompt is being computed by another one waits for that, once, and then finds it cached.
//
// Fairness. Waiting sequences are admitted, and the prompt rows of a step shared out, by FairQueue:
// by priority, then by client in turns. A client that has nothing running and finds no room takes
// it from one that runs several. A client that has had more than its share lately (ClientShares)
// gets kCrowdedRows rows of a step, kRationedRows while a prompt of another waits, and none beyond
// one step for each stage, so that whoever comes waits for little. Beside it the prompts of clients
// within their share are not mixed: the first is the first to get its token, and who gets it soon
// after another begins to decode kApartSteps later, so that they do not meet again when they come
// back; slots are kept for those that may be back any moment.
#ifndef STAGECOACH_COORDINATOR_SCHEDULER_H_
#define STAGECOACH_COORDINATOR_SCHEDULER_H_

#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "coordinator/block_pool.h"
#include "coordinator/client_shares.h"
#include "coordinator/fair_queue.h"

namespace stagecoach {

using RequestId = uint64_t;
using SequenceId = uint64_t;  // never used twice by one scheduler

enum class Finish { kStop, kLength };

// Rows of one step that may return log-probabilities or logits: bounds the payload of a result.
inline constexpr int kMaxScoredRows = 32;
// A prompt is cut into so many chunks for each stage to fill them, but no smaller ones than this
// part of a step, nor than so many rows.
inline constexpr int kChunksPerStage = 4;
inline constexpr int kSmallestChunksPerStep = 8;
inline constexpr int kMinChunkRows = 32;
// Rows of a step for clients that are over their share, and while a prompt of another one waits.
// Steps that hold less than twice as many rows are not shared out so.
inline constexpr int kCrowdedRows = 16;
inline constexpr int kRationedRows = 2;
// Meanwhile sequences of the other clients begin to decode so many steps apart, but none is held
// back for more than kMaxHeldSteps.
inline constexpr int kApartSteps = 6;
inline constexpr int kMaxHeldSteps = 16;
// Tokens of sequences opened by one step whose KV is there already: bounds the header of a frame.
inline constexpr int kMaxCachedTokens = 1 << 16;
inline constexpr int kTokensPerLogitBias = 3;  // a bias takes as much of a header as so many tokens

struct SchedulerOptions {
  int stages = 1;
  int max_slots = 8;
  int max_context = 0;        // positions of a sequence
  int kv_blocks = 0;          // at least one sequence's; 0 = enough for all slots
  int max_step_tokens = 256;  // rows per step
  int max_waiting = 256;      // sequences accepted beyond the slots
  int max_in_flight = 0;      // steps; 0 = stages + 1, so that stage 0 always finds the next one
  uint64_t hash_seed = 0;     // of the prefix cache
};

struct SchedulerRequest {
  RequestId id = 0;             // not used by another live request
  std::vector<int32_t> prompt;  // >= 1 token
  int max_tokens = 0;           // of each choice; >= 1 unless score
  std::vector<int32_t> stop_token_ids;
  absl::Duration deadline = absl::InfiniteDuration();  // on the clock passed to Tick
  bool score = false;
  bool logits = false;     // with score
  int choices = 1;         // 1 with score
  int priority = 0;        // higher is served first
  std::string client;      // whose share it is
  std::string cache_salt;  // KV is shared only between requests with the same
  int logit_biases = 0;    // told to the stages when a sequence opens
};

// Rows of one sequence, consecutive in Step::token_ids.
struct StepRows {
  RequestId id = 0;
  int choice = 0;
  SequenceId sequence = 0;
  int attempt = 0;  // how often the sequence was preempted before
  int slot = 0;
  int start_position = 0;
  int row_count = 0;
  bool open = false;    // this step opens the sequence in its slot
  bool sample = false;  // sample the token after the last row
  bool ahead = false;   // one row, of the token that is sampled after the row before it: here 0
  bool score = false;   // return log p(targets[i] | ... row i)
  bool logits = false;
  std::vector<int32_t> targets;  // score: the token after each row; one fewer at the prompt's end
  // With open: the blocks that hold positions [0, start_position), and the tokens there.
  std::vector<int> cached_blocks;
  std::vector<int32_t> cached_tokens;
  std::vector<int> new_blocks;  // appended to the sequence's, so that they cover these rows
};

struct Step {
  struct Copy {
    int from = 0, to = 0;
  };
  uint64_t number = 0;     // from 1, without gaps
  std::vector<int> close;  // slots closed before anything else
  std::vector<int> clear;  // then: blocks zeroed
  std::vector<Copy> copies;
  std::vector<StepRows> rows;
  std::vector<int32_t> token_ids;
  int decode_rows = 0;  // of them, rows that continue a sampled token, those ahead included
};

// What came back for one StepRows.
struct RowsResult {
  absl::Status status;   // not ok: this sequence failed
  int32_t token_id = 0;  // if a sample was asked for
};

struct SchedulerEvent {
  enum class Kind { kToken, kScores, kChoiceEnd, kEnd };
  Kind kind = Kind::kEnd;
  RequestId id = 0;
  int choice = 0;
  int rows = 0;                   // kToken, kScores: index into the step's rows
  uint32_t index = 0;             // kToken: from 0; kScores: first position
  absl::Status status;            // kChoiceEnd, kEnd
  Finish finish = Finish::kStop;  // likewise, with an Ok status
};

struct SchedulerStats {
  uint64_t cached_tokens = 0;  // of prompts, not computed because the prefix cache had them
  uint64_t preemptions = 0;
  int blocks_used = 0, blocks_cached = 0, blocks_free = 0;
};

// The slots of the pipeline. A slot that was opened must be closed by a later step before it is
// opened again; frames keep their order, so the step that reuses it may be the one that closes it.
class SlotPool {
 public:
  explicit SlotPool(int slots);
  bool empty() const { return free_.empty(); }
  int free() const { return static_cast<int>(free_.size()); }
  int Acquire();                        // not empty
  void Release(int slot, bool opened);  // opened: the stages know the slot
  std::vector<int> TakeClosing();       // for the next step

 private:
  std::deque<int> free_;
  std::vector<int> closing_;
};

// Not thread-safe. Every request that Add accepted ends with exactly one kEnd event; a choice that
// ends by itself (not with the whole request) is told before by a kChoiceEnd. A choice that fails
// leaves the others alone; the request then ends with its status.
class Scheduler {
 public:
  explicit Scheduler(SchedulerOptions options);
  virtual ~Scheduler() = default;
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // Errors: RESOURCE_EXHAUSTED if as many sequences are live as there may be; ALREADY_EXISTS;
  // INVALID_ARGUMENT for an empty prompt, one that exceeds the context, max_tokens or choices < 1.
  absl::Status Add(SchedulerRequest request);
  void Cancel(RequestId id);                       // ends with CANCELLED; unknown ids are ignored
  void FinishEarly(RequestId id, int choice = 0);  // ends as if a stop token had come
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

  int running() const { return running_; }                                        // sequences
  int waiting() const { return static_cast<int>(sequences_.size()) - running_; }  // likewise
  int in_flight() const { return static_cast<int>(in_flight_.size()); }
  SchedulerStats stats() const;
  const SchedulerOptions& options() const { return options_; }

  // Ok, or INTERNAL naming the block whose references are not those of the tables.
  absl::Status CheckBlocks() const;

 protected:
  // Virtual so that tests can plant mistakes and see that they are found.
  virtual void ReleaseBlock(int block, bool dirty) { pool_.Release(block, dirty); }
  virtual void Tell(SchedulerEvent event) { events_.push_back(std::move(event)); }
  virtual const FairEntry* NextWaiting() const { return waiting_.Front(); }
  // Whether the client has to stand back.
  virtual bool OverShare(const std::string& client) const {
    return Crowded() && shares_.Over(client);
  }
  // Whether a sequence of so many tokens, `generated` of them sampled, goes on for certain with the
  // one in flight unless that is a stop token. forks: others are to begin with its KV.
  virtual bool MayGoAhead(const SchedulerRequest& request, int tokens, int generated,
                          bool forks) const {
    return !forks && generated + 1 < request.max_tokens && tokens + 1 < options_.max_context;
  }

 private:
  struct Sequence;
  struct Live {  // a request
    SchedulerRequest request;
    std::vector<SequenceId> sequences;  // not ended yet, by choice
    bool prompt_ready = false;          // choices other than the first have begun, or may
    bool stepped = false;
    absl::Status failure;  // of the first choice that failed
  };
  struct Sequence {
    SequenceId id = 0;
    Live* live = nullptr;
    int choice = 0;
    FairEntry entry;
    std::vector<int32_t> tokens;  // prompt, then what was sampled; empty while held (see Fork)
    int generated = 0;
    int preemptions = 0;  // = attempt
    // While running:
    int slot = -1;
    bool opened = false;         // the stages know the slot
    bool decoding = false;       // its prompt has been sent
    int sent = 0;                // leading tokens given to the pipeline, or in cached blocks
    int answered = 0;            // of them, known to have come out finite
    std::vector<int> blocks;     // its table
    int told_blocks = 0;         // of them, known to the stages
    std::vector<PrefixId> runs;  // of its leading blocks: what they were published as
    bool publishes = true;       // false after a collision
    uint64_t held_until = 0;     // its next row does not go before this step
    uint64_t step = 0;           // the latest one with rows of it
    // While in joining_:
    SequenceId leader = 0;  // computes the beginning of its prompt
    size_t shared = 0;      // blocks of that; 0: it has not joined anybody yet
    bool running() const { return slot >= 0; }
    // Tokens to send; -1: the row of one that has not come back yet is sent already (ahead).
    int pending() const { return static_cast<int>(tokens.size()) - sent; }
  };

  // The prompt rows of a step that is being made.
  struct PromptRows {
    std::vector<std::pair<Sequence*, int>> shares;
    std::vector<Sequence*> put_off;  // scored, with too many scored rows in this step
    int scored_rows_left = kMaxScoredRows;
    int cached_left = kMaxCachedTokens;
  };

  // --- scheduler.cc: requests and results.
  absl::Status Check(const SchedulerRequest& request) const;
  void OnRows(const StepRows& rows, int index, const RowsResult& result);
  void OnToken(Sequence& sequence, int index, int32_t token);
  void Publish(Sequence& sequence);
  void Fork(const Sequence& parent);
  void BeginOthers(Live& live, std::span<const int32_t> prompt);
  void EndChoice(Sequence& sequence, const absl::Status& status, Finish finish = Finish::kStop);
  void EndRequest(RequestId id, const absl::Status& status, Finish finish = Finish::kStop);

  // --- scheduler_room.cc: slots and blocks.
  void Admit();
  bool Join(Sequence& sequence);
  void EndJoin(SequenceId leader, size_t published);
  bool KeptFree(const Sequence& sequence) const;
  BlockPool::Prefix FindPrefix(const Sequence& sequence) const;
  static int MostCached(const Sequence& sequence);
  bool TakeRoom(Sequence& sequence);
  int BlocksWanted(const Sequence& sequence, const BlockPool::Prefix& prefix) const;
  bool MakeRoom(const Sequence& sequence);
  void Start(Sequence& sequence);
  bool TryFork(const Sequence& parent, Sequence& child);
  bool AddBlock(Sequence& sequence);
  Sequence* LowestRanked(std::span<Sequence* const> among) const;
  void Preempt(Sequence& sequence);
  void Stop(Sequence& sequence);

  // --- scheduler_step.cc: rows.
  bool WorthAPass() const;
  bool Crowded() const;
  int OverShareRows() const;
  const FairEntry* FirstPrompt(bool over_share) const;
  void AddDecodeRows(Step& step, int& over_share_rows);
  bool PromptGoesFirst() const;
  std::vector<Sequence*> Ahead() const;
  void AddReady(bool over_share, int rows, Step& step);
  bool AddDecodeRow(Sequence& sequence, Step& step);
  void AddPromptRows(Step& step, int over_share_rows);
  int ShareOut(bool over_share, int rows, PromptRows& prompts);
  void MoveApart(Sequence& sequence);
  void AddRows(Sequence& sequence, int count, Step& step);
  void OpenSequence(Sequence& sequence, StepRows& rows);
  int DecodeRowLimit() const;
  int PromptRowLimit() const;
  int64_t PendingPromptRows() const;

  Sequence& Of(const FairEntry* entry) { return sequences_.at(entry->order); }

  const SchedulerOptions options_;
  bool streaming_ = false;
  uint64_t steps_ = 0;
  uint64_t last_sequence_ = 0;
  SlotPool slots_;
  BlockPool pool_;
  std::unordered_map<RequestId, Live> requests_;
  std::unordered_map<SequenceId, Sequence> sequences_;
  std::vector<Sequence*> by_slot_;  // [max_slots], nullptr = free
  int running_ = 0;
  std::map<std::string, int> running_of_;  // by client, if any
  ClientShares shares_;
  FairQueue waiting_;                // no room yet
  std::vector<SequenceId> joining_;  // nor these: they wait for a leader's blocks
  FairQueue prompts_;                // prompt rows to send
  SequenceId unfinished_ = 0;        // its prompt has had its turn but for little
  uint64_t last_prompt_step_ = 0;    // with prompt rows of clients within their share
  uint64_t last_decode_step_ = 0;    // with decode rows
  uint64_t decoding_from_ = 0;       // the step in which the latest of those prompts goes on
  std::deque<SequenceId> ready_;     // a sampled token to send
  std::vector<Step::Copy> copies_;   // for the next step; each references `from`
  std::set<std::pair<absl::Duration, RequestId>> deadlines_;  // finite ones
  std::deque<Step> in_flight_;
  int decode_steps_in_flight_ = 0;
  int decoding_ = 0;  // generating sequences whose prompt has been sent
  SchedulerStats stats_;
  std::vector<SchedulerEvent> events_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_COORDINATOR_SCHEDULER_H_
