// Inside of the pipeline: the posts, what the loop's thread owns and what it shares with callers.
// pipeline.cc has the callers' side, pipeline_loop.cc the loop's.
#ifndef STAGECOACH_COORDINATOR_PIPELINE_IMPL_H_
#define STAGECOACH_COORDINATOR_PIPELINE_IMPL_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <span>
#include <thread>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "coordinator/pipeline.h"
#include "coordinator/pipeline_stats.h"
#include "coordinator/places.h"
#include "coordinator/step_frame.h"

namespace stagecoach {

// Time on a monotonic clock, from an arbitrary start.
inline absl::Duration MonotonicNow() {
  return absl::FromChrono(std::chrono::steady_clock::now().time_since_epoch());
}

class Pipeline::Impl {
 public:
  explicit Impl(PipelineOptions options)
      : options_(std::move(options)),
        places_(options_.max_slots + options_.max_waiting),
        loop_([this] { Loop(); }) {}

  void ExpectEpoch(uint64_t epoch, const EpochShape& shape);
  void StartEpoch(uint64_t epoch, std::shared_ptr<LinkSender> sender);
  // Ends the current epoch: all of it if `only` is 0, else if it is that one. `failure`: tells the
  // failure callback.
  void EndEpoch(uint64_t only, const absl::Status& reason, bool failure);

  void SetStreaming(bool streaming);
  absl::StatusOr<RequestId> Submit(Request request, std::shared_ptr<RequestObserver> observer);
  void Cancel(RequestId id);
  void FinishEarly(RequestId id, int choice);
  PipelineStats Stats() const;
  std::vector<StageTotals> StageTimings() const;
  void SetFailureCallback(std::function<void(uint64_t, const absl::Status&)> callback);
  void Shutdown();

  absl::Status OnLink(uint64_t link, const v1::LinkHello& hello);
  void OnFrame(uint64_t link, Frame frame, CreditReturn credit);
  void OnLinkClosed(uint64_t link, const absl::Status& reason);

 private:
  // --- What is posted to the loop.
  struct Submitted {
    RequestId id;
    Request request;
    std::shared_ptr<RequestObserver> observer;
    absl::Duration time;
    absl::Duration deadline;
  };
  struct Cancelled {
    RequestId id;
  };
  struct FinishedEarly {
    RequestId id;
    int choice;
  };
  struct Received {
    Frame frame;
    CreditReturn credit;  // returned when the post is destroyed
  };
  struct Started {
    uint64_t epoch;
    EpochShape shape;
    std::shared_ptr<LinkSender> sender;
  };
  struct Ended {
    absl::Status reason;
  };
  struct StreamingSet {
    bool streaming;
  };
  using Post =
      std::variant<Submitted, Cancelled, FinishedEarly, Received, Started, Ended, StreamingSet>;

  // A request as the loop knows it.
  struct Live {
    std::shared_ptr<RequestObserver> observer;
    SamplingParams sampling;
    RequestSummary summary;
    bool score = false;
    absl::Duration submitted, first_step, first_token, last_token;
    bool stepped = false;
  };
  // What an observer is told once the next steps have been sent.
  struct Delivery {
    SchedulerEvent event;
    SampledToken token;
    std::vector<float> scores;
    std::span<const float> logits;
    Payload payload;  // keeps logits alive
  };
  // An accepted request, as callers know it.
  struct Accepted {
    std::string client;
    int choices = 1;
    // Signals posted for it: each once, which bounds the queue.
    bool cancelled = false;
    std::vector<bool> finished;  // [choices]
  };

  void Loop();
  void Enqueue(Post post) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    posts_.push_back(std::move(post));
    arrivals_.fetch_add(1, std::memory_order_release);
    wake_.Signal();
  }
  // Waits for posts, a deadline or the end. False when the loop is to end.
  bool WaitForPosts(absl::Duration deadline, std::deque<Post>& posts);
  void Handle(Submitted& post);
  void Handle(Cancelled& post);
  void Handle(FinishedEarly& post);
  void Handle(Received& post);
  void Handle(Started& post);
  void Handle(Ended& post);
  void Handle(StreamingSet& post);
  void AddTimings(const v1::StepResult& result, bool after_idle);
  void CollectEvents(StepOutcome* outcome, const Payload& payload);
  void SendSteps();
  void Deliver();
  void DeliverEnd(const SchedulerEvent& event);
  void PublishStats();

  const PipelineOptions options_;

  // --- The loop's own.
  std::optional<Scheduler> scheduler_;  // while an epoch runs
  std::shared_ptr<LinkSender> sender_;  // nullptr once sending has failed
  uint64_t epoch_ = 0;
  bool streaming_ = false;
  std::unordered_map<RequestId, Live> requests_;
  std::vector<Delivery> deliveries_;
  std::deque<bool> after_idle_;  // one per step in flight: nothing was running when it was sent
  bool had_result_ = false;      // in this round of the loop
  uint64_t new_tokens_ = 0;      // that stats_ has not counted yet
  SchedulerStats counted_;       // what stats_ has of this epoch's scheduler

  // --- Shared.
  mutable absl::Mutex mu_;
  absl::CondVar wake_;
  std::atomic<uint64_t> arrivals_ = 0;           // posts so far
  std::deque<Post> posts_ ABSL_GUARDED_BY(mu_);  // bounded: see Submit, Cancel, OnFrame
  bool stop_ ABSL_GUARDED_BY(mu_) = false;
  uint64_t expected_epoch_ ABSL_GUARDED_BY(mu_) = 0;  // 0: none
  uint64_t last_epoch_ ABSL_GUARDED_BY(mu_) = 0;
  EpochShape shape_ ABSL_GUARDED_BY(mu_);   // of expected_epoch_
  uint64_t link_ ABSL_GUARDED_BY(mu_) = 0;  // of the last stage
  bool linked_ ABSL_GUARDED_BY(mu_) = false;
  bool serving_ ABSL_GUARDED_BY(mu_) = false;
  bool streaming_set_ ABSL_GUARDED_BY(mu_) = false;    // the latest posted
  bool requests_to_end_ ABSL_GUARDED_BY(mu_) = false;  // failed; whoever was told names the reason
  int frames_posted_ ABSL_GUARDED_BY(mu_) = 0;
  std::shared_ptr<LinkSender> current_sender_ ABSL_GUARDED_BY(mu_);  // to close it from outside
  absl::Status reason_ ABSL_GUARDED_BY(mu_) = absl::UnavailableError("the stages are not ready");
  std::unordered_map<RequestId, Accepted> live_ ABSL_GUARDED_BY(mu_);
  Places places_ ABSL_GUARDED_BY(mu_);  // taken by live_
  std::mt19937_64 random_ ABSL_GUARDED_BY(mu_){std::random_device()()};
  PipelineStats stats_ ABSL_GUARDED_BY(mu_);
  std::vector<StageTotals> timings_ ABSL_GUARDED_BY(mu_);
  TokenRate rate_ ABSL_GUARDED_BY(mu_);
  RetryEstimate retry_ ABSL_GUARDED_BY(mu_);
  std::function<void(uint64_t, const absl::Status&)> on_failure_ ABSL_GUARDED_BY(mu_);

  std::once_flag shut_down_;
  std::thread loop_;  // last: everything above is there when it starts
};

}  // namespace stagecoach

#endif  // STAGECOACH_COORDINATOR_PIPELINE_IMPL_H_
