// The running pipeline: one event loop that owns the scheduler, sends its steps to stage 0 as
// frames and turns results into events. Everything else only posts to it.
#ifndef STAGECOACH_COORDINATOR_PIPELINE_H_
#define STAGECOACH_COORDINATOR_PIPELINE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "coordinator/scheduler.h"
#include "kernels/sampling.h"
#include "worker/link/stage_link.h"

namespace stagecoach {

// A prompt to continue, or (score) to run teacher-forced without sampling. Checked already.
struct Request {
  std::vector<int32_t> prompt;  // >= 1 token
  SamplingParams sampling;
  int max_tokens = 0;                   // >= 1; prompt + max_tokens <= context
  std::vector<int32_t> stop_token_ids;  // end-of-generation ids included unless ignored
  absl::Time deadline = absl::InfiniteFuture();
  bool score = false;          // no sampling: OnScores for every prompt row
  bool return_logits = false;  // with score
  int choices = 1;             // continuations of the prompt; see ChoiceSeed
  int priority = 0;            // higher is served first
  std::string client;          // whose share it is; see Scheduler
  std::string cache_salt;      // KV is shared only between requests with the same
};

struct RequestSummary {
  Finish finish = Finish::kStop;  // of the choice that ended last
  uint32_t prompt_tokens = 0;
  uint32_t cached_tokens = 0;      // of them, found in the prefix cache
  uint32_t completion_tokens = 0;  // of all choices
  double queue_seconds = 0;        // submitted -> first step sent
  double prompt_seconds = 0;       // first step sent -> first token
  double decode_seconds = 0;       // first token -> last token
};

// Called on the pipeline's thread; must not block. Exactly one OnEnd per accepted request, last.
class RequestObserver {
 public:
  virtual ~RequestObserver() = default;
  // A stop token is reported too. index counts from 0 in each choice.
  virtual void OnToken(int choice, uint32_t index, const SampledToken& token) = 0;
  // A choice ended by itself, before the request: Ok, or DATA_LOSS of this choice alone.
  virtual void OnChoiceEnd(int choice, const absl::Status& status, Finish finish) = 0;
  // logprobs[i] = log p(prompt[first + i + 1]); logits: [n][vocab] or empty.
  virtual void OnScores(uint32_t first, std::span<const float> logprobs,
                        std::span<const float> logits) = 0;
  // Ok with a summary; CANCELLED, DEADLINE_EXCEEDED, UNAVAILABLE (a stage was lost), DATA_LOSS.
  virtual void OnEnd(const absl::Status& status, const RequestSummary& summary) = 0;
};

struct PipelineOptions {
  std::string model_hash;
  std::string kernel_revision;
  int d_model = 0;
  int vocab_size = 0;
  int max_slots = 8;
  int max_context = 0;
  int max_waiting = 256;  // sequences accepted beyond the slots
};

// What the plan of an epoch says to its scheduler.
struct EpochShape {
  int stages = 1;
  int kv_blocks = 0;  // of every stage, at least one sequence's; 0 = enough for all slots
  int max_step_tokens = 256;
};

struct PipelineStats {
  bool serving = false;
  uint64_t epoch = 0;
  uint32_t running = 0;  // sequences
  uint32_t waiting = 0;  // likewise
  uint32_t slots = 0;
  uint32_t blocks_used = 0;    // KV blocks in tables of running sequences,
  uint32_t blocks_cached = 0;  // kept for prompts that begin alike,
  uint32_t blocks_free = 0;    // and the rest
  uint64_t completed = 0;
  uint64_t cancelled = 0;  // by the client
  uint64_t failed = 0;     // all other ends
  uint64_t prompt_tokens = 0;
  uint64_t completion_tokens = 0;
  uint64_t cached_tokens = 0;           // of prompts, found in the prefix cache
  uint64_t preemptions = 0;             // sequences that gave their blocks up and were replayed
  double recent_tokens_per_second = 0;  // over the last 10 s
  uint64_t dropped_frames = 0;          // of another epoch, link or step
  absl::Duration retry_after;           // advice to a client that found the queue full
};

// What one stage of the current epoch did, as its step timings say.
struct StageTotals {
  uint64_t steps = 0;
  double compute_seconds = 0;
  double wait_seconds = 0;  // for a frame while the pipeline had work
};

// Thread-safe. Posts (Submit, Cancel, results, ...) take effect in the order in which they were
// made; none of them waits for the loop. A token costs one wake-up of the loop's thread, and the
// next step is sent before observers hear of the last one.
class Pipeline : public LinkHandler {
 public:
  explicit Pipeline(PipelineOptions options);
  ~Pipeline() override;  // Shutdown()

  // Results of `epoch` will be accepted from now on (the last stage dials before serving starts).
  void ExpectEpoch(uint64_t epoch, const EpochShape& shape);
  // All stages are linked: start stepping through `to_first_stage`. Without effect (the sender is
  // closed) if the epoch is no longer the expected one.
  void StartEpoch(uint64_t epoch, std::unique_ptr<LinkSender> to_first_stage);
  // A stage was lost: every running request ends with `reason` (UNAVAILABLE); waiting ones too.
  void EndEpoch(const absl::Status& reason);

  // Whether any stage streams its weights, in this epoch and those to come: see
  // Scheduler::SetStreaming.
  void SetStreaming(bool streaming);

  // Errors: RESOURCE_EXHAUSTED with a retry hint when no more sequences are accepted, or no more
  // of this client (see Places); UNAVAILABLE with the reason while no epoch is serving. After an
  // error the observer is never called.
  absl::StatusOr<RequestId> Submit(Request request, std::shared_ptr<RequestObserver> observer);
  // Frees the slot within one step; OnEnd(CANCELLED) follows. Unknown or ended ids are ignored.
  void Cancel(RequestId id);
  // Ends a choice as if a stop token had come (a stop string matched): OnChoiceEnd(Ok, kStop).
  void FinishEarly(RequestId id, int choice = 0);

  PipelineStats Stats() const;
  std::vector<StageTotals> StageTimings() const;  // one per stage of the current or last epoch
  // Called (any thread) when the current epoch cannot go on: its link broke, or the last stage sent
  // what does not fit the protocol. Nothing more is stepped or accepted then; running requests end
  // with the EndEpoch that must follow and may know the cause better (at once without a callback).
  void SetFailureCallback(std::function<void(uint64_t epoch, const absl::Status&)> callback);
  // Ends all requests with UNAVAILABLE and joins the loop. Idempotent. Not from an observer.
  void Shutdown();

  absl::Status OnLink(uint64_t link, const v1::LinkHello& hello) override;
  void OnFrame(uint64_t link, Frame frame, CreditReturn credit) override;
  void OnLinkClosed(uint64_t link, const absl::Status& reason) override;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_COORDINATOR_PIPELINE_H_
