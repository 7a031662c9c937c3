// The whole pipeline in one process: coordinator's pipeline, real stages on the CPU backend, links
// in memory.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "coordinator/pipeline.h"
#include "coordinator/planner.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/stage_chain.h"
#include "worker/hooked_file.h"
#include "worker/link/in_process_link.h"
#include "worker/worker_node.h"

namespace stagecoach {
namespace {

// Under this margin between the two best tokens another correct implementation may choose the
// other.
constexpr double kDecisiveMargin = 0.25;
constexpr int kMaxStepTokens = 64;

struct Golden {
  TokenList prompt, continuation;
  std::vector<double> margin;
};

const std::vector<Golden>& GreedyGoldens() {
  static const std::vector<Golden> goldens = [] {
    std::vector<Golden> result;
    const std::string text = ReadTestFile(TestDataPath("golden/demo-Q4_K_M.greedy.jsonl"));
    for (size_t at = 0; at < text.size();) {
      const size_t end = std::min(text.find('\n', at), text.size());
      if (end > at) {
        const nlohmann::json line = nlohmann::json::parse(text.substr(at, end - at));
        result.push_back({line["prompt_tokens"], line["continuation"], line["margin"]});
      }
      at = end + 1;
    }
    return result;
  }();
  return goldens;
}

class Recorder : public RequestObserver {
 public:
  void OnToken(uint32_t index, const SampledToken& token) override {
    absl::MutexLock lock(&mu_);
    EXPECT_EQ(index, tokens.size());
    tokens.push_back(token.token_id);
    logprobs.push_back(token.logprob);
    some_.Signal();
  }
  void OnScores(uint32_t, std::span<const float> scores, std::span<const float> values) override {
    logprobs.insert(logprobs.end(), scores.begin(), scores.end());
    logits.insert(logits.end(), values.begin(), values.end());
  }
  void OnEnd(const absl::Status& status, const RequestSummary&) override {
    status_ = status;
    end_.Notify();
  }
  absl::Status Wait() {
    EXPECT_TRUE(end_.WaitForNotificationWithTimeout(absl::Seconds(100)));
    return status_;
  }
  void AwaitTokens(size_t count) {
    absl::MutexLock lock(&mu_);
    while (tokens.size() < count) some_.Wait(&mu_);
  }
  // To be read after Wait().
  TokenList tokens;
  std::vector<float> logprobs, logits;

 private:
  absl::Mutex mu_;
  absl::CondVar some_;
  absl::Status status_;
  absl::Notification end_;
};

// A coordinator's pipeline and worker nodes around it.
class Ring {
 public:
  // Reads of the model go through `hook`, if there is one.
  explicit Ring(int workers, LayerStoreOptions store = {}, std::shared_ptr<ReadHook> hook = nullptr)
      : backend_(MakeCpuBackend({.threads = 1})) {
    auto model = hook != nullptr ? OpenHookedModel("demo-Q4_K_M.gguf", std::move(hook))
                                 : ModelFile::Open(TestDataPath("demo-Q4_K_M.gguf"));
    EXPECT_TRUE(model.ok()) << model.status();
    model_ = *model;
    pipeline_ = std::make_unique<Pipeline>(
        PipelineOptions{.model_hash = model_->hash(),
                        .kernel_revision = backend_->info().kernel_revision,
                        .d_model = model_->params().d_model,
                        .vocab_size = model_->params().vocab_size,
                        .max_slots = 8,
                        .max_context = 512,
                        .max_step_tokens = kMaxStepTokens});
    hub_.Listen("coordinator", pipeline_.get());
    for (int w = 0; w < workers; ++w) {
      const std::string name = "w" + std::to_string(w);
      nodes_.push_back(std::make_unique<WorkerNode>(backend_.get(), model_, &hub_,
                                                    WorkerOptions{.name = name, .store = store}));
      hub_.Listen(name, nodes_.back().get());
    }
  }

  ~Ring() {
    pipeline_->Shutdown();
    for (size_t w = 0; w < nodes_.size(); ++w) Kill(static_cast<int>(w));
    hub_.StopListening("coordinator");
  }

  void Kill(int worker) {
    if (!nodes_[worker]) return;
    hub_.StopListening("w" + std::to_string(worker));
    nodes_[worker]->Shutdown();
    nodes_[worker].reset();
  }

  // Forms a ring of `workers` in this order and starts stepping.
  void Start(uint64_t epoch, const std::vector<int>& workers) {
    std::vector<WorkerCapacity> capacities;
    for (int w : workers) capacities.push_back({"w" + std::to_string(w), 1 << 30});
    const absl::StatusOr<Plan> plan = MakePlan(*model_, capacities, {8, 512, kMaxStepTokens});
    ASSERT_TRUE(plan.ok()) << plan.status();
    const int stages = static_cast<int>(workers.size());
    pipeline_->ExpectEpoch(epoch, stages);
    for (int stage = 0; stage < stages; ++stage) {
      v1::Assignment assignment;
      assignment.set_epoch(epoch);
      assignment.set_stage(stage);
      assignment.set_stages(stages);
      assignment.set_first_layer(plan->stages[stage].first_layer);
      assignment.set_last_layer(plan->stages[stage].last_layer);
      assignment.set_next_hop(stage + 1 < stages ? plan->stages[stage + 1].worker : "coordinator");
      assignment.set_max_slots(8);
      assignment.set_max_context(512);
      assignment.set_max_step_tokens(kMaxStepTokens);
      nodes_[workers[stage]]->Assign(assignment);
    }
    const absl::Time limit = absl::Now() + absl::Seconds(60);
    for (int w : workers) {
      while (!nodes_[w]->Heartbeat().links_ready()) {
        ASSERT_LT(absl::Now(), limit) << "worker " << w << " is not linked";
        absl::SleepFor(absl::Milliseconds(2));
      }
    }
    v1::LinkHello hello;
    hello.set_protocol_version(kProtocolVersion);
    hello.set_epoch(epoch);
    hello.set_model_hash(model_->hash());
    hello.set_kernel_revision(backend_->info().kernel_revision);
    hello.set_to_stage(0);
    hello.set_d_model(model_->params().d_model);
    // The pipeline hears of a loss from its own two links.
    auto sender =
        hub_.Dial(plan->stages[0].worker, hello, absl::Seconds(10), [](const absl::Status&) {});
    ASSERT_TRUE(sender.ok()) << sender.status();
    pipeline_->StartEpoch(epoch, *std::move(sender));
  }

  std::shared_ptr<Recorder> Submit(Request request) {
    auto recorder = std::make_shared<Recorder>();
    const absl::StatusOr<RequestId> id = pipeline_->Submit(std::move(request), recorder);
    EXPECT_TRUE(id.ok()) << id.status();
    return recorder;
  }

  Pipeline& pipeline() { return *pipeline_; }
  const ModelFile& model() const { return *model_; }
  v1::WorkerHeartbeat Heartbeat(int worker) const { return nodes_[worker]->Heartbeat(); }

 private:
  std::unique_ptr<Backend> backend_;
  std::shared_ptr<const ModelFile> model_;
  InProcessHub hub_;
  std::unique_ptr<Pipeline> pipeline_;
  std::vector<std::unique_ptr<WorkerNode>> nodes_;
};

std::vector<int> FirstWorkers(int count) {
  std::vector<int> workers;
  for (int w = 0; w < count; ++w) workers.push_back(w);
  return workers;
}

Request GreedyRequest(const Golden& golden) {
  Request request;
  request.prompt = golden.prompt;
  request.max_tokens = static_cast<int>(golden.continuation.size());
  return request;
}

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

// Tokens and the bits of their log-probabilities.
struct Answer {
  TokenList tokens;
  std::vector<float> logprobs;
  friend bool operator==(const Answer&, const Answer&) = default;
};

Request SampledRequest(const Golden& golden, uint64_t seed) {
  Request request = GreedyRequest(golden);
  request.max_tokens = 60;
  request.sampling = {.temperature = 1.0f, .top_k = 40, .seed = seed, .logprobs = 1};
  return request;
}

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
  ASSERT_NO_FATAL_FAILURE(ring.Start(1, {0, 1}));
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
}

}  // namespace
}  // namespace stagecoach
