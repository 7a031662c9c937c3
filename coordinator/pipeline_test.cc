#include "coordinator/pipeline.h"

#include <atomic>
#include <cstdio>
#include <thread>

#include "absl/synchronization/notification.h"
#include "coordinator/pipeline_test_ends.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace stagecoach {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

Request MakeRequest(std::vector<int32_t> prompt, int max_tokens) {
  Request request;
  request.prompt = std::move(prompt);
  request.max_tokens = max_tokens;
  return request;
}

class PipelineTest : public testing::Test {
 protected:
  void Start(int stages = 3) {
    pipeline_.ExpectEpoch(1, Shape(stages));
    ASSERT_TRUE(pipeline_.OnLink(kLink, Hello(1, stages)).ok());
    pipeline_.StartEpoch(1, stages_.NewSender());
  }
  std::shared_ptr<Recorder> Submit(Request request, RequestId* id = nullptr) {
    auto recorder = std::make_shared<Recorder>();
    const absl::StatusOr<RequestId> submitted = pipeline_.Submit(std::move(request), recorder);
    EXPECT_TRUE(submitted.ok()) << submitted.status();
    if (id != nullptr && submitted.ok()) *id = *submitted;
    return recorder;
  }
  void TearDown() override { pipeline_.Shutdown(); }

  Pipeline pipeline_{Options()};
  FakeStages stages_{&pipeline_};
};

TEST_F(PipelineTest, RunsManyRequests) {
  Start();
  std::vector<std::shared_ptr<Recorder>> recorders;
  std::vector<std::vector<int32_t>> prompts;
  for (int i = 0; i < 7; ++i) {
    prompts.push_back(std::vector<int32_t>(1 + 37 * i, i + 1));
    recorders.push_back(Submit(MakeRequest(prompts.back(), 20 + i)));
  }
  for (int i = 0; i < 7; ++i) {
    EXPECT_TRUE(recorders[i]->Wait().ok());
    EXPECT_EQ(recorders[i]->tokens(), Continuation(prompts[i], 20 + i));
    EXPECT_EQ(recorders[i]->summary().finish, Finish::kLength);
    EXPECT_EQ(recorders[i]->summary().prompt_tokens, prompts[i].size());
    EXPECT_EQ(recorders[i]->summary().completion_tokens, 20u + i);
    EXPECT_GE(recorders[i]->summary().queue_seconds, 0);
    EXPECT_GT(recorders[i]->summary().prompt_seconds, 0);
    EXPECT_GT(recorders[i]->summary().decode_seconds, 0);
  }
  pipeline_.Shutdown();  // figures are final
  const PipelineStats stats = pipeline_.Stats();
  EXPECT_EQ(stats.completed, 7u);
  EXPECT_EQ(stats.failed, 0u);
  EXPECT_EQ(stats.completion_tokens, 7u * 20 + 21);
  EXPECT_EQ(stats.prompt_tokens, 7u + 37 * 21);
  EXPECT_NEAR(stats.recent_tokens_per_second, 16.1, 1e-9);
  EXPECT_EQ(stats.dropped_frames, 0u);
  const std::vector<StageTotals> timings = pipeline_.StageTimings();
  ASSERT_EQ(timings.size(), 3u);
  EXPECT_EQ(timings[0].steps, static_cast<uint64_t>(stages_.received()));
  EXPECT_NEAR(timings[0].compute_seconds, 1e-3 * stages_.received(), 1e-9);
  // The wait before the very first step was not the pipeline's.
  EXPECT_LT(timings[0].wait_seconds, 0.5e-3 * stages_.received());
  EXPECT_GT(timings[0].wait_seconds, 0);
  EXPECT_EQ(timings[2].steps, 0u);  // the stages speak of one only
}

TEST_F(PipelineTest, StatsOfTheEndAreThereWhenItIsTold) {
  struct Observer : Recorder {
    explicit Observer(const Pipeline& pipeline) : pipeline(pipeline) {}
    void OnEnd(const absl::Status& status, const RequestSummary& summary) override {
      stats = pipeline.Stats();
      Recorder::OnEnd(status, summary);
    }
    const Pipeline& pipeline;
    PipelineStats stats;
  };
  Start();
  const auto observer = std::make_shared<Observer>(pipeline_);
  ASSERT_TRUE(pipeline_.Submit(MakeRequest({1, 2, 3}, 40), observer).ok());
  ASSERT_TRUE(observer->Wait().ok());
  EXPECT_EQ(observer->stats.running, 0u);
  EXPECT_EQ(observer->stats.blocks_used, 0u);
  EXPECT_GT(observer->stats.blocks_cached, 0u);
  EXPECT_EQ(observer->stats.completed, 1u);
  EXPECT_EQ(observer->stats.completion_tokens, 40u);
}

// On one stage the next row goes out before its token has come back.
TEST_F(PipelineTest, SendsRowsAheadOfTheirTokens) {
  Start(1);
  stages_.Hold();
  const std::vector<int32_t> prompt = {1, 2, 3}, other = {4};
  const auto recorder = Submit(MakeRequest(prompt, 50));
  stages_.AwaitSteps(2);  // nothing has been answered
  Request stopped = MakeRequest(other, 50);
  stopped.stop_token_ids = {Continuation(other, 5).back()};
  const auto stopping = Submit(std::move(stopped));
  stages_.Release();
  EXPECT_TRUE(recorder->Wait().ok());
  EXPECT_TRUE(stopping->Wait().ok());
  EXPECT_EQ(recorder->tokens(), Continuation(prompt, 50));
  EXPECT_EQ(stopping->tokens(), Continuation(other, 5));
  EXPECT_GT(stages_.rows_ahead(), 0);
  EXPECT_EQ(pipeline_.Stats().dropped_frames, 0u);
}

TEST_F(PipelineTest, ReportsAStopToken) {
  Start();
  const std::vector<int32_t> prompt = {1, 2, 3};
  const std::vector<int32_t> tokens = Continuation(prompt, 5);
  Request request = MakeRequest(prompt, 50);
  request.stop_token_ids = {tokens[4]};
  const auto recorder = Submit(std::move(request));
  EXPECT_TRUE(recorder->Wait().ok());
  EXPECT_EQ(recorder->tokens(), tokens);
  EXPECT_EQ(recorder->summary().finish, Finish::kStop);
}

TEST_F(PipelineTest, ScoresWithLogits) {
  Start();
  Request request;
  for (int i = 0; i < 90; ++i) request.prompt.push_back(i);
  request.score = request.return_logits = true;
  const auto recorder = Submit(std::move(request));
  EXPECT_TRUE(recorder->Wait().ok());
  ASSERT_EQ(recorder->logprobs().size(), 89u);
  ASSERT_EQ(recorder->logits().size(), 90u * kVocab);
  for (int i = 0; i < 89; ++i) EXPECT_EQ(recorder->logprobs()[i], -0.01f * (i + 1));
  for (int i = 0; i < 90; ++i) EXPECT_EQ(recorder->logits()[i * kVocab], i);
}

TEST_F(PipelineTest, CancelsInEveryState) {
  Start(1);
  stages_.Hold();
  std::vector<RequestId> ids(7);
  std::vector<std::shared_ptr<Recorder>> recorders;
  for (int i = 0; i < 7; ++i) recorders.push_back(Submit(MakeRequest({i, 1, 2}, 400), &ids[i]));
  stages_.AwaitSteps(1);
  pipeline_.Cancel(ids[6]);  // waiting
  pipeline_.Cancel(ids[0]);  // its prompt is in flight
  pipeline_.Cancel(ids[0]);
  EXPECT_EQ(recorders[6]->Wait().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(recorders[0]->Wait().code(), absl::StatusCode::kCancelled);
  stages_.Release();
  recorders[1]->AwaitTokens(10);
  pipeline_.Cancel(ids[1]);  // decoding
  EXPECT_EQ(recorders[1]->Wait().code(), absl::StatusCode::kCancelled);
  pipeline_.Cancel(ids[1]);  // ended
  pipeline_.Cancel(12345);   // never there
  for (int i = 2; i < 6; ++i) {
    EXPECT_TRUE(recorders[i]->Wait().ok());
    EXPECT_EQ(recorders[i]->tokens(), Continuation({i, 1, 2}, 400));
  }
  EXPECT_EQ(pipeline_.Stats().cancelled, 3u);
}

TEST_F(PipelineTest, SendsAPromptInFewerStepsWhileStreaming) {
  pipeline_.SetStreaming(true);  // before the epoch begins
  Start();
  EXPECT_TRUE(Submit(MakeRequest(std::vector<int32_t>(60, 1), 1))->Wait().ok());
  EXPECT_EQ(stages_.received(), 1);
  pipeline_.SetStreaming(false);
  EXPECT_TRUE(Submit(MakeRequest(std::vector<int32_t>(60, 2), 1))->Wait().ok());
  EXPECT_EQ(stages_.received(), 3);
}

TEST_F(PipelineTest, FinishesEarlyFromAnObserver) {
  Start();
  auto recorder = std::make_shared<Recorder>();
  std::atomic<RequestId> id = 0;
  recorder->on_token_ = [&](uint32_t index) {
    if (index < 3) return;
    while (id == 0) std::this_thread::yield();
    pipeline_.FinishEarly(id);
  };
  const absl::StatusOr<RequestId> submitted = pipeline_.Submit(MakeRequest({1}, 500), recorder);
  ASSERT_TRUE(submitted.ok());
  id = *submitted;
  EXPECT_TRUE(recorder->Wait().ok());
  EXPECT_EQ(recorder->summary().finish, Finish::kStop);
  EXPECT_LT(recorder->tokens().size(), 500u);
}

TEST_F(PipelineTest, EnforcesDeadlines) {
  Start(1);
  stages_.Hold();
  Request request = MakeRequest({1, 2}, 10);
  request.deadline = absl::Now() + absl::Milliseconds(30);
  const absl::Time start = absl::Now();
  const auto running = Submit(request);
  EXPECT_EQ(running->Wait().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_GE(absl::Now() - start, absl::Milliseconds(25));
  request.deadline = absl::Now() - absl::Seconds(1);
  EXPECT_EQ(Submit(request)->Wait().code(), absl::StatusCode::kDeadlineExceeded);
  stages_.Release();
  request.deadline = absl::Now() + absl::Seconds(100);
  EXPECT_TRUE(Submit(request)->Wait().ok());
}

TEST_F(PipelineTest, RefusesWhenTheQueueIsFull) {
  Start(1);
  stages_.Hold();
  std::vector<std::shared_ptr<Recorder>> recorders;
  for (int i = 0; i < 7; ++i) recorders.push_back(Submit(MakeRequest({i}, 2)));
  const absl::Status status =
      pipeline_.Submit(MakeRequest({1}, 2), std::make_shared<Recorder>()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr("retry in ~"));
  stages_.AwaitSteps(1);
  stages_.Release();
  for (const auto& recorder : recorders) EXPECT_TRUE(recorder->Wait().ok());
  EXPECT_TRUE(Submit(MakeRequest({1}, 2))->Wait().ok());
}

TEST_F(PipelineTest, RefusesWhatDoesNotFit) {
  Start(1);
  const auto code = [&](Request request) {
    return pipeline_.Submit(std::move(request), std::make_shared<Recorder>()).status().code();
  };
  EXPECT_EQ(code(MakeRequest({}, 2)), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(MakeRequest({1}, 0)), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(MakeRequest({1}, 512)), absl::StatusCode::kInvalidArgument);
}

TEST_F(PipelineTest, EndsOnlyTheSequenceThatFailed) {
  Start();
  stages_.FailSequence(42);
  const auto good = Submit(MakeRequest({1, 2}, 50));
  const auto bad = Submit(MakeRequest({42, 2}, 50));
  EXPECT_EQ(bad->Wait().code(), absl::StatusCode::kDataLoss);
  EXPECT_TRUE(good->Wait().ok());
  EXPECT_EQ(good->tokens(), Continuation({1, 2}, 50));
}

TEST_F(PipelineTest, EndEpochEndsAllStreamsWithTheReason) {
  Start();
  std::vector<std::shared_ptr<Recorder>> recorders;
  for (int i = 0; i < 7; ++i) recorders.push_back(Submit(MakeRequest({i}, 500)));
  recorders[0]->AwaitTokens(3);
  pipeline_.EndEpoch(absl::UnavailableError("worker w1 was lost"));
  const absl::Status refused =
      pipeline_.Submit(MakeRequest({1}, 5), std::make_shared<Recorder>()).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("worker w1 was lost"));
  int unavailable = 0;
  for (const auto& recorder : recorders) {
    const absl::Status status = recorder->Wait();
    if (status.ok()) continue;  // it was through already
    EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
    EXPECT_THAT(std::string(status.message()), HasSubstr("worker w1 was lost"));
    ++unavailable;
  }
  EXPECT_GT(unavailable, 0);
  EXPECT_TRUE(stages_.closed());
  EXPECT_FALSE(pipeline_.Stats().serving);

  // The next epoch serves; the old link's frames are dropped and counted.
  FakeStages next(&pipeline_, 2, 6);
  pipeline_.ExpectEpoch(2, Shape(2));
  ASSERT_TRUE(pipeline_.OnLink(6, Hello(2, 2)).ok());
  pipeline_.StartEpoch(2, next.NewSender());
  EXPECT_TRUE(pipeline_.Stats().serving);
  EXPECT_TRUE(Submit(MakeRequest({1}, 50))->Wait().ok());
  const uint64_t dropped = pipeline_.Stats().dropped_frames;
  Frame stale;
  stale.header.set_epoch(1);
  stale.header.mutable_result()->set_step(1);
  pipeline_.OnFrame(kLink, stale, CreditReturn());
  pipeline_.OnFrame(6, stale, CreditReturn());
  EXPECT_EQ(pipeline_.Stats().dropped_frames, dropped + 2);
  stale.header.set_epoch(2);
  stale.header.mutable_result()->set_step(1);  // long since answered
  pipeline_.OnFrame(6, stale, CreditReturn());
  EXPECT_TRUE(Submit(MakeRequest({1}, 50))->Wait().ok());
  EXPECT_EQ(pipeline_.Stats().dropped_frames, dropped + 3);
  pipeline_.Shutdown();
}

TEST_F(PipelineTest, FailsTheEpochWhenItsLinkBreaks) {
  std::vector<uint64_t> failed;
  pipeline_.SetFailureCallback([&](uint64_t epoch, const absl::Status& status) {
    EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
    failed.push_back(epoch);
  });
  Start();
  stages_.Hold();
  const auto recorder = Submit(MakeRequest({1}, 5));
  pipeline_.OnLinkClosed(99, absl::UnavailableError("another link"));
  EXPECT_THAT(failed, IsEmpty());
  pipeline_.OnLinkClosed(kLink, absl::UnavailableError("connection reset"));
  EXPECT_THAT(failed, ElementsAre(1));
  pipeline_.EndEpoch(absl::UnavailableError("worker 'a' was lost"));
  const absl::Status status = recorder->Wait();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(status.message()), HasSubstr("worker 'a' was lost"));
  // Too late for this epoch.
  FakeStages late(&pipeline_);
  pipeline_.StartEpoch(1, late.NewSender());
  EXPECT_TRUE(late.closed());
  EXPECT_FALSE(pipeline_.Stats().serving);
}

TEST_F(PipelineTest, FailsTheEpochOnResultsThatDoNotFit) {
  absl::Notification failed;
  pipeline_.SetFailureCallback([&](uint64_t, const absl::Status& status) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    pipeline_.EndEpoch(status);
    failed.Notify();
  });
  Start();
  stages_.SendWithout(true);
  EXPECT_EQ(Submit(MakeRequest({1}, 5))->Wait().code(), absl::StatusCode::kUnavailable);
  failed.WaitForNotification();
}

TEST_F(PipelineTest, ChecksLinks) {
  constexpr auto kPrecondition = absl::StatusCode::kFailedPrecondition;
  const auto code = [&](const v1::LinkHello& hello) { return pipeline_.OnLink(1, hello).code(); };
  EXPECT_EQ(code(Hello(1, 3)), absl::StatusCode::kUnavailable);
  pipeline_.ExpectEpoch(4, Shape(3));
  EXPECT_EQ(code(Hello(3, 3)), absl::StatusCode::kAborted);
  EXPECT_EQ(code(Hello(5, 3)), absl::StatusCode::kUnavailable);
  EXPECT_EQ(code(Hello(4, 2)), kPrecondition);
  v1::LinkHello hello = Hello(4, 3);
  hello.set_protocol_version(99);
  EXPECT_EQ(code(hello), kPrecondition);
  hello = Hello(4, 3);
  hello.set_model_hash("other");
  EXPECT_EQ(code(hello), kPrecondition);
  hello = Hello(4, 3);
  hello.set_kernel_revision("other");
  EXPECT_EQ(code(hello), kPrecondition);
  hello = Hello(4, 3);
  hello.set_d_model(9);
  EXPECT_EQ(code(hello), kPrecondition);
  EXPECT_EQ(code(Hello(4, 3)), absl::StatusCode::kOk);
  EXPECT_EQ(code(Hello(4, 3)), absl::StatusCode::kAborted);  // there is one already
  pipeline_.EndEpoch(absl::UnavailableError("gone"));
  EXPECT_EQ(code(Hello(4, 3)), absl::StatusCode::kAborted);
}

TEST_F(PipelineTest, ShutsDownWithLiveRequests) {
  Start();
  stages_.Hold();
  std::vector<std::shared_ptr<Recorder>> recorders;
  for (int i = 0; i < 7; ++i) recorders.push_back(Submit(MakeRequest({i}, 50)));
  pipeline_.Shutdown();
  for (const auto& recorder : recorders) {
    EXPECT_TRUE(recorder->ended());
    EXPECT_EQ(recorder->Wait().code(), absl::StatusCode::kUnavailable);
  }
  pipeline_.Shutdown();
  EXPECT_EQ(pipeline_.Submit(MakeRequest({1}, 5), std::make_shared<Recorder>()).status().code(),
            absl::StatusCode::kUnavailable);
}

// Many threads submit, cancel and end epochs at once; every request ends exactly once.
TEST(PipelineStressTest, SurvivesConcurrentUse) {
  Pipeline pipeline(Options());
  std::vector<std::unique_ptr<FakeStages>> epochs;
  std::atomic<bool> done = false;
  std::vector<std::thread> clients;
  std::atomic<int> ended = 0;
  for (int t = 0; t < 4; ++t) {
    clients.emplace_back([&, t] {
      while (!done) {
        auto recorder = std::make_shared<Recorder>();
        const absl::StatusOr<RequestId> id = pipeline.Submit(MakeRequest({t, 5}, 30), recorder);
        if (!id.ok()) {
          std::this_thread::yield();
          continue;
        }
        if (ended % 3 == t % 3) pipeline.Cancel(*id);
        const absl::Status status = recorder->Wait();
        if (status.ok()) {
          EXPECT_EQ(recorder->tokens(), Continuation({t, 5}, 30));
        }
        ++ended;
      }
    });
  }
  for (uint64_t epoch = 1; epoch <= 30; ++epoch) {
    epochs.push_back(std::make_unique<FakeStages>(&pipeline, epoch, 100 + epoch));
    const int stages = static_cast<int>(epoch % 4) + 1;
    pipeline.ExpectEpoch(epoch, Shape(stages));
    EXPECT_TRUE(pipeline.OnLink(100 + epoch, Hello(epoch, stages)).ok());
    pipeline.StartEpoch(epoch, epochs.back()->NewSender());
    absl::SleepFor(absl::Milliseconds(10));
    pipeline.EndEpoch(absl::UnavailableError("again"));
  }
  done = true;
  for (std::thread& client : clients) client.join();
  EXPECT_GT(ended, 30);
  pipeline.Shutdown();
}

// What one token costs beside the stages: a round trip through the loop.
TEST_F(PipelineTest, CostsLittlePerToken) {
  Start(1);
  constexpr int kTokens = 500;
  const auto recorder = Submit(MakeRequest({1}, kTokens));
  EXPECT_TRUE(recorder->Wait().ok());
  const double microseconds = recorder->summary().decode_seconds / (kTokens - 1) * 1e6;
  RecordProperty("microseconds_per_token", std::to_string(microseconds));
  std::printf("%.1f us per token, the fake stage's thread included\n", microseconds);
  EXPECT_LT(microseconds, 5000);  // generous: the machine may be busy
}

}  // namespace
}  // namespace stagecoach
