#include "coordinator/registry.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "coordinator/limits.h"
#include "coordinator/registry_fixture.h"

namespace stagecoach {
namespace {

using std::chrono::milliseconds;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

TEST_F(RegistryTest, PlansOnceAllHaveJoined) {
  Make(2);
  EXPECT_EQ(Detail(), "waiting for workers: 0 of 2 joined; no stage serves layers 0-31");
  const StreamId b = Join("b");
  EXPECT_EQ(Detail(), "waiting for workers: 1 of 2 joined; no stage serves layers 0-31");
  EXPECT_THAT(assigned_, IsEmpty());
  const StreamId a = Join("a");
  EXPECT_EQ(welcomes_, 2);
  ASSERT_EQ(assigned_.size(), 2u);
  EXPECT_EQ(expected_, 1u);
  EXPECT_EQ(assigned_[a].stage(), 0u);  // by name, not by who came first
  EXPECT_EQ(assigned_[a].last_layer(), 16u);
  EXPECT_EQ(assigned_[a].next_hop(), "b.host:1");
  EXPECT_EQ(assigned_[b].stage(), 1u);
  EXPECT_EQ(assigned_[b].stages(), 2u);
  EXPECT_EQ(assigned_[b].first_layer(), 16u);
  EXPECT_EQ(assigned_[b].last_layer(), 32u);
  EXPECT_EQ(assigned_[b].next_hop(), "coordinator:1");
  EXPECT_EQ(assigned_[b].max_slots(), 4u);
  EXPECT_EQ(assigned_[b].max_context(), 128u);
  EXPECT_EQ(assigned_[b].max_step_tokens(), uint32_t{kStepTokens});
  EXPECT_EQ(assigned_[b].kv_blocks(), uint32_t{kKvBlocks});
  EXPECT_EQ(assigned_[b].kv_type(), v1::KV_TYPE_Q8_0);
}

TEST_F(RegistryTest, NotPlannedBeforeTheFirstHeartbeat) {
  Make(1);
  const StreamId a = Greet(Hello("a"));
  EXPECT_THAT(assigned_, IsEmpty());
  Beat(a, 0, false);
  EXPECT_EQ(assigned_[a].epoch(), 1u);
}

TEST_F(RegistryTest, ServesOnceAllLinksAreReadyAndStageZeroIsDialled) {
  Make(2);
  const StreamId a = Join("a");
  const StreamId b = Join("b");
  Beat(a, 1, true);
  EXPECT_THAT(Detail(), HasSubstr("waiting for worker 'b' (layers 16-31)"));
  Beat(b, 1, false);
  Beat(b, 0, true);  // of no epoch: does not count
  EXPECT_THAT(dialled_, IsEmpty());
  Beat(b, 1, true);
  EXPECT_THAT(dialled_, ElementsAre("a.host:1"));
  EXPECT_FALSE(registry_->Readiness().ok());
  registry_->Dialled(7);  // of another epoch
  EXPECT_FALSE(registry_->Readiness().ok());
  registry_->Dialled(1);
  EXPECT_TRUE(registry_->Readiness().ok());
  EXPECT_THAT(ended_, IsEmpty());
}

TEST_F(RegistryTest, KnowsWhetherAStageStreams) {
  Make(2);
  const StreamId a = Join("a"), b = Join("b");
  Serve({a, b});
  EXPECT_FALSE(registry_->streaming());
  v1::WorkerMessage message = Heartbeat(1, true);
  message.mutable_heartbeat()->mutable_weights()->set_streaming(true);
  registry_->Received(b, message, now_);
  EXPECT_TRUE(registry_->streaming());
  Beat(b, 1, true);
  EXPECT_FALSE(registry_->streaming());
}

TEST_F(RegistryTest, EndOfTheStreamLosesTheWorkerAndARestartFillsTheHole) {
  Make(3);
  const StreamId a = Join("a"), b = Join("b"), c = Join("c");
  Serve({a, b, c});
  Close(b);
  ASSERT_EQ(ended_.size(), 1u);
  EXPECT_EQ(ended_[0],
            "stage 1 was lost: worker 'b' (layers 10-20): its control stream ended: reset");
  EXPECT_EQ(Detail(),
            "waiting for workers: 2 of 3 joined; no stage serves layers 10-20 (stage 1, "
            "worker 'b')");
  const StreamId b2 = Join("b");
  EXPECT_EQ(assigned_[a].epoch(), 2u);
  EXPECT_EQ(assigned_[b2].epoch(), 2u);
  EXPECT_EQ(assigned_[b2].stage(), 1u);
  EXPECT_EQ(assigned_[a].stage(), 0u);
  EXPECT_EQ(assigned_[c].stage(), 2u);
  EXPECT_EQ(plans_, 1);  // the ranges stay as they are
  Serve({a, b2, c});
}

TEST_F(RegistryTest, AnotherNameTakesTheHoleAndOthersStay) {
  Make(2);
  const StreamId a = Join("m"), b = Join("n");
  Serve({a, b});
  Close(a);
  const StreamId z = Join("z");
  EXPECT_EQ(assigned_[z].stage(), 0u);
  EXPECT_EQ(assigned_[b].stage(), 1u);
  EXPECT_EQ(assigned_[b].first_layer(), 16u);
}

TEST_F(RegistryTest, SmallerReplacementIsPlannedAnew) {
  Make(2);
  const StreamId a = Join("a"), b = Join("b");
  Serve({a, b});
  Close(b);
  v1::WorkerHello small = Hello("b");
  small.set_memory_bytes(kMemory / 2);
  Join(small);
  EXPECT_EQ(plans_, 2);
  EXPECT_EQ(registry_->epoch(), 2u);
}

TEST_F(RegistryTest, BudgetsReachThePlanAndASmallerOneIsPlannedAnew) {
  Make(1);
  v1::WorkerHello hello = Hello("a");
  hello.set_weight_budget_bytes(5000);
  hello.set_weight_budget_percent(25);
  hello.set_load_bytes_per_second(2e9);
  const StreamId a = Join(hello);
  ASSERT_EQ(planned_.size(), 1u);
  EXPECT_EQ(planned_[0].weight_budget_bytes, 5000u);
  EXPECT_EQ(planned_[0].weight_budget_percent, 25);
  EXPECT_EQ(planned_[0].load_bytes_per_second, 2e9);
  Close(a);
  const StreamId same = Join(hello);
  EXPECT_EQ(plans_, 1);
  Close(same);
  hello.set_weight_budget_bytes(4999);
  const StreamId smaller = Join(hello);
  EXPECT_EQ(plans_, 2);
  Close(smaller);
  hello.set_weight_budget_bytes(0);  // none
  Join(hello);
  EXPECT_EQ(plans_, 2);
}

TEST_F(RegistryTest, IsNotReadyWhileStorageDoesNotAnswer) {
  Make(2);
  const StreamId a = Join("a"), b = Join("b");
  Serve({a, b});
  v1::WorkerMessage stalled = Heartbeat(1, true);
  stalled.mutable_heartbeat()->set_stalled(true);
  stalled.mutable_heartbeat()->set_detail("waiting for layer 20");
  registry_->Received(b, stalled, now_);
  EXPECT_EQ(Detail(),
            "stage 1, worker 'b' (layers 16-31) is held up by storage: waiting for layer 20");
  v1::GetStatusResponse status;
  registry_->FillStatus(&status);
  EXPECT_EQ(status.detail(), Detail());
  EXPECT_TRUE(status.stages(1).stalled());
  EXPECT_THAT(ended_, IsEmpty());  // the epoch goes on
  Beat(b, 1, true);
  EXPECT_TRUE(registry_->Readiness().ok());
}

TEST_F(RegistryTest, SilentWorkerIsSuspectAfterTwoSeconds) {
  Make(2);
  const StreamId a = Join("a"), b = Join("b");
  Serve({a, b});
  for (int i = 0; i < 3; ++i) {
    Advance(milliseconds(500));
    Beat(a, 1, true);
    EXPECT_TRUE(registry_->Readiness().ok());
  }
  Advance(milliseconds(499));
  EXPECT_TRUE(registry_->Readiness().ok());
  Advance(milliseconds(1));
  ASSERT_EQ(ended_.size(), 1u);
  EXPECT_THAT(ended_[0], HasSubstr("stage 1 was lost: worker 'b' (layers 16-31): no heartbeat"));
  EXPECT_EQ(closed_[b].code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(closed_.count(a), 0u);
  Beat(b, 1, true);  // too late: the stream is closed
  EXPECT_FALSE(registry_->Readiness().ok());
}

TEST_F(RegistryTest, SparesWaitAndStepIn) {
  Make(2);
  const StreamId a = Join("a"), b = Join("b"), c = Join("c");
  EXPECT_EQ(assigned_.count(c), 0u);
  Serve({a, b});
  Close(c);  // losing a spare disturbs nobody
  EXPECT_THAT(ended_, IsEmpty());
  EXPECT_TRUE(registry_->Readiness().ok());
  const StreamId d = Join("d");
  EXPECT_TRUE(registry_->Readiness().ok());
  Close(a);
  EXPECT_EQ(assigned_[d].epoch(), 2u);
  EXPECT_EQ(assigned_[d].stage(), 0u);
  EXPECT_EQ(assigned_[b].stage(), 1u);
  const StreamId a2 = Join("a");  // now a spare itself
  EXPECT_EQ(assigned_.count(a2), 0u);
  Serve({d, b});
}

TEST_F(RegistryTest, NewerStreamOfTheSameNameFencesTheOlder) {
  Make(2);
  const StreamId a = Join("a"), b = Join("b");
  Serve({a, b});
  const StreamId b2 = Join("b");
  EXPECT_EQ(closed_[b].code(), absl::StatusCode::kAborted);
  ASSERT_EQ(ended_.size(), 1u);
  EXPECT_EQ(assigned_[b2].epoch(), 2u);
  Beat(b, 2, true);  // fenced: not heard
  Beat(a, 2, true);
  EXPECT_THAT(dialled_, testing::SizeIs(1));
  Close(b);  // its end changes nothing
  EXPECT_EQ(registry_->epoch(), 2u);
  Serve({a, b2});
}

TEST_F(RegistryTest, AFencedImpostorThatIsRefusedDisturbsNobody) {
  Make(1);
  const StreamId a = Join("a");
  Serve({a});
  v1::WorkerHello lie = Hello("a");
  lie.set_memory_bytes(-1);
  const StreamId impostor = Greet(lie);
  EXPECT_EQ(closed_[impostor].code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(registry_->Readiness().ok());
}

TEST_F(RegistryTest, RefusesLies) {
  struct Case {
    std::function<void(v1::WorkerHello&)> lie;
    absl::StatusCode code;
    const char* field;
  };
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  constexpr auto kPrecondition = absl::StatusCode::kFailedPrecondition;
  const std::vector<Case> cases = {
      {[](auto& h) { h.set_protocol_version(99); }, kPrecondition, "protocol_version"},
      {[](auto& h) { h.set_model_hash("other"); }, kPrecondition, "model_hash"},
      {[](auto& h) { h.set_backend("abacus"); }, kPrecondition, "backend"},
      {[](auto& h) { h.clear_transports(); }, kPrecondition, "transports"},
      {[](auto& h) { h.set_kernel_revision("cpu-2"); }, kPrecondition, "kernel_revision"},
      {[](auto& h) { h.set_backend("cuda"); }, kPrecondition, "kernel_revision"},
      {[](auto& h) { h.set_kernel_revision(""); }, kInvalid, "kernel_revision"},
      {[](auto& h) { h.set_memory_bytes(0); }, kInvalid, "memory_bytes"},
      {[](auto& h) { h.set_memory_bytes(-5); }, kInvalid, "memory_bytes"},
      {[](auto& h) { h.set_memory_bytes(INT64_MAX); }, kInvalid, "memory_bytes"},
      {[](auto& h) { h.set_read_bytes_per_second(-1); }, kInvalid, "read_bytes_per_second"},
      {[](auto& h) { h.set_read_bytes_per_second(NAN); }, kInvalid, "read_bytes_per_second"},
      {[](auto& h) { h.set_worker(""); }, kInvalid, "worker"},
      {[](auto& h) { h.set_worker("a b"); }, kInvalid, "worker"},
      {[](auto& h) { h.set_worker("a\n"); }, kInvalid, "worker"},
      {[](auto& h) { h.set_worker(std::string(129, 'x')); }, kInvalid, "worker"},
      {[](auto& h) { h.set_data_address(""); }, kInvalid, "data_address"},
      {[](auto& h) { h.set_data_address("nowhere"); }, kInvalid, "data_address"},
      {[](auto& h) { h.set_data_address("a.host:1"); }, kInvalid, "data_address"},
      {[](auto& h) { h.set_data_address("coordinator:1"); }, kInvalid, "data_address"},
  };
  Make(2);
  Join("a");
  for (const Case& c : cases) {
    v1::WorkerHello hello = Hello("b");
    c.lie(hello);
    const StreamId stream = Join(hello);
    ASSERT_EQ(closed_.count(stream), 1u) << c.field;
    EXPECT_EQ(closed_[stream].code(), c.code) << closed_[stream];
    EXPECT_THAT(std::string(closed_[stream].message()), HasSubstr(c.field));
  }
  EXPECT_THAT(assigned_, IsEmpty());
  EXPECT_EQ(Detail(), "waiting for workers: 1 of 2 joined; no stage serves layers 0-31");
  Join("b");  // the honest one
  EXPECT_EQ(assigned_.size(), 2u);
}

TEST_F(RegistryTest, OtherNumericsMayFormANewFleetOnceAllHaveLeft) {
  Make(1);
  Close(Join("a"));
  v1::WorkerHello hello = Hello("a");
  hello.set_kernel_revision("cpu-2");
  const StreamId a = Join(hello);
  EXPECT_EQ(closed_.count(a), 0u);
  EXPECT_EQ(registry_->kernel_revision(), "cpu-2");
}

TEST_F(RegistryTest, HelloMustComeFirstOnceAndInTime) {
  Make(1);
  registry_->Opened(100, now_);
  registry_->Received(100, Heartbeat(0, false), now_);
  Apply();
  EXPECT_EQ(closed_[100].code(), absl::StatusCode::kInvalidArgument);

  registry_->Opened(101, now_);
  Advance(kHelloTimeout);
  EXPECT_EQ(closed_[101].code(), absl::StatusCode::kDeadlineExceeded);

  const StreamId a = Join("a");
  registry_->Received(a, Message(Hello("a")), now_);
  Apply();
  EXPECT_EQ(closed_[a].code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(ended_, testing::SizeIs(1));
}

TEST_F(RegistryTest, BoundsOpenStreams) {
  Make(1);
  for (StreamId i = 1; i <= kMaxControlStreams + 1; ++i) registry_->Opened(i, now_);
  Apply();
  EXPECT_EQ(closed_.size(), 1u);
  EXPECT_EQ(closed_[kMaxControlStreams + 1].code(), absl::StatusCode::kResourceExhausted);
}

TEST_F(RegistryTest, WorkerFromALaterEpochRaisesTheNext) {
  Make(2);
  Join("a");
  const StreamId b = Join(Hello("b"), 41);  // outlived another coordinator
  EXPECT_EQ(assigned_[b].epoch(), 42u);
}

TEST_F(RegistryTest, InventedEpochsAreRefused) {
  Make(2);
  const StreamId a = Join("a"), b = Join("b");
  Serve({a, b});
  Beat(b, 9, true);
  EXPECT_EQ(closed_[b].code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(ended_, testing::SizeIs(1));
  const StreamId c = Join(Hello("c"), UINT64_MAX);
  EXPECT_EQ(closed_[c].code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(registry_->epoch(), 1u);
}

TEST_F(RegistryTest, WorkerThatCannotServeIsReleasedAndReplacedByASpare) {
  Make(2);
  const StreamId a = Join("a"), b = Join("b");
  v1::WorkerMessage failed;
  failed.mutable_assignment_failed()->set_epoch(1);
  failed.mutable_assignment_failed()->set_status_code(
      static_cast<uint32_t>(absl::StatusCode::kResourceExhausted));
  failed.mutable_assignment_failed()->set_message("no\nmemory");
  registry_->Received(b, failed, now_);
  Apply();
  EXPECT_THAT(released_, ElementsAre(b));
  EXPECT_THAT(Detail(), HasSubstr("no stage serves layers 16-31"));
  EXPECT_THAT(Detail(), HasSubstr("worker 'b' cannot serve: no?memory"));
  const StreamId c = Join("c");
  EXPECT_EQ(assigned_[c].stage(), 1u);
  EXPECT_EQ(assigned_[c].epoch(), 2u);
  registry_->Received(b, failed, now_);  // of an old epoch: ignored
  Apply();
  Serve({a, c});
}

TEST_F(RegistryTest, TransientFailureIsTriedAgainAfterAGrowingPause) {
  Make(1);
  const StreamId a = Join("a");
  v1::WorkerMessage failed;
  failed.mutable_assignment_failed()->set_epoch(1);
  failed.mutable_assignment_failed()->set_status_code(
      static_cast<uint32_t>(absl::StatusCode::kUnavailable));
  registry_->Received(a, failed, now_);
  Apply();
  EXPECT_EQ(registry_->epoch(), 1u);
  EXPECT_THAT(Detail(), HasSubstr("trying again"));
  Advance(kReplanDelay);
  EXPECT_EQ(registry_->epoch(), 2u);
  Beat(a, 2, true);
  registry_->EpochFailed(2, absl::UnavailableError("link broke"), now_);
  Advance(kReplanDelay);
  EXPECT_EQ(registry_->epoch(), 2u);  // the pause has doubled
  Advance(kReplanDelay);
  EXPECT_EQ(registry_->epoch(), 3u);
  Serve({a});
  registry_->EpochFailed(3, absl::UnavailableError("link broke"), now_);
  registry_->EpochFailed(3, absl::UnavailableError("again"), now_);  // counts once
  Advance(kFailureGrace);
  EXPECT_THAT(Detail(), HasSubstr("link broke"));
  Advance(kReplanDelay);
  EXPECT_EQ(registry_->epoch(), 4u);  // serving has reset the pause
}

TEST_F(RegistryTest, ABrokenLinkIsBlamedOnTheWorkerThatIsGone) {
  Make(1);
  const StreamId a = Join("a");
  Serve({a});
  registry_->EpochFailed(1, absl::UnavailableError("link broke"), now_);
  Advance(kFailureGrace / 2);
  registry_->Closed(a, absl::UnavailableError("gone"), now_);
  Apply();
  ASSERT_FALSE(ended_.empty());
  EXPECT_THAT(ended_.back(), HasSubstr("worker 'a'"));
}

TEST_F(RegistryTest, GivesUpAnEpochThatDoesNotLink) {
  Make(1);
  const StreamId a = Join("a");
  for (milliseconds t{0}; t < kLinkTimeout; t += milliseconds(500)) {
    EXPECT_EQ(registry_->epoch(), 1u);
    Beat(a, 1, false);
    Advance(milliseconds(500));
  }
  ASSERT_EQ(ended_.size(), 1u);
  EXPECT_THAT(ended_[0], HasSubstr("waiting for worker 'a' (layers 0-31)"));
  Advance(kReplanDelay);
  EXPECT_EQ(registry_->epoch(), 2u);
}

TEST_F(RegistryTest, TooSmallWorkersGiveWayToALargerSpare) {
  Make(2);
  Join("a");
  v1::WorkerHello small = Hello("b");
  small.set_memory_bytes(10);
  const StreamId b = Join(small);
  EXPECT_THAT(assigned_, IsEmpty());
  EXPECT_THAT(Detail(), HasSubstr("cannot hold the model: too small"));
  const StreamId c = Join("c");
  EXPECT_EQ(assigned_[c].stage(), 1u);
  EXPECT_EQ(assigned_.count(b), 0u);
}

TEST_F(RegistryTest, StatusShowsWhatStreams) {
  Make(1);
  const StreamId a = Join("a");
  v1::WorkerMessage message = Heartbeat(1, true);
  v1::WorkerHeartbeat& beat = *message.mutable_heartbeat();
  for (const v1::UnitState state :
       {v1::UNIT_STATE_RESIDENT, v1::UNIT_STATE_RESIDENT, v1::UNIT_STATE_READING,
        v1::UNIT_STATE_CONVERTING, v1::UNIT_STATE_QUEUED, v1::UNIT_STATE_ABSENT,
        v1::UNIT_STATE_FAILED, v1::UNIT_STATE_RESIDENT}) {
    beat.add_units(state);
  }
  for (const bool fixed : {true, false, true}) beat.add_fixed(fixed);  // too few: a race, or a liar
  beat.add_units(static_cast<v1::UnitState>(77));
  beat.set_prefetch_hits(6);
  beat.set_prefetch_late_hits(1);
  beat.set_prefetch_misses(1);
  v1::WeightStatus& weights = *beat.mutable_weights();
  weights.set_streaming(true);
  weights.set_budget_bytes(1000);
  weights.set_file_read_bytes(500);
  weights.set_file_seconds(0.25);
  weights.set_host_read_bytes(300);
  weights.set_host_seconds(std::nan(""));
  weights.set_host_bytes(100);
  weights.set_host_raw_bytes(130);
  registry_->Received(a, message, now_);
  v1::GetStatusResponse status;
  registry_->FillStatus(&status);
  const v1::StageStatus& stage = status.stages(0);
  EXPECT_EQ(stage.residency(), "Rsrcq.FR.");
  EXPECT_EQ(stage.weights().budget_bytes(), 1000u);
  EXPECT_EQ(stage.hit_ratio(), 0.75);
  EXPECT_EQ(stage.file_bytes_per_second(), 2000);
  EXPECT_EQ(stage.host_bytes_per_second(), 0);
  EXPECT_EQ(stage.host_compression_ratio(), 1.3);
}

TEST_F(RegistryTest, StatusShowsStages) {
  Make(2);
  const StreamId a = Join("a"), b = Join("b");
  v1::GetStatusResponse status;
  registry_->FillStatus(&status);
  EXPECT_EQ(status.state(), v1::SERVICE_STATE_LOADING);
  Serve({a, b});
  v1::WorkerMessage beat = Heartbeat(1, true);
  beat.mutable_heartbeat()->add_units(v1::UNIT_STATE_RESIDENT);
  beat.mutable_heartbeat()->add_units(v1::UNIT_STATE_READING);
  beat.mutable_heartbeat()->set_detail("bad\x01\xff");
  registry_->Received(b, beat, now_);
  status.Clear();
  registry_->FillStatus(&status);
  EXPECT_EQ(status.state(), v1::SERVICE_STATE_SERVING);
  EXPECT_EQ(status.detail(), "");
  ASSERT_EQ(status.stages_size(), 2);
  EXPECT_TRUE(status.stages(0).has_embedding());
  EXPECT_FALSE(status.stages(0).has_head());
  EXPECT_TRUE(status.stages(1).has_head());
  EXPECT_EQ(status.stages(1).worker(), "b");
  EXPECT_EQ(status.stages(1).address(), "b.host:1");
  EXPECT_EQ(status.stages(1).resident_units(), 1u);
  EXPECT_EQ(status.stages(1).units(), 2u);
  EXPECT_EQ(status.stages(1).detail(), "bad??");
  Close(a);
  status.Clear();
  registry_->FillStatus(&status);
  EXPECT_EQ(status.state(), v1::SERVICE_STATE_WAITING);
  EXPECT_EQ(status.stages(0).detail(), "no worker");
  EXPECT_EQ(status.stages(0).worker(), "a");
}

}  // namespace
}  // namespace stagecoach
