// The channel's state machine over a fake NCCL that really passes bytes between threads.
#include "worker/link/nccl/nccl_channel.h"

#include <cstdlib>
#include <numeric>
#include <optional>
#include <thread>
#include <vector>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "worker/link/nccl/fake_nccl.h"
#include "worker/link/nccl/nccl_transport.h"

namespace stagecoach {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr size_t kFloats = 256;

std::string Message(const absl::Status& status) { return std::string(status.message()); }

class NcclChannelTest : public testing::Test {
 protected:
  NcclChannelTest() { Make({}); }
  ~NcclChannelTest() override {
    sender_.reset();
    receiver_.reset();
    EXPECT_EQ(nccl_->live(), 0);
    EXPECT_EQ(device_->live() > 0, left_behind_);
  }

  void Make(NcclOptions options) {
    transport_ = MakeNcclTransport(nccl_, device_, std::move(options));
  }
  void Open() {
    const std::string id = transport_->NewId().value();
    auto sender = transport_->OpenSender(id, {.data = from_.data(), .floats = kFloats}, "stage 1");
    auto receiver = transport_->OpenReceiver(
        id, {.data = to_.data(), .floats = kFloats, .stream = work_, .spoiled = &spoiled_},
        "stage 0");
    ASSERT_TRUE(sender.ok()) << sender.status();
    ASSERT_TRUE(receiver.ok()) << receiver.status();
    sender_ = *std::move(sender);
    receiver_ = *std::move(receiver);
  }
  void Meet() {
    Open();
    absl::Status sender_ready;
    std::thread other([&] { sender_ready = sender_->AwaitReady(); });
    const absl::Status receiver_ready = receiver_->AwaitReady();
    other.join();
    ASSERT_TRUE(sender_ready.ok()) << sender_ready;
    ASSERT_TRUE(receiver_ready.ok()) << receiver_ready;
  }

  absl::Status Receive(size_t floats) {
    const absl::Status asked = receiver_->Receive(floats);
    return asked.ok() ? receiver_->AwaitReceived() : asked;
  }

  const std::shared_ptr<FakeNccl> nccl_ = std::make_shared<FakeNccl>();
  const std::shared_ptr<FakeDevice> device_ = std::make_shared<FakeDevice>();
  std::vector<float> from_ = std::vector<float>(kFloats), to_ = std::vector<float>(kFloats);
  void* work_ = nullptr;  // the stream of the receiver's work
  std::atomic<uint32_t> spoiled_ = 0;
  std::unique_ptr<DeviceTransport> transport_;
  std::unique_ptr<DeviceChannel> sender_, receiver_;
  bool left_behind_ = false;  // on purpose: objects of a device that could not be freed
};

TEST_F(NcclChannelTest, PayloadsArriveInOrderAndNothingIsMadeOnTheWay) {
  Meet();
  const uint64_t made = device_->made();
  constexpr int kPayloads = 200;
  std::thread sending([&] {
    for (int i = 0; i < kPayloads; ++i) {
      const size_t floats = 1 + i % kFloats;
      std::iota(from_.begin(), from_.begin() + floats, static_cast<float>(i));
      ASSERT_TRUE(sender_->Send(floats).ok());
      std::fill(from_.begin(), from_.end(), -1.0f);  // as the next step does
    }
  });
  for (int i = 0; i < kPayloads; ++i) {
    const size_t floats = 1 + i % kFloats;
    ASSERT_TRUE(Receive(floats).ok());
    EXPECT_EQ(to_[0], static_cast<float>(i));
    EXPECT_EQ(to_[floats - 1], static_cast<float>(i + floats - 1));
  }
  sending.join();
  EXPECT_EQ(device_->made(), made);
  EXPECT_EQ(nccl_->payloads(), kPayloads + 1u);  // and the first, of AwaitReady
}

TEST_F(NcclChannelTest, ASenderIsSeveralPayloadsAheadAndNoMore) {
  Make({.transfer_timeout = absl::Milliseconds(50)});
  Meet();
  for (int i = 0; i < kNcclSendSlots; ++i) ASSERT_TRUE(sender_->Send(kFloats).ok());
  const absl::Status full = sender_->Send(kFloats);
  EXPECT_EQ(full.code(), absl::StatusCode::kDeadlineExceeded) << full;
  EXPECT_THAT(Message(full), HasSubstr("stage 1"));
}

// The work finds its payloads by the order of its stream: the host asks for them before they have
// been sent, and waits for none.
TEST_F(NcclChannelTest, WorkWaitsForItsPayloadsByItself) {
  work_ = device_->NewStream().value();
  Meet();
  std::vector<float> seen(kReceiving, -1);
  const auto ask = [&](int i) {
    ASSERT_TRUE(receiver_->Receive(kFloats).ok());
    ASSERT_TRUE(device_->Copy(&seen[i], &to_[0], 1, work_).ok());
  };
  for (int i = 0; i < kReceiving; ++i) ask(i);
  EXPECT_EQ(receiver_->Received().value(), 0u);
  for (int i = 0; i < kReceiving; ++i) {
    from_[0] = static_cast<float>(i);
    ASSERT_TRUE(sender_->Send(kFloats).ok());
    while (receiver_->Received().value() < i + 1u) std::this_thread::yield();
  }
  ask(0);  // there is room again
  from_[0] = 7;
  ASSERT_TRUE(sender_->Send(kFloats).ok());
  ASSERT_TRUE(receiver_->AwaitReceived().ok());
  device_->FreeStream(work_);  // when it is done
  EXPECT_EQ(seen, std::vector<float>({7, 1, 2, 3}));
}

TEST_F(NcclChannelTest, CancelLetsWorkGoThatWaits) {
  work_ = device_->NewStream().value();
  Meet();
  ASSERT_TRUE(receiver_->Receive(kFloats).ok());
  EXPECT_EQ(receiver_->Received().value(), 0u);
  receiver_->Cancel();
  device_->FreeStream(work_);  // waits for its work
  EXPECT_EQ(spoiled_, 1u);
  EXPECT_EQ(receiver_->Received().status().code(), absl::StatusCode::kCancelled);
  receiver_.reset();
  EXPECT_EQ(nccl_->aborts(), 1);
}

TEST_F(NcclChannelTest, APayloadThatDoesNotComeIsAnError) {
  Make({.transfer_timeout = absl::Milliseconds(20)});
  Meet();
  absl::SleepFor(absl::Milliseconds(40));
  ASSERT_TRUE(receiver_->Receive(kFloats).ok());
  const absl::Status late = receiver_->AwaitReceived();
  EXPECT_EQ(late.code(), absl::StatusCode::kDeadlineExceeded) << late;
  EXPECT_THAT(Message(late), HasSubstr("stage 0"));
  EXPECT_EQ(receiver_->Received().status().code(), absl::StatusCode::kDeadlineExceeded);
}

TEST_F(NcclChannelTest, AnEndThatStaysAloneSaysWhatToCheck) {
  setenv("NCCL_SOCKET_IFNAME", "eth7", 1);
  Make({.init_timeout = absl::Milliseconds(30)});
  auto sender = transport_->OpenSender(transport_->NewId().value(),
                                       {.data = from_.data(), .floats = kFloats}, "stage 1");
  ASSERT_TRUE(sender.ok()) << sender.status();
  const absl::Status late = (*sender)->AwaitReady();
  unsetenv("NCCL_SOCKET_IFNAME");
  EXPECT_EQ(late.code(), absl::StatusCode::kDeadlineExceeded) << late;
  EXPECT_THAT(Message(late), AllOf(HasSubstr("stage 1"), HasSubstr("'eth7'"),
                                   HasSubstr("NCCL_SOCKET_IFNAME"), HasSubstr("firewall")));
}

TEST_F(NcclChannelTest, ARefusedCommunicatorIsAnErrorAtOnce) {
  nccl_->refuse_init = true;
  const auto sender = transport_->OpenSender(transport_->NewId().value(),
                                             {.data = from_.data(), .floats = kFloats}, "stage 1");
  EXPECT_EQ(sender.status().code(), absl::StatusCode::kUnavailable) << sender.status();
  EXPECT_THAT(Message(sender.status()), HasSubstr("as the test asked"));
}

TEST_F(NcclChannelTest, AnIdOfAnotherLengthIsRefused) {
  for (const std::string& id : {std::string(), std::string(127, 'x'), std::string(129, 'x')}) {
    const auto receiver =
        transport_->OpenReceiver(id, {.data = to_.data(), .floats = kFloats}, "stage 0");
    EXPECT_EQ(receiver.status().code(), absl::StatusCode::kInvalidArgument);
  }
}

TEST_F(NcclChannelTest, AnAsynchronousErrorEndsBothEnds) {
  Meet();
  absl::Status received;
  std::thread receiving([&] { received = Receive(kFloats); });
  nccl_->BreakAll();
  receiving.join();
  EXPECT_EQ(received.code(), absl::StatusCode::kUnavailable) << received;
  EXPECT_EQ(sender_->Send(kFloats).code(), absl::StatusCode::kUnavailable);
}

TEST_F(NcclChannelTest, CancelEndsAReceiverWhosePeerIsGone) {
  Meet();
  sender_.reset();  // NCCL itself tells the other end nothing
  absl::Status received;
  std::thread receiving([&] { received = Receive(kFloats); });
  absl::SleepFor(absl::Milliseconds(20));
  const absl::Time start = absl::Now();
  receiver_->Cancel();
  receiving.join();
  EXPECT_EQ(received.code(), absl::StatusCode::kCancelled) << received;
  receiver_.reset();
  EXPECT_LT(absl::Now() - start, absl::Seconds(2));
  EXPECT_EQ(nccl_->aborts(), 2);
}

TEST_F(NcclChannelTest, CancelEndsAnEndThatIsStillAlone) {
  auto receiver = transport_->OpenReceiver(transport_->NewId().value(),
                                           {.data = to_.data(), .floats = kFloats}, "stage 0");
  ASSERT_TRUE(receiver.ok()) << receiver.status();
  absl::Status ready;
  std::thread waiting([&] { ready = (*receiver)->AwaitReady(); });
  (*receiver)->Cancel();
  waiting.join();
  EXPECT_EQ(ready.code(), absl::StatusCode::kCancelled) << ready;
}

TEST_F(NcclChannelTest, AfterAnAbortBothMeetAgainUnderANewId) {
  for (int epoch = 0; epoch < 5; ++epoch) {
    Meet();
    from_[0] = static_cast<float>(epoch);
    ASSERT_TRUE(sender_->Send(1).ok());
    ASSERT_TRUE(sender_->Send(kFloats).ok());  // still on its way when the epoch ends
    ASSERT_TRUE(Receive(1).ok());
    EXPECT_EQ(to_[0], static_cast<float>(epoch));
    sender_.reset();
    receiver_.reset();
    EXPECT_EQ(nccl_->live(), 0);
    EXPECT_EQ(device_->live(), 0u);
  }
}

TEST_F(NcclChannelTest, AnAbortThatHangsIsReportedAndItsMemoryLeftAlone) {
  absl::Status stuck;
  Make({.abort_timeout = absl::Milliseconds(20),
        .on_stuck = [&](const absl::Status& status) { stuck = status; }});
  Meet();
  nccl_->hang_in_abort = true;
  const size_t live = device_->live();
  receiver_.reset();
  EXPECT_EQ(stuck.code(), absl::StatusCode::kInternal) << stuck;
  EXPECT_THAT(Message(stuck), HasSubstr("stage 0"));
  EXPECT_EQ(device_->live(), live);
  nccl_->hang_in_abort = false;
  sender_.reset();
  const absl::Time deadline = absl::Now() + absl::Seconds(10);
  while (nccl_->live() > 0 && absl::Now() < deadline) absl::SleepFor(absl::Milliseconds(1));
  EXPECT_GT(device_->live(), 0);
  left_behind_ = true;
}

TEST(NcclHostId, TheEnvironmentNamesTheHost) {
  unsetenv("NCCL_HOSTID");
  const std::string own = NcclHostId();
  EXPECT_FALSE(own.empty());
  EXPECT_EQ(NcclHostId(), own);
  setenv("NCCL_HOSTID", "node0", 1);
  EXPECT_EQ(NcclHostId(), "node0");
  unsetenv("NCCL_HOSTID");
}

}  // namespace
}  // namespace stagecoach
