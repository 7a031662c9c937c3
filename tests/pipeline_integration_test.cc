// The whole pipeline in one process: see pipeline_ring.h.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <iostream>
#include <memory>
#include <vector>

#include "tests/pipeline_ring.h"

namespace stagecoach {
namespace {

class PipelineIntegrationTest : public testing::TestWithParam<int> {};

TEST_P(PipelineIntegrationTest, ContinuesGreedilyAsTheGoldensDo) {
  Ring ring(GetParam());
  ASSERT_NO_FATAL_FAILURE(ring.Start(1, FirstWorkers(GetParam())));
  std::vector<std::shared_ptr<Recorder>> recorders;
  for (const Golden& golden : GreedyGoldens()) {
    recorders.push_back(ring.Submit(GreedyRequest(golden)));
  }
  int same = 0;
  for (size_t i = 0; i < recorders.size(); ++i) {
    const Golden& golden = GreedyGoldens()[i];
    ASSERT_TRUE(recorders[i]->Wait().ok());
    const TokenList& tokens = recorders[i]->tokens;
    ASSERT_EQ(tokens.size(), golden.continuation.size());
    for (size_t t = 0; t < tokens.size(); ++t) {
      if (tokens[t] != golden.continuation[t]) {
        EXPECT_LT(golden.margin[t], kDecisiveMargin) << "request " << i << ", token " << t;
        break;  // from here on it is another text
      }
      ++same;
    }
  }
  EXPECT_GT(same, 100);
}

TEST_P(PipelineIntegrationTest, ScoresChooseAsTheGoldensDo) {
  Ring ring(GetParam());
  ASSERT_NO_FATAL_FAILURE(ring.Start(1, FirstWorkers(GetParam())));
  std::vector<std::shared_ptr<Recorder>> recorders;
  for (const Golden& golden : GreedyGoldens()) {
    Request request;
    request.prompt = golden.prompt;
    request.prompt.insert(request.prompt.end(), golden.continuation.begin(),
                          golden.continuation.end());
    request.score = request.return_logits = true;
    recorders.push_back(ring.Submit(std::move(request)));
  }
  int compared = 0;
  for (size_t i = 0; i < recorders.size(); ++i) {
    const Golden& golden = GreedyGoldens()[i];
    ASSERT_TRUE(recorders[i]->Wait().ok());
    const std::vector<float>& logits = recorders[i]->logits;
    const size_t rows = golden.prompt.size() + golden.continuation.size();
    ASSERT_EQ(recorders[i]->logprobs.size(), rows - 1);
    const size_t vocab = logits.size() / rows;
    ASSERT_EQ(logits.size(), rows * vocab);
    for (size_t t = 0; t < golden.continuation.size(); ++t) {
      if (golden.margin[t] < kDecisiveMargin) continue;
      const auto row = logits.begin() + (golden.prompt.size() + t - 1) * vocab;
      EXPECT_EQ(std::max_element(row, row + vocab) - row, golden.continuation[t])
          << "request " << i << ", token " << t;
      ++compared;
    }
  }
  EXPECT_GT(compared, 500);
}

INSTANTIATE_TEST_SUITE_P(Stages, PipelineIntegrationTest, testing::Values(1, 2, 4, 32));

TEST(PipelineRingTest, AnswersDoNotDependOnCompanyOrStages) {
  std::vector<Answer> alone;
  {
    Ring ring(1);
    ASSERT_NO_FATAL_FAILURE(ring.Start(1, {0}));
    for (size_t i = 0; i < GreedyGoldens().size(); ++i) {
      const auto recorder = ring.Submit(SampledRequest(GreedyGoldens()[i], i));
      ASSERT_TRUE(recorder->Wait().ok());
      alone.push_back({recorder->tokens, recorder->logprobs});
    }
  }
  Ring ring(4);
  ASSERT_NO_FATAL_FAILURE(ring.Start(1, {3, 1, 0, 2}));
  std::vector<std::shared_ptr<Recorder>> recorders;
  for (size_t i = 0; i < GreedyGoldens().size(); ++i) {
    recorders.push_back(ring.Submit(SampledRequest(GreedyGoldens()[i], i)));
  }
  for (size_t i = 0; i < recorders.size(); ++i) {
    ASSERT_TRUE(recorders[i]->Wait().ok());
    EXPECT_EQ((Answer{recorders[i]->tokens, recorders[i]->logprobs}), alone[i]) << "request " << i;
  }
}

TEST(PipelineRingTest, ALostWorkerEndsTheStreamsAndTheNextEpochGoesOn) {
  Ring ring(3);
  absl::Notification failed;
  ring.pipeline().SetFailureCallback([&](uint64_t epoch, const absl::Status& reason) {
    ring.pipeline().EndEpoch(reason);
    if (epoch == 1 && !failed.HasBeenNotified()) failed.Notify();
  });
  ASSERT_NO_FATAL_FAILURE(ring.Start(1, {0, 1, 2}));
  Request request = GreedyRequest(GreedyGoldens()[0]);
  const auto before = ring.Submit(request);
  ASSERT_TRUE(before->Wait().ok());
  request.max_tokens = 400;
  std::vector<std::shared_ptr<Recorder>> recorders;
  for (int i = 0; i < 5; ++i) recorders.push_back(ring.Submit(request));
  recorders[0]->AwaitTokens(5);
  ring.Kill(2);  // the last stage: its link to the pipeline breaks
  ASSERT_TRUE(failed.WaitForNotificationWithTimeout(absl::Seconds(20)));
  for (const auto& recorder : recorders) {
    EXPECT_EQ(recorder->Wait().code(), absl::StatusCode::kUnavailable);
    EXPECT_LT(recorder->tokens.size(), 400u);
  }
  ASSERT_NO_FATAL_FAILURE(ring.Start(2, {0, 1}));
  const auto after = ring.Submit(GreedyRequest(GreedyGoldens()[0]));
  ASSERT_TRUE(after->Wait().ok());
  EXPECT_EQ(after->tokens, before->tokens);
}

struct StreamedRun {
  std::vector<TokenList> tokens;
  uint64_t passes = 0;  // of each stage over its layers
};

// Four sequences through two stages that hold three quarters of their weights.
StreamedRun RunStreamed(bool scheduler_knows) {
  StreamedRun run;
  Ring ring(2, {.weight_budget_percent = 75});
  ring.Start(1, {0, 1});
  EXPECT_TRUE(ring.Heartbeat(0).weights().streaming() && ring.Heartbeat(1).weights().streaming());
  ring.pipeline().SetStreaming(scheduler_knows);
  std::vector<std::shared_ptr<Recorder>> recorders;
  for (int i = 0; i < 4; ++i) {
    recorders.push_back(ring.Submit(SampledRequest(GreedyGoldens()[i], i)));
  }
  for (const auto& recorder : recorders) {
    EXPECT_TRUE(recorder->Wait().ok());
    run.tokens.push_back(recorder->tokens);
  }
  run.passes = ring.Heartbeat(0).steps();
  return run;
}

TEST(PipelineRingTest, FourSequencesShareThePassesOverStreamedWeights) {
  const StreamedRun spread = RunStreamed(false), together = RunStreamed(true);
  EXPECT_EQ(together.tokens, spread.tokens);
  EXPECT_LT(together.passes, spread.passes * 2 / 3);
  std::cout << spread.passes << " passes, " << together.passes << " with streaming known\n";
}

// A disk that answers nothing while layer 20 is read.
TEST(PipelineRingTest, AStalledReadIsNamedAndHoldsUpNeitherHeartbeatsNorCancellation) {
  const auto hook = std::make_shared<ReadHook>();
  const auto answer = std::make_shared<absl::Notification>();
  Ring ring(2, {}, hook);
  const TensorInfo tensor =
      *ring.model().UnitTensors({.kind = Unit::Kind::kLayer, .layer = 20})[0].tensor;
  hook->Set([=](const RandomAccessFile& file, uint64_t offset, std::span<std::byte> out) {
    const bool hit = offset < tensor.offset + tensor.bytes && tensor.offset < offset + out.size();
    if (hit) answer->WaitForNotification();
    return file.ReadSome(offset, out);
  });
  ASSERT_NO_FATAL_FAILURE(ring.Start(1, {0, 1}));
  const auto recorder = std::make_shared<Recorder>();
  const auto id = ring.pipeline().Submit(GreedyRequest(GreedyGoldens()[0]), recorder);
  ASSERT_TRUE(id.ok()) << id.status();
  const absl::Time start = absl::Now();
  v1::WorkerHeartbeat heartbeat;
  while (!heartbeat.stalled() && absl::Now() - start < absl::Seconds(2)) {
    const absl::Time asked = absl::Now();
    heartbeat = ring.Heartbeat(1);
    EXPECT_LT(absl::Now() - asked, absl::Milliseconds(200));
    absl::SleepFor(absl::Milliseconds(20));
  }
  EXPECT_TRUE(heartbeat.stalled());
  EXPECT_TRUE(heartbeat.links_ready());
  EXPECT_THAT(heartbeat.detail(), testing::HasSubstr("waiting for layer 20: read of"));
  EXPECT_FALSE(ring.Heartbeat(0).stalled());
  const absl::Time cancelled = absl::Now();
  ring.pipeline().Cancel(*id);
  EXPECT_EQ(recorder->Wait().code(), absl::StatusCode::kCancelled);
  EXPECT_LT(absl::Now() - cancelled, absl::Seconds(1));

  answer->Notify();
  const auto next = ring.Submit(GreedyRequest(GreedyGoldens()[1]));
  EXPECT_TRUE(next->Wait().ok());
  EXPECT_EQ(ring.Heartbeat(1).detail(), "");
}

// Free slots are reused many times over, with cancellations in between.
TEST(PipelineRingTest, CancelledSequencesLeaveNoTrace) {
  Ring ring(2);
  ASSERT_NO_FATAL_FAILURE(ring.Start(1, {0, 1}, /*kv_blocks=*/20));
  const auto first = ring.Submit(GreedyRequest(GreedyGoldens()[1]));
  ASSERT_TRUE(first->Wait().ok());
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < 8; ++i) {
      Request request = GreedyRequest(GreedyGoldens()[(round + i) % GreedyGoldens().size()]);
      const auto recorder = std::make_shared<Recorder>();
      const absl::StatusOr<RequestId> id = ring.pipeline().Submit(std::move(request), recorder);
      ASSERT_TRUE(id.ok()) << id.status();
      if (i % 2 == 0) recorder->AwaitTokens(1);
      ring.pipeline().Cancel(*id);
    }
    const auto again = ring.Submit(GreedyRequest(GreedyGoldens()[1]));
    ASSERT_TRUE(again->Wait().ok());
    EXPECT_EQ(again->tokens, first->tokens);
  }
  EXPECT_TRUE(ring.AllBlocksBack());
}

}  // namespace
}  // namespace stagecoach
