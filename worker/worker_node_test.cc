// Two workers and a stand-in for the coordinator, in one process over the in-process transport.
#include "worker/worker_node.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "fmt/format.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "model/test_paths.h"
#include "worker/kv_slots.h"
#include "worker/link/in_process_link.h"
#include "worker/picking_backend.h"

namespace stagecoach {
namespace {

constexpr absl::Duration kTimeout = absl::Seconds(60);
constexpr char kCoordinator[] = "coordinator";

// "[INST] What is seven plus eight? [/INST]" and how it goes on; the margins of these choices are
// wide (tests/data/golden).
const std::vector<int32_t> kPrompt = {1,   304, 305,  997, 496, 378, 943,
                                      515, 950, 1001, 364, 305, 997};
const std::vector<int32_t> kStory = {373, 966, 524, 515, 950, 378};

std::shared_ptr<const ModelFile> DemoModel() {
  return ModelFile::Open(TestDataPath("demo-Q4_K_M.gguf")).value();
}

// The results end of the ring.
class Results : public LinkHandler {
 public:
  absl::Status OnLink(uint64_t, const v1::LinkHello& hello) override {
    absl::MutexLock lock(&mu_);
    hello_ = hello;
    return absl::OkStatus();
  }
  void OnFrame(uint64_t, Frame frame, CreditReturn) override {
    absl::MutexLock lock(&mu_);
    frames_.push_back(std::move(frame));
  }
  void OnLinkClosed(uint64_t, const absl::Status&) override {}

  std::optional<Frame> Next() {
    const auto ready = [this] { return !frames_.empty(); };
    absl::MutexLock lock(&mu_);
    if (!mu_.AwaitWithTimeout(absl::Condition(&ready), kTimeout)) return std::nullopt;
    Frame frame = std::move(frames_.front());
    frames_.erase(frames_.begin());
    return frame;
  }
  v1::LinkHello hello() {
    absl::MutexLock lock(&mu_);
    return hello_;
  }

 private:
  absl::Mutex mu_;
  v1::LinkHello hello_;
  std::vector<Frame> frames_;
};

// A status that a callback delivers from another thread.
class Mail {
 public:
  void Put(const absl::Status& status) {
    absl::MutexLock lock(&mu_);
    status_ = status;
  }
  absl::Status Await() {
    const auto arrived = [this] { return status_.has_value(); };
    absl::MutexLock lock(&mu_);
    if (!mu_.AwaitWithTimeout(absl::Condition(&arrived), kTimeout)) {
      return absl::OkStatus();  // nothing came, which no caller expects
    }
    return *status_;
  }

 private:
  absl::Mutex mu_;
  std::optional<absl::Status> status_;
};

class WorkerNodeTest : public testing::Test {
 protected:
  WorkerNodeTest() {
    for (int i = 0; i < 2; ++i) {
      nodes_.push_back(std::make_unique<WorkerNode>(backend_.get(), model_, &hub_,
                                                    WorkerOptions{.name = Address(i)}));
      nodes_.back()->SetFailureCallback([this, i](const v1::AssignmentFailed& failed) {
        failures_[i].Put(absl::Status(static_cast<absl::StatusCode>(failed.status_code()),
                                      fmt::format("{} {}", failed.epoch(), failed.message())));
      });
      hub_.Listen(Address(i), nodes_.back().get());
    }
    hub_.Listen(kCoordinator, &results_);
  }
  ~WorkerNodeTest() override {
    to_first_.reset();
    for (auto& node : nodes_) node->Shutdown();
    for (int i = 0; i < 2; ++i) hub_.StopListening(Address(i));
    hub_.StopListening(kCoordinator);
  }

  static std::string Address(int i) { return fmt::format("w{}", i); }

  v1::Assignment MakeAssignment(uint64_t epoch, int stage, int stages) const {
    const int layers = model_->params().layers;
    v1::Assignment assignment;
    assignment.set_epoch(epoch);
    assignment.set_stage(stage);
    assignment.set_stages(stages);
    assignment.set_first_layer(stage * layers / stages);
    assignment.set_last_layer((stage + 1) * layers / stages);
    assignment.set_next_hop(stage + 1 < stages ? Address(stage + 1) : kCoordinator);
    assignment.set_max_slots(2);
    assignment.set_max_context(64);
    assignment.set_kv_blocks(4);
    assignment.set_max_step_tokens(32);
    return assignment;
  }
  void AssignAll(uint64_t epoch, int stages) {
    for (int i = 0; i < stages; ++i) nodes_[i]->Assign(MakeAssignment(epoch, i, stages));
  }
  v1::LinkHello Hello(uint64_t epoch, int to_stage = 0) const {
    v1::LinkHello hello;
    hello.set_protocol_version(kProtocolVersion);
    hello.set_epoch(epoch);
    hello.set_model_hash(model_->hash());
    hello.set_kernel_revision(backend_->info().kernel_revision);
    hello.set_to_stage(to_stage);
    hello.set_d_model(model_->params().d_model);
    return hello;
  }
  absl::Status DialFirst(const v1::LinkHello& hello, absl::Duration timeout = kTimeout) {
    auto sender = hub_.Dial(Address(0), hello, timeout,
                            [this](const absl::Status& reason) { broken_.Put(reason); });
    if (!sender.ok()) return sender.status();
    to_first_ = *std::move(sender);
    return absl::OkStatus();
  }
  void AwaitLinksReady(int stages) {
    const absl::Time deadline = absl::Now() + kTimeout;
    for (int i = 0; i < stages; ++i) {
      while (!nodes_[i]->Heartbeat().links_ready()) {
        ASSERT_LT(absl::Now(), deadline) << nodes_[i]->Heartbeat().detail();
        absl::SleepFor(absl::Milliseconds(1));
      }
    }
  }
  // The first worker with picks_, alone in epoch 1.
  void UsePickingBackend() {
    hub_.StopListening(Address(0));
    nodes_[0] =
        std::make_unique<WorkerNode>(&picks_, model_, &hub_, WorkerOptions{.name = Address(0)});
    hub_.Listen(Address(0), nodes_[0].get());
    AssignAll(1, 1);
    AwaitLinksReady(1);
    v1::LinkHello hello = Hello(1);
    hello.set_kernel_revision(picks_.info().kernel_revision);
    ASSERT_TRUE(DialFirst(hello).ok());
  }
  void AwaitEnqueued(int steps) const {
    const absl::Time deadline = absl::Now() + kTimeout;
    while (picks_.enqueued < steps) {
      ASSERT_LT(absl::Now(), deadline) << picks_.enqueued << " steps enqueued";
      absl::SleepFor(absl::Milliseconds(1));
    }
  }

  Frame StepOf(uint64_t epoch, uint64_t step, int start, const std::vector<int32_t>& tokens) const {
    Frame frame;
    frame.header.set_epoch(epoch);
    v1::StepHeader& header = *frame.header.mutable_step();
    header.set_step(step);
    if (start == 0) {
      v1::SequenceOpen& open = *header.add_open();
      open.set_slot(1);
      open.set_sequence_id(77);
      open.set_prompt_tokens(static_cast<uint32_t>(tokens.size()));
    }
    v1::SequenceRows& rows = *header.add_rows();
    rows.set_slot(1);
    rows.set_sequence_id(77);
    rows.set_start_position(start);
    rows.set_row_count(static_cast<uint32_t>(tokens.size()));
    rows.set_sample(true);
    const int end = start + static_cast<int>(tokens.size());
    for (int block = KvBlocksFor(start); block < KvBlocksFor(end); ++block) {
      rows.add_new_blocks(block);
    }
    for (int32_t token : tokens) header.add_token_ids(token);
    return frame;
  }

  // Greedy continuation of kPrompt through the pipeline of `epoch`.
  std::vector<int32_t> Generate(uint64_t epoch, size_t count) {
    std::vector<int32_t> generated;
    int position = 0;
    std::vector<int32_t> input = kPrompt;
    for (uint64_t step = 1; generated.size() < count; ++step) {
      const absl::Status sent = to_first_->Send(StepOf(epoch, step, position, input));
      EXPECT_TRUE(sent.ok()) << sent;
      const std::optional<Frame> result = results_.Next();
      if (!result.has_value() || result->header.result().sequences_size() != 1) {
        ADD_FAILURE() << "no result of step " << step;
        return generated;
      }
      EXPECT_EQ(result->header.epoch(), epoch);
      EXPECT_EQ(result->header.result().step(), step);
      position += static_cast<int>(input.size());
      input = {result->header.result().sequences(0).token_id()};
      generated.push_back(input[0]);
    }
    return generated;
  }

  std::shared_ptr<const ModelFile> model_ = DemoModel();
  std::unique_ptr<Backend> backend_ = MakeCpuBackend({.threads = 1});
  PickingBackend picks_;
  InProcessHub hub_;
  Results results_;
  Mail broken_;
  Mail failures_[2];
  std::vector<std::unique_ptr<WorkerNode>> nodes_;
  std::unique_ptr<LinkSender> to_first_;
};

TEST_F(WorkerNodeTest, TwoStagesTellTheStoryAndCountTheirWork) {
  AssignAll(5, 2);
  AwaitLinksReady(2);
  ASSERT_TRUE(DialFirst(Hello(5)).ok());
  EXPECT_EQ(Generate(5, kStory.size()), kStory);
  EXPECT_EQ(results_.hello().to_stage(), 2u);
  EXPECT_EQ(results_.hello().epoch(), 5u);
  for (const auto& node : nodes_) {
    const v1::WorkerHeartbeat heartbeat = node->Heartbeat();
    EXPECT_EQ(heartbeat.epoch(), 5u);
    EXPECT_EQ(heartbeat.steps(), kStory.size());
    EXPECT_EQ(heartbeat.tokens(), kPrompt.size() + kStory.size() - 1);
    EXPECT_GT(heartbeat.compute_seconds(), 0);
    EXPECT_GT(heartbeat.wait_seconds(), 0);
    EXPECT_EQ(heartbeat.units_size(), 17);  // 16 layers, and embedding or head
    EXPECT_EQ(heartbeat.detail(), "");
    EXPECT_EQ(heartbeat.dropped_frames(), 0u);
  }
}

TEST_F(WorkerNodeTest, AStepGoesOutBehindOneThatHasNotEnded) {
  UsePickingBackend();
  picks_.ready = false;
  ASSERT_TRUE(to_first_->Send(StepOf(1, 1, 0, {7})).ok());
  Frame ahead = StepOf(1, 2, 1, {0});
  ahead.header.mutable_step()->mutable_rows(0)->set_ahead(true);
  ASSERT_TRUE(to_first_->Send(std::move(ahead)).ok());
  AwaitEnqueued(2);
  picks_.ready = true;
  for (int step = 1; step <= 2; ++step) {
    const std::optional<Frame> result = results_.Next();
    ASSERT_TRUE(result.has_value());
    EXPECT_EQ(result->header.result().step(), static_cast<uint64_t>(step));
    EXPECT_EQ(result->header.result().sequences(0).token_id(), 7 + 32 * step);
  }
  const v1::WorkerHeartbeat heartbeat = nodes_[0]->Heartbeat();
  EXPECT_EQ(heartbeat.steps(), 2u);
  EXPECT_EQ(heartbeat.tokens(), 2u);
}

TEST_F(WorkerNodeTest, AnEpochEndsWhileAStepHasNot) {
  UsePickingBackend();
  picks_.ready = false;
  ASSERT_TRUE(to_first_->Send(StepOf(1, 1, 0, {7})).ok());
  AwaitEnqueued(1);
  AssignAll(2, 1);
  AwaitLinksReady(1);
  EXPECT_EQ(nodes_[0]->Heartbeat().epoch(), 2u);
}

TEST_F(WorkerNodeTest, AWeightBudgetShowsInTheHeartbeatAndChangesNoToken) {
  hub_.StopListening(Address(0));
  nodes_[0] =
      std::make_unique<WorkerNode>(backend_.get(), model_, &hub_,
                                   WorkerOptions{.name = Address(0),
                                                 .store = {.weight_budget_percent = 50,
                                                           .host_cache_bytes = 1 << 30,
                                                           .host_cache_codec = HostCodec::kLz4}});
  hub_.Listen(Address(0), nodes_[0].get());
  AssignAll(1, 1);
  AwaitLinksReady(1);
  ASSERT_TRUE(DialFirst(Hello(1)).ok());
  EXPECT_EQ(Generate(1, kStory.size()), kStory);
  const v1::WorkerHeartbeat heartbeat = nodes_[0]->Heartbeat();
  ASSERT_EQ(heartbeat.units_size(), 34);
  ASSERT_EQ(heartbeat.fixed_size(), 34);
  const v1::WeightStatus& weights = heartbeat.weights();
  EXPECT_TRUE(weights.streaming());
  EXPECT_TRUE(weights.host_tier());
  EXPECT_GT(weights.budget_bytes(), 0u);
  EXPECT_LE(weights.peak_resident_bytes(), weights.budget_bytes());
  EXPECT_GT(weights.resident_bytes(), 0u);
  EXPECT_EQ(weights.fixed_units(),
            std::count(heartbeat.fixed().begin(), heartbeat.fixed().end(), true));
  EXPECT_LT(weights.fixed_units(), 34u);
  EXPECT_GE(weights.window_units(), 2u);
  EXPECT_GE(weights.distance(), 1u);
  EXPECT_GT(weights.evictions(), kStory.size());
  EXPECT_GT(weights.file_read_bytes(), 0u);
  EXPECT_GT(weights.file_seconds(), 0);
  EXPECT_GT(weights.convert_seconds(), 0);
  EXPECT_GT(weights.host_hits(), 0u);
  EXPECT_GT(weights.host_read_bytes(), 0u);
  EXPECT_EQ(weights.host_seconds(), 0);  // nothing of this model is worth compressing
  EXPECT_GT(weights.host_bytes(), 0u);
  EXPECT_GE(weights.host_raw_bytes(), weights.host_bytes());
  EXPECT_EQ(
      heartbeat.prefetch_hits() + heartbeat.prefetch_late_hits() + heartbeat.prefetch_misses(),
      34 * kStory.size());
}

TEST_F(WorkerNodeTest, ReassignmentMidRunKeepsWeightsAndGivesTheSameTokens) {
  AssignAll(1, 2);
  AwaitLinksReady(2);
  ASSERT_TRUE(DialFirst(Hello(1)).ok());
  EXPECT_EQ(Generate(1, 2), std::vector<int32_t>(kStory.begin(), kStory.begin() + 2));
  const uint64_t loaded = nodes_[0]->Heartbeat().loaded_bytes();

  AssignAll(2, 2);
  EXPECT_EQ(broken_.Await().code(), absl::StatusCode::kAborted);
  EXPECT_EQ(to_first_->Send(StepOf(1, 3, static_cast<int>(kPrompt.size()) + 1, {5})).code(),
            absl::StatusCode::kUnavailable);
  AwaitLinksReady(2);
  ASSERT_TRUE(DialFirst(Hello(2)).ok());
  EXPECT_EQ(Generate(2, kStory.size()), kStory);  // KV and step numbers begin anew
  EXPECT_EQ(nodes_[0]->Heartbeat().loaded_bytes(), loaded);

  AssignAll(3, 1);  // another split: one stage has all layers
  AwaitLinksReady(1);
  ASSERT_TRUE(DialFirst(Hello(3)).ok());
  EXPECT_EQ(Generate(3, kStory.size()), kStory);
}

TEST_F(WorkerNodeTest, OlderAndEqualAssignmentsAreIgnored) {
  AssignAll(4, 1);
  AwaitLinksReady(1);
  ASSERT_TRUE(DialFirst(Hello(4)).ok());
  nodes_[0]->Assign(MakeAssignment(4, 0, 2));
  nodes_[0]->Assign(MakeAssignment(3, 0, 2));
  v1::Release old;
  old.set_epoch(3);
  nodes_[0]->Release(old);
  EXPECT_EQ(nodes_[0]->Heartbeat().epoch(), 4u);
  EXPECT_EQ(Generate(4, 2), std::vector<int32_t>(kStory.begin(), kStory.begin() + 2));
}

TEST_F(WorkerNodeTest, StrangersAreRefused) {
  const auto code = [this](const v1::LinkHello& hello) {
    return DialFirst(hello, absl::Milliseconds(20)).code();
  };
  EXPECT_EQ(code(Hello(7)), absl::StatusCode::kDeadlineExceeded);  // not assigned yet: retried
  AssignAll(7, 1);
  AwaitLinksReady(1);
  EXPECT_EQ(code(Hello(6)), absl::StatusCode::kAborted);
  EXPECT_EQ(code(Hello(8)), absl::StatusCode::kDeadlineExceeded);  // future: retried
  v1::LinkHello hello = Hello(7);
  hello.set_protocol_version(kProtocolVersion + 1);
  EXPECT_EQ(code(hello), absl::StatusCode::kFailedPrecondition);
  hello = Hello(7);
  hello.set_model_hash("another");
  EXPECT_EQ(code(hello), absl::StatusCode::kFailedPrecondition);
  hello = Hello(7);
  hello.set_kernel_revision("another");
  EXPECT_EQ(code(hello), absl::StatusCode::kFailedPrecondition);
  hello = Hello(7);
  hello.set_d_model(512);
  EXPECT_EQ(code(hello), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(code(Hello(7, 1)), absl::StatusCode::kFailedPrecondition);  // to another stage
  EXPECT_EQ(code(Hello(7)), absl::StatusCode::kOk);
}

TEST_F(WorkerNodeTest, ANewerLinkReplacesTheOlder) {
  AssignAll(1, 1);
  AwaitLinksReady(1);
  ASSERT_TRUE(DialFirst(Hello(1)).ok());
  const std::unique_ptr<LinkSender> older = std::move(to_first_);
  ASSERT_TRUE(DialFirst(Hello(1)).ok());
  EXPECT_EQ(broken_.Await().code(), absl::StatusCode::kAborted);
  EXPECT_FALSE(older->Send(StepOf(1, 1, 0, kPrompt)).ok());
  EXPECT_EQ(Generate(1, 1), std::vector<int32_t>{kStory[0]});
}

TEST_F(WorkerNodeTest, FramesOfAnotherEpochAreDroppedAndCounted) {
  AssignAll(9, 1);
  AwaitLinksReady(1);
  ASSERT_TRUE(DialFirst(Hello(9)).ok());
  ASSERT_TRUE(to_first_->Send(StepOf(8, 1, 0, kPrompt)).ok());
  EXPECT_EQ(Generate(9, 1), std::vector<int32_t>{kStory[0]});
  EXPECT_EQ(nodes_[0]->Heartbeat().dropped_frames(), 1u);
}

TEST_F(WorkerNodeTest, AContractViolationBreaksTheLinkBackToTheCoordinator) {
  AssignAll(1, 2);
  AwaitLinksReady(2);
  ASSERT_TRUE(DialFirst(Hello(1)).ok());
  ASSERT_TRUE(to_first_->Send(StepOf(1, 2, 0, kPrompt)).ok());  // step 1 was skipped
  EXPECT_EQ(broken_.Await().code(), absl::StatusCode::kOutOfRange);
  EXPECT_NE(nodes_[0]->Heartbeat().detail(), "");
  EXPECT_FALSE(nodes_[0]->Heartbeat().links_ready());
}

TEST_F(WorkerNodeTest, ALostNextHopTravelsUpstreamAndIsReported) {
  AssignAll(1, 2);
  AwaitLinksReady(2);
  ASSERT_TRUE(DialFirst(Hello(1)).ok());
  EXPECT_EQ(Generate(1, 1), std::vector<int32_t>{kStory[0]});
  nodes_[1]->Shutdown();
  EXPECT_EQ(broken_.Await().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(failures_[0].Await().code(), absl::StatusCode::kUnavailable);
  EXPECT_FALSE(nodes_[0]->Heartbeat().links_ready());
}

TEST_F(WorkerNodeTest, AnImpossibleAssignmentIsReportedOnce) {
  v1::Assignment assignment = MakeAssignment(3, 0, 1);
  assignment.set_last_layer(1000);
  nodes_[0]->Assign(assignment);
  EXPECT_EQ(failures_[0].Await().code(), absl::StatusCode::kInvalidArgument);
  assignment = MakeAssignment(4, 0, 1);
  assignment.set_kv_blocks(UINT32_MAX);
  nodes_[1]->Assign(assignment);
  EXPECT_EQ(failures_[1].Await().code(), absl::StatusCode::kResourceExhausted);
}

TEST_F(WorkerNodeTest, ReleaseFreesWeightsAndLosingTheCoordinatorKeepsThem) {
  AssignAll(1, 1);
  AwaitLinksReady(1);
  ASSERT_TRUE(DialFirst(Hello(1)).ok());
  nodes_[0]->LoseCoordinator();
  EXPECT_EQ(broken_.Await().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(nodes_[0]->Heartbeat().units_size(), 34);
  EXPECT_FALSE(nodes_[0]->Heartbeat().links_ready());
  AssignAll(2, 1);
  v1::Release release;
  release.set_epoch(2);
  nodes_[0]->Release(release);
  EXPECT_EQ(nodes_[0]->Heartbeat().units_size(), 0);
  EXPECT_EQ(nodes_[0]->Heartbeat().epoch(), 2u);
}

TEST_F(WorkerNodeTest, EpochsInQuickSuccessionLeaveTheLastOne) {
  constexpr uint64_t kEpochs = 50;
  for (uint64_t epoch = 1; epoch <= kEpochs; ++epoch) AssignAll(epoch, 1 + epoch % 2);
  AssignAll(kEpochs + 1, 2);
  AwaitLinksReady(2);
  ASSERT_TRUE(DialFirst(Hello(kEpochs + 1)).ok());
  EXPECT_EQ(Generate(kEpochs + 1, 2), std::vector<int32_t>(kStory.begin(), kStory.begin() + 2));
}

}  // namespace
}  // namespace stagecoach
