// Two ends in this process, over a fake NCCL that passes real bytes.
#include "tools/nccl_hop.h"

#include <algorithm>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "worker/link/nccl/fake_nccl.h"
#include "worker/link/nccl/nccl_transport.h"

namespace stagecoach {
namespace {

constexpr size_t kFloats = 64;

class NcclHopTest : public testing::Test {
 protected:
  struct Side {
    std::vector<float> memory = std::vector<float>(kFloats);
    std::unique_ptr<DeviceChannel> out, in;
    HopEnd end;
  };

  void Open(Side& side, const std::string& out, const std::string& in) {
    const ChannelMemory memory = {.data = side.memory.data(), .floats = kFloats};
    side.out = transport_->OpenSender(out, memory, "the other process").value();
    side.in = transport_->OpenReceiver(in, memory, "the other process").value();
    side.end = {.out = side.out.get(),
                .in = side.in.get(),
                .floats = kFloats,
                .write =
                    [&side](std::span<const float> words) {
                      std::ranges::copy(words, side.memory.begin());
                      return absl::OkStatus();
                    },
                .read =
                    [&side](std::span<float> words) {
                      std::copy_n(side.memory.begin(), words.size(), words.begin());
                      return absl::OkStatus();
                    }};
  }
  void Meet() {
    const std::string there = transport_->NewId().value(), back = transport_->NewId().value();
    Open(leader_, there, back);
    Open(follower_, back, there);
    std::thread other([&] {
      EXPECT_TRUE(follower_.in->AwaitReady().ok());
      EXPECT_TRUE(follower_.out->AwaitReady().ok());
    });
    EXPECT_TRUE(leader_.out->AwaitReady().ok());
    EXPECT_TRUE(leader_.in->AwaitReady().ok());
    other.join();
  }

  const std::shared_ptr<FakeNccl> nccl_ = std::make_shared<FakeNccl>();
  const std::shared_ptr<FakeDevice> device_ = std::make_shared<FakeDevice>();
  const std::unique_ptr<DeviceTransport> transport_ =
      MakeNcclTransport(nccl_, device_, {.transfer_timeout = absl::Seconds(5)});
  Side leader_, follower_;
};

TEST_F(NcclHopTest, MeasuresEachSizeAndComesBackWithWhatWasSent) {
  Meet();
  std::thread follower([&] { EXPECT_TRUE(FollowHop(follower_.end).ok()); });
  const uint64_t before = nccl_->payloads();
  std::vector<float> sent = leader_.memory;
  for (const auto& [floats, count] : {std::pair(1, 7), std::pair(64, 30)}) {
    const auto micros = LeadHop(leader_.end, floats, count, absl::Seconds(60));
    ASSERT_TRUE(micros.ok()) << micros.status();
    EXPECT_EQ(micros->size(), static_cast<size_t>(count));
    EXPECT_GT(std::ranges::min(*micros), 0);
  }
  // Two orders for each size, and each payload twice.
  EXPECT_EQ(nccl_->payloads() - before, 4u + 2 * (2 * kHopWarmUp + 7 + 30));
  EXPECT_TRUE(EndHop(leader_.end).ok());
  follower.join();
}

TEST_F(NcclHopTest, FewerRoundTripsThanAskedForWhereTheyTakeTooLong) {
  Meet();
  std::thread follower([&] { EXPECT_TRUE(FollowHop(follower_.end).ok()); });
  const auto micros = LeadHop(leader_.end, 8, 1 << 24, absl::Milliseconds(20));
  ASSERT_TRUE(micros.ok()) << micros.status();
  EXPECT_GE(micros->size(), 1u);
  EXPECT_LT(micros->size(), 1u << 20);
  const auto one = LeadHop(leader_.end, 8, 100, absl::ZeroDuration());
  ASSERT_TRUE(one.ok()) << one.status();
  EXPECT_EQ(one->size(), 1u);
  EXPECT_TRUE(EndHop(leader_.end).ok());
  follower.join();
}

TEST_F(NcclHopTest, RefusesWhatDoesNotFit) {
  Meet();
  EXPECT_EQ(LeadHop(leader_.end, kFloats + 1, 1, absl::Seconds(1)).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(LeadHop(leader_.end, 0, 1, absl::Seconds(1)).status().code(),
            absl::StatusCode::kInvalidArgument);
  leader_.memory[0] = kFloats + 1;
  leader_.memory[1] = 1;
  ASSERT_TRUE(leader_.out->Send(kHopOrderFloats).ok());
  EXPECT_EQ(FollowHop(follower_.end).code(), absl::StatusCode::kDataLoss);
}

TEST_F(NcclHopTest, AFollowerThatIsGivenUpEndsTheLeaderToo) {
  Meet();
  std::thread follower([&] {
    EXPECT_EQ(FollowHop(follower_.end).code(), absl::StatusCode::kCancelled);
    leader_.in->Cancel();
  });
  follower_.in->Cancel();
  const auto micros = LeadHop(leader_.end, 8, 1, absl::Seconds(1));
  EXPECT_EQ(micros.status().code(), absl::StatusCode::kCancelled) << micros.status();
  follower.join();
}

}  // namespace
}  // namespace stagecoach
