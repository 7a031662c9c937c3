// What every transport must do, run over the in-process link and over gRPC.
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>

#include <atomic>
#include <functional>
#include <map>
#include <thread>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "fmt/format.h"
#include "gtest/gtest.h"
#include "worker/link/grpc_link.h"
#include "worker/link/in_process_link.h"

namespace stagecoach {
namespace {

constexpr size_t kMaxMessage = 2 << 20;
constexpr absl::Duration kTimeout = absl::Seconds(10);

Frame StepFrame(uint64_t step, size_t floats = 4) {
  Frame frame;
  frame.header.set_epoch(1);
  frame.header.mutable_step()->set_step(step);
  frame.payload = Payload(std::vector<float>(floats, static_cast<float>(step)));
  return frame;
}

// Records what it gets; keeps credits while `hold` is set.
class Recorder : public LinkHandler {
 public:
  absl::Status OnLink(uint64_t, const v1::LinkHello& hello) override {
    ++hellos;
    absl::MutexLock lock(&mu);
    last_hello = hello;
    return answer ? answer(hellos) : absl::OkStatus();
  }
  void OnLinkOpened(uint64_t link, LinkBreaker breaker) override {
    absl::MutexLock lock(&mu);
    breakers[link] = std::move(breaker);
  }
  void OnFrame(uint64_t link, Frame frame, CreditReturn credit) override {
    CreditReturn release_outside_lock;
    absl::MutexLock lock(&mu);
    EXPECT_EQ(closed.count(link), 0u) << "a frame after OnLinkClosed";
    frames.push_back(std::move(frame));
    if (hold) {
      held.push_back(std::move(credit));
    } else {
      release_outside_lock = std::move(credit);
    }
  }
  void OnLinkClosed(uint64_t link, const absl::Status& reason) override {
    absl::MutexLock lock(&mu);
    EXPECT_TRUE(closed.emplace(link, reason).second) << "OnLinkClosed twice";
  }

  bool AwaitFrames(size_t count, absl::Duration timeout = kTimeout) {
    const auto enough = [this, count] { return frames.size() >= count; };
    absl::MutexLock lock(&mu);
    return mu.AwaitWithTimeout(absl::Condition(&enough), timeout);
  }
  bool AwaitClosed(size_t count = 1) {
    const auto enough = [this, count] { return closed.size() >= count; };
    absl::MutexLock lock(&mu);
    return mu.AwaitWithTimeout(absl::Condition(&enough), kTimeout);
  }
  size_t FrameCount() {
    absl::MutexLock lock(&mu);
    return frames.size();
  }
  void Release(size_t count) {
    std::vector<CreditReturn> released;
    absl::MutexLock lock(&mu);
    for (size_t i = 0; i < count && !held.empty(); ++i) {
      released.push_back(std::move(held.back()));
      held.pop_back();
    }
    mu.Unlock();
    released.clear();
    mu.Lock();
  }
  void BreakAll(const absl::Status& reason) {
    std::map<uint64_t, LinkBreaker> all;
    {
      absl::MutexLock lock(&mu);
      all = breakers;
    }
    for (auto& [id, breaker] : all) breaker(reason);
  }

  std::atomic<int> hellos = 0;
  absl::Mutex mu;
  std::function<absl::Status(int)> answer;
  v1::LinkHello last_hello;
  bool hold = false;
  std::vector<Frame> frames;
  std::vector<CreditReturn> held;
  std::map<uint64_t, LinkBreaker> breakers;
  std::map<uint64_t, absl::Status> closed;
};

// What on_broken was told. Shared with the callback, which may still be under way after Close.
struct Broken {
  static std::function<void(const absl::Status&)> Callback(std::shared_ptr<Broken> broken) {
    return [broken](const absl::Status& reason) {
      absl::MutexLock lock(&broken->mu);
      ++broken->calls;
      broken->status = reason;
    };
  }
  bool Await(int count = 1) {
    const auto called = [this, count] { return calls >= count; };
    absl::MutexLock lock(&mu);
    return mu.AwaitWithTimeout(absl::Condition(&called), kTimeout);
  }
  int Calls() {
    absl::MutexLock lock(&mu);
    return calls;
  }
  absl::Mutex mu;
  int calls = 0;
  absl::Status status;
};

class Transport {
 public:
  virtual ~Transport() = default;
  virtual LinkDialer& dialer() = 0;
  virtual std::string Listen(LinkHandler* handler) = 0;
  virtual void Stop() = 0;
};

class InProcess : public Transport {
 public:
  LinkDialer& dialer() override { return hub_; }
  std::string Listen(LinkHandler* handler) override {
    hub_.Listen("a", handler);
    return "a";
  }
  void Stop() override { hub_.StopListening("a"); }

 private:
  InProcessHub hub_;
};

class Grpc : public Transport {
 public:
  ~Grpc() override { Stop(); }
  LinkDialer& dialer() override { return *dialer_; }
  std::string Listen(LinkHandler* handler) override {
    service_ = std::make_unique<GrpcLinkService>(handler, kMaxMessage);
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    service_->Register(builder);
    server_ = builder.BuildAndStart();
    return fmt::format("127.0.0.1:{}", port);
  }
  void Stop() override {
    if (server_ == nullptr) return;
    service_->Shutdown();
    server_->Shutdown();
    server_.reset();
  }

 private:
  std::unique_ptr<LinkDialer> dialer_ = MakeGrpcLinkDialer(kMaxMessage);
  std::unique_ptr<GrpcLinkService> service_;
  std::unique_ptr<grpc::Server> server_;
};

class LinkTest : public testing::TestWithParam<const char*> {
 protected:
  LinkTest() {
    if (std::string(GetParam()) == "grpc") {
      transport_ = std::make_unique<Grpc>();
    } else {
      transport_ = std::make_unique<InProcess>();
    }
    address_ = transport_->Listen(&recorder_);
  }
  ~LinkTest() override { transport_->Stop(); }

  absl::StatusOr<std::unique_ptr<LinkSender>> Dial(absl::Duration timeout = kTimeout) {
    v1::LinkHello hello;
    hello.set_epoch(1);
    hello.set_model_hash("m");
    return transport_->dialer().Dial(address_, hello, timeout, Broken::Callback(broken_));
  }

  Recorder recorder_;
  const std::shared_ptr<Broken> broken_ = std::make_shared<Broken>();
  std::unique_ptr<Transport> transport_;
  std::string address_;
};
INSTANTIATE_TEST_SUITE_P(, LinkTest, testing::Values("in_process", "grpc"),
                         [](const auto& info) { return std::string(info.param); });

TEST_P(LinkTest, TenThousandFramesArriveInOrderWithTheirBytes) {
  auto sender = Dial().value();
  constexpr uint64_t kFrames = 10000;
  for (uint64_t i = 0; i < kFrames; ++i) ASSERT_TRUE(sender->Send(StepFrame(i, i % 97)).ok());
  ASSERT_TRUE(recorder_.AwaitFrames(kFrames));
  absl::MutexLock lock(&recorder_.mu);
  EXPECT_EQ(recorder_.last_hello.model_hash(), "m");
  for (uint64_t i = 0; i < kFrames; ++i) {
    const Frame& frame = recorder_.frames[i];
    ASSERT_EQ(frame.header.step().step(), i);
    ASSERT_EQ(frame.payload.values().size(), i % 97);
    for (float value : frame.payload.values()) ASSERT_EQ(value, static_cast<float>(i));
  }
  EXPECT_EQ(broken_->Calls(), 0);
}

TEST_P(LinkTest, LargeFrames) {
  auto sender = Dial().value();
  for (size_t floats : {16384, 65536, 400000}) {
    ASSERT_TRUE(sender->Send(StepFrame(floats, floats)).ok());
  }
  ASSERT_TRUE(recorder_.AwaitFrames(3));
  absl::MutexLock lock(&recorder_.mu);
  EXPECT_EQ(recorder_.frames[2].payload.values().size(), 400000u);
  EXPECT_EQ(recorder_.frames[2].payload.values()[399999], 400000.0f);
}

TEST_P(LinkTest, AReceiverThatHoldsCreditsBlocksTheSender) {
  recorder_.hold = true;
  auto sender = Dial().value();
  constexpr size_t kFrames = 3 * kLinkCredits;
  std::atomic<size_t> sent = 0;
  std::thread thread([&] {
    for (uint64_t i = 0; i < kFrames; ++i) {
      ASSERT_TRUE(sender->Send(StepFrame(i)).ok());
      ++sent;
    }
  });
  ASSERT_TRUE(recorder_.AwaitFrames(kLinkCredits));
  EXPECT_FALSE(recorder_.AwaitFrames(kLinkCredits + 1, absl::Milliseconds(100)));
  EXPECT_EQ(sent, kLinkCredits);
  // One credit at a time: each lets exactly one frame through, without deadlock.
  for (size_t released = 1; released <= kFrames - kLinkCredits; ++released) {
    recorder_.Release(1);
    ASSERT_TRUE(recorder_.AwaitFrames(kLinkCredits + released)) << released;
    EXPECT_LE(recorder_.FrameCount(), kLinkCredits + released);
  }
  thread.join();
  recorder_.Release(kFrames);
}

TEST_P(LinkTest, CloseBySenderWakesABlockedSendAndIsNotABreak) {
  recorder_.hold = true;
  auto sender = Dial().value();
  std::thread thread([&] {
    absl::Status status;
    while ((status = sender->Send(StepFrame(1))).ok()) {
    }
    EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  });
  ASSERT_TRUE(recorder_.AwaitFrames(kLinkCredits));
  sender->Close();
  sender->Close();
  thread.join();
  EXPECT_TRUE(recorder_.AwaitClosed());
  EXPECT_EQ(broken_->Calls(), 0);
  recorder_.Release(kLinkCredits);
}

TEST_P(LinkTest, ReceiverBreaksTheLinkWithAReason) {
  recorder_.hold = true;
  auto sender = Dial().value();
  ASSERT_TRUE(sender->Send(StepFrame(1)).ok());
  ASSERT_TRUE(recorder_.AwaitFrames(1));
  recorder_.BreakAll(absl::OutOfRangeError("step 7 was skipped"));
  ASSERT_TRUE(broken_->Await());
  EXPECT_EQ(broken_->status, absl::OutOfRangeError("step 7 was skipped"));
  EXPECT_TRUE(recorder_.AwaitClosed());
  const absl::Status status = sender->Send(StepFrame(2));
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_NE(status.message().find("step 7 was skipped"), std::string::npos) << status;
  recorder_.Release(1);
  recorder_.BreakAll(absl::InternalError("again"));  // of a closed link: nothing
  sender.reset();
  EXPECT_EQ(broken_->Calls(), 1);
}

TEST_P(LinkTest, RefusalsComeBackAtOnceWithTheirCode) {
  for (const absl::Status& refusal :
       {absl::FailedPreconditionError("model hash"), absl::AbortedError("stale epoch")}) {
    recorder_.answer = [&](int) { return refusal; };
    const absl::Time start = absl::Now();
    EXPECT_EQ(Dial().status(), refusal);
    EXPECT_LT(absl::Now() - start, absl::Seconds(2));
  }
  EXPECT_EQ(recorder_.hellos, 2);
  EXPECT_EQ(broken_->Calls(), 0);
  EXPECT_TRUE(recorder_.closed.empty());  // OnLinkClosed is for accepted links
}

TEST_P(LinkTest, RetriesUnavailableUntilAcceptedOrTimeout) {
  recorder_.answer = [](int n) {
    return n < 4 ? absl::UnavailableError("not yet") : absl::OkStatus();
  };
  EXPECT_TRUE(Dial().ok());
  EXPECT_EQ(recorder_.hellos, 4);
  recorder_.answer = [](int) { return absl::UnavailableError("never"); };
  const absl::Status status = Dial(absl::Milliseconds(200)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_NE(status.message().find("never"), std::string::npos) << status;
}

TEST_P(LinkTest, CloseWaitsForOnBrokenUnlessCalledByIt) {
  std::unique_ptr<LinkSender> sender;
  absl::Mutex dialled;
  absl::Notification entered;
  std::atomic<bool> finished = false;
  {
    absl::MutexLock lock(&dialled);
    sender = transport_->dialer()
                 .Dial(address_, v1::LinkHello(), kTimeout,
                       [&](const absl::Status&) {
                         { absl::MutexLock wait(&dialled); }
                         sender->Close();  // by the callback itself: does not wait
                         entered.Notify();
                         absl::SleepFor(absl::Milliseconds(50));
                         finished = true;
                       })
                 .value();
  }
  std::thread breaker([&] { recorder_.BreakAll(absl::AbortedError("new epoch")); });
  entered.WaitForNotification();
  sender->Close();
  EXPECT_TRUE(finished);
  breaker.join();
}

TEST_P(LinkTest, ShutdownWithLiveLinksBreaksThem) {
  std::vector<std::unique_ptr<LinkSender>> senders;
  for (int i = 0; i < 8; ++i) senders.push_back(Dial().value());
  for (auto& sender : senders) ASSERT_TRUE(sender->Send(StepFrame(1)).ok());
  const absl::Time start = absl::Now();
  transport_->Stop();
  EXPECT_LT(absl::Now() - start, absl::Seconds(5));
  EXPECT_EQ(recorder_.closed.size(), 8u);
  EXPECT_TRUE(broken_->Await(8));
}

TEST_P(LinkTest, ConcurrentSendsAndCloseFromBothSides) {
  for (int round = 0; round < 20; ++round) {
    auto sender = Dial().value();
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([&] {
        while (sender->Send(StepFrame(1, 100)).ok()) {
        }
      });
    }
    absl::SleepFor(absl::Milliseconds(round % 5));
    std::thread breaker([&] { recorder_.BreakAll(absl::AbortedError("new epoch")); });
    if (round % 2 == 0) sender->Close();
    breaker.join();
    for (std::thread& thread : threads) thread.join();
    sender.reset();
    ASSERT_TRUE(recorder_.AwaitClosed(round + 1));
  }
}

}  // namespace
}  // namespace stagecoach
