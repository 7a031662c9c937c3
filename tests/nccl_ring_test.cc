// Whole pipelines whose activations go by NCCL: the CPU backend's memory as the devices', and a
// fake NCCL that passes real bytes. What a GPU changes is in process_nccl_test.cc.
#include <memory>
#include <string>
#include <vector>

#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include "tests/pipeline_ring.h"
#include "worker/link/nccl/fake_nccl.h"
#include "worker/link/nccl/nccl_transport.h"

namespace stagecoach {
namespace {

class NcclRingTest : public testing::Test {
 protected:
  // The answers to all golden prompts at once.
  std::vector<Answer> Answers(Ring& ring) {
    std::vector<std::shared_ptr<Recorder>> recorders;
    uint64_t seed = 0;
    for (const Golden& golden : GreedyGoldens()) {
      recorders.push_back(ring.Submit(SampledRequest(golden, ++seed)));
    }
    std::vector<Answer> answers;
    for (const auto& recorder : recorders) {
      const absl::Status status = recorder->Wait();
      EXPECT_TRUE(status.ok()) << status;
      answers.push_back({recorder->tokens, recorder->logprobs});
    }
    return answers;
  }
  // All communicators but `count` have been aborted within `limit`.
  bool LeavesWithin(absl::Duration limit, int count) {
    const absl::Time end = absl::Now() + limit;
    while (nccl_->live() > count && absl::Now() < end) absl::SleepFor(absl::Milliseconds(1));
    return nccl_->live() == count;
  }

  const std::shared_ptr<FakeNccl> nccl_ = std::make_shared<FakeNccl>();
  const std::shared_ptr<FakeDevice> device_ = std::make_shared<FakeDevice>();
  const std::unique_ptr<DeviceTransport> transport_ = MakeNcclTransport(nccl_, device_, {});
};

TEST_F(NcclRingTest, TheSameBitsAsWithFramesAlone) {
  Ring frames(3);
  frames.Start(1, FirstWorkers(3));
  const std::vector<Answer> expected = Answers(frames);
  for (const int stages : {2, 3, 4}) {
    Ring ring(stages, {}, nullptr, transport_.get());
    ring.Start(1, FirstWorkers(stages));
    EXPECT_EQ(nccl_->live(), 2 * (stages - 1));
    const uint64_t payloads = nccl_->payloads(), made = device_->made();
    EXPECT_TRUE(Answers(ring) == expected) << stages << " stages";
    EXPECT_GT(nccl_->payloads(), payloads + 60 * (stages - 1));
    EXPECT_EQ(device_->made(), made);  // nothing is allocated on the way
  }
  EXPECT_EQ(nccl_->live(), 0);
  EXPECT_EQ(device_->live(), 0u);
}

TEST_F(NcclRingTest, ALostStageEndsItsPairsAndTheNextEpochMeetsAnew) {
  Ring ring(4, {}, nullptr, transport_.get());
  ring.Start(1, {0, 1, 2});
  const std::vector<Answer> expected = Answers(ring);
  Request endless = GreedyRequest(GreedyGoldens()[0]);
  endless.max_tokens = 400;
  const auto cut_off = ring.Submit(endless);
  cut_off->AwaitTokens(3);
  ring.Kill(1);
  EXPECT_EQ(cut_off->Wait().code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(LeavesWithin(absl::Seconds(2), 0));  // of the survivors on either side, too
  ring.Start(2, {0, 3, 2});
  EXPECT_EQ(nccl_->live(), 4);
  EXPECT_TRUE(Answers(ring) == expected);
}

TEST_F(NcclRingTest, AnNcclErrorEndsTheEpochAndTheNextOneMeetsAnew) {
  Ring ring(2, {}, nullptr, transport_.get());
  ring.Start(1, {0, 1});
  const std::vector<Answer> expected = Answers(ring);
  nccl_->BreakAll();
  EXPECT_EQ(ring.Submit(GreedyRequest(GreedyGoldens()[0]))->Wait().code(),
            absl::StatusCode::kUnavailable);
  EXPECT_TRUE(LeavesWithin(absl::Seconds(2), 0));
  ring.Start(2, {0, 1});
  EXPECT_TRUE(Answers(ring) == expected);
}

TEST_F(NcclRingTest, ANewEpochMakesOtherPairs) {
  Ring ring(3, {}, nullptr, transport_.get());
  ring.Start(1, {0, 1});
  ring.Start(2, {1, 2});  // stage 1 becomes stage 0; the old stage 0 is left out
  EXPECT_FALSE(Answers(ring).empty());
  EXPECT_TRUE(LeavesWithin(absl::Seconds(2), 2));
}

}  // namespace
}  // namespace stagecoach
