// What the pipeline's tests put at its two ends: stages that answer by simple arithmetic, and an
// observer that remembers.
#ifndef STAGECOACH_COORDINATOR_PIPELINE_TEST_ENDS_H_
#define STAGECOACH_COORDINATOR_PIPELINE_TEST_ENDS_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "coordinator/pipeline.h"
#include "gtest/gtest.h"

namespace stagecoach {

inline constexpr int kVocab = 100;
inline constexpr uint64_t kLink = 5;

inline PipelineOptions Options() {
  return {.model_hash = "hash",
          .kernel_revision = "test-1",
          .d_model = 8,
          .vocab_size = kVocab,
          .max_slots = 4,
          .max_context = 512,
          .max_waiting = 3};
}

inline EpochShape Shape(int stages) { return {.stages = stages, .max_step_tokens = 64}; }

inline v1::LinkHello Hello(uint64_t epoch, int stages) {
  v1::LinkHello hello;
  hello.set_protocol_version(kProtocolVersion);
  hello.set_epoch(epoch);
  hello.set_model_hash("hash");
  hello.set_kernel_revision("test-1");
  hello.set_to_stage(stages);
  hello.set_d_model(8);
  return hello;
}

// The token that follows `sum` of all tokens so far, in this model.
inline int32_t NextToken(int64_t sum) { return static_cast<int32_t>((sum * 7 + 3) % kVocab); }

inline std::vector<int32_t> Continuation(std::vector<int32_t> tokens, int count) {
  int64_t sum = 0;
  for (int32_t token : tokens) sum += token;
  std::vector<int32_t> result;
  for (int i = 0; i < count; ++i) {
    result.push_back(NextToken(sum));
    sum += result.back();
  }
  return result;
}

// All stages in one thread. Steps are answered in order, unless held back.
class FakeStages {
 public:
  explicit FakeStages(Pipeline* pipeline, uint64_t epoch = 1, uint64_t link = kLink)
      : pipeline_(pipeline), epoch_(epoch), link_(link), thread_([this] { Run(); }) {}
  ~FakeStages() {
    {
      absl::MutexLock lock(&mu_);
      stop_ = true;
      changed_.SignalAll();
    }
    thread_.join();
  }

  // A sender into these stages; they must outlive it.
  std::unique_ptr<LinkSender> NewSender() { return std::make_unique<Sender>(this); }

  void Hold() {
    absl::MutexLock lock(&mu_);
    held_ = true;
  }
  void Release() {
    absl::MutexLock lock(&mu_);
    held_ = false;
    changed_.SignalAll();
  }
  // Waits until `steps` have been received.
  void AwaitSteps(int steps) {
    absl::MutexLock lock(&mu_);
    while (received_ < steps) {
      if (changed_.WaitWithTimeout(&mu_, absl::Seconds(10))) FAIL() << "no step";
    }
  }
  int received() const {
    absl::MutexLock lock(&mu_);
    return received_;
  }
  bool closed() const { return closed_; }
  int rows_ahead() const { return rows_ahead_; }
  // Makes the sequence that starts with `token` fail.
  void FailSequence(int32_t token) { failing_token_ = token; }
  void SendWithout(bool what) { omit_sequences_ = what; }

 private:
  class Sender : public LinkSender {
   public:
    explicit Sender(FakeStages* stages) : stages_(stages) {}
    absl::Status Send(Frame frame) override {
      absl::MutexLock lock(&stages_->mu_);
      if (stages_->closed_) return absl::UnavailableError("closed");
      stages_->frames_.push_back(std::move(frame));
      ++stages_->received_;
      stages_->changed_.SignalAll();
      return absl::OkStatus();
    }
    void Close() override { stages_->closed_ = true; }

   private:
    FakeStages* stages_;
  };

  void Run() {
    while (true) {
      Frame frame;
      {
        absl::MutexLock lock(&mu_);
        while (!stop_ && (held_ || frames_.empty())) changed_.Wait(&mu_);
        if (stop_) return;
        frame = std::move(frames_.front());
        frames_.pop_front();
      }
      pipeline_->OnFrame(link_, Answer(frame.header.step()), CreditReturn([this] { ++credits_; }));
    }
  }

  Frame Answer(const v1::StepHeader& step) {
    for (uint32_t slot : step.close()) EXPECT_EQ(slots_.erase(slot), 1u);
    for (const v1::SequenceOpen& open : step.open()) {
      Slot slot = {.id = open.sequence_id(),
                   .length = static_cast<uint32_t>(open.cached_token_ids_size()),
                   .blocks = static_cast<uint32_t>(open.cached_blocks_size())};
      for (int32_t token : open.cached_token_ids()) slot.sum += token;
      EXPECT_TRUE(slots_.emplace(open.slot(), slot).second);
    }
    Frame frame;
    frame.header.set_epoch(epoch_);
    v1::StepResult& result = *frame.header.mutable_result();
    result.set_step(step.step());
    std::vector<float> logits;
    int row = 0;
    for (const v1::SequenceRows& rows : step.rows()) {
      Slot& slot = slots_.at(rows.slot());
      EXPECT_EQ(slot.id, rows.sequence_id());
      EXPECT_EQ(slot.length, rows.start_position());
      if (slot.length == 0) slot.failing = step.token_ids(row) == failing_token_;
      slot.blocks += rows.new_blocks_size();
      EXPECT_EQ(slot.blocks, (rows.start_position() + rows.row_count() + 31) / 32);
      v1::SequenceResult& sequence = *result.add_sequences();
      sequence.set_slot(rows.slot());
      sequence.set_sequence_id(rows.sequence_id());
      if (rows.ahead()) slot.sum += slot.sampled;  // its token id is 0
      for (uint32_t i = 0; i < rows.row_count(); ++i) slot.sum += step.token_ids(row++);
      slot.length += rows.row_count();
      rows_ahead_ += rows.ahead();
      if (slot.failing) {
        sequence.set_status_code(static_cast<uint32_t>(absl::StatusCode::kDataLoss));
        sequence.set_status_message("non-finite");
        continue;
      }
      sequence.set_sampled(rows.sample());
      if (rows.sample()) sequence.set_token_id(slot.sampled = NextToken(slot.sum));
      for (int32_t target : rows.targets()) sequence.add_target_logprobs(-0.01f * target);
      if (!rows.logits()) continue;
      sequence.set_logits_rows(rows.row_count());
      for (uint32_t i = 0; i < rows.row_count(); ++i) {
        logits.insert(logits.end(), kVocab, static_cast<float>(rows.start_position() + i));
      }
    }
    if (omit_sequences_) result.clear_sequences();
    v1::StageTiming& timing = *result.add_timings();
    timing.set_compute_us(1000);
    timing.set_wait_us(500);
    frame.payload = Payload(std::move(logits));
    return frame;
  }

  struct Slot {
    uint64_t id = 0;
    uint32_t length = 0;
    uint32_t blocks = 0;
    int64_t sum = 0;
    int32_t sampled = 0;
    bool failing = false;
  };

  Pipeline* const pipeline_;
  const uint64_t epoch_;
  const uint64_t link_;
  std::map<uint32_t, Slot> slots_;  // run thread only
  mutable absl::Mutex mu_;
  absl::CondVar changed_;  // any of these
  std::deque<Frame> frames_ ABSL_GUARDED_BY(mu_);
  bool stop_ ABSL_GUARDED_BY(mu_) = false;
  bool held_ ABSL_GUARDED_BY(mu_) = false;
  int received_ ABSL_GUARDED_BY(mu_) = 0;
  std::atomic<bool> closed_ = false;
  std::atomic<int> credits_ = 0;
  std::atomic<int> rows_ahead_ = 0;
  std::atomic<int32_t> failing_token_ = -1;
  std::atomic<bool> omit_sequences_ = false;
  std::thread thread_;
};

class Recorder : public RequestObserver {
 public:
  void OnToken(int choice, uint32_t index, const SampledToken& token) override {
    absl::MutexLock lock(&mu_);
    EXPECT_EQ(index, choices_[choice].size());
    EXPECT_FALSE(end_.HasBeenNotified());
    choices_[choice].push_back(token.token_id);
    more_.SignalAll();
    if (on_token_) on_token_(index);
  }
  void OnChoiceEnd(int, const absl::Status&, Finish) override { ++choices_ended_; }
  void OnScores(uint32_t first, std::span<const float> logprobs,
                std::span<const float> logits) override {
    absl::MutexLock lock(&mu_);
    EXPECT_EQ(first, scored_rows_);
    scored_rows_ +=
        static_cast<uint32_t>(logits.empty() ? logprobs.size() : logits.size() / kVocab);
    logprobs_.insert(logprobs_.end(), logprobs.begin(), logprobs.end());
    logits_.insert(logits_.end(), logits.begin(), logits.end());
  }
  void OnEnd(const absl::Status& status, const RequestSummary& summary) override {
    ASSERT_FALSE(end_.HasBeenNotified());
    status_ = status;
    summary_ = summary;
    end_.Notify();
  }

  absl::Status Wait() {
    if (!end_.WaitForNotificationWithTimeout(absl::Seconds(20))) {
      ADD_FAILURE() << "the request has not ended";
      return absl::UnknownError("not ended");
    }
    return status_;
  }
  bool ended() const { return end_.HasBeenNotified(); }
  std::vector<int32_t> tokens(int choice = 0) const {
    absl::MutexLock lock(&mu_);
    const auto found = choices_.find(choice);
    return found == choices_.end() ? std::vector<int32_t>() : found->second;
  }
  void AwaitTokens(size_t count) {
    absl::MutexLock lock(&mu_);
    while (choices_[0].size() < count) {
      if (more_.WaitWithTimeout(&mu_, absl::Seconds(20))) FAIL() << "no token";
    }
  }
  // After Wait():
  const RequestSummary& summary() const { return summary_; }
  int choices_ended() const { return choices_ended_; }
  const std::vector<float>& logprobs() const { return logprobs_; }
  const std::vector<float>& logits() const { return logits_; }
  std::function<void(uint32_t)> on_token_;

 private:
  mutable absl::Mutex mu_;
  absl::CondVar more_;
  std::map<int, std::vector<int32_t>> choices_;
  int choices_ended_ = 0;
  uint32_t scored_rows_ = 0;
  std::vector<float> logprobs_, logits_;
  absl::Status status_;
  RequestSummary summary_;
  absl::Notification end_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_COORDINATOR_PIPELINE_TEST_ENDS_H_
