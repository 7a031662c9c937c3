// What only a network can do to a link: hostile bytes, wrong methods, silent
// peers.
#include "worker/link/grpc_link.h"

#include <arpa/inet.h>
#include <grpcpp/channel.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cstring>

#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "fmt/format.h"
#include "gtest/gtest.h"
#include "worker/link/grpc_wire.h"
#include "worker/link/hop_bench.h"

namespace stagecoach {
namespace {

constexpr size_t kMaxMessage = 64 << 10;
constexpr absl::Duration kTimeout = absl::Seconds(10);

class Counter : public LinkHandler {
 public:
  absl::Status OnLink(uint64_t, const v1::LinkHello&) override { return absl::OkStatus(); }
  void OnFrame(uint64_t, Frame, CreditReturn credit) override {
    absl::MutexLock lock(&mu);
    ++frames;
    if (hold) held.push_back(std::move(credit));
  }
  void OnLinkClosed(uint64_t, const absl::Status& reason) override {
    absl::MutexLock lock(&mu);
    closed.push_back(reason);
  }
  bool AwaitFrames(int count) {
    const auto enough = [this, count] { return frames >= count; };
    absl::MutexLock lock(&mu);
    return mu.AwaitWithTimeout(absl::Condition(&enough), kTimeout);
  }

  absl::Mutex mu;
  int frames = 0;
  bool hold = false;
  std::vector<CreditReturn> held;
  std::vector<absl::Status> closed;
};

std::string Message(const Frame& frame) {
  std::string bytes = EncodeHeader(frame.header).value();
  const auto values = frame.payload.values();
  return bytes.append(reinterpret_cast<const char*>(values.data()), values.size_bytes());
}

Frame Step(size_t floats) {
  Frame frame;
  frame.header.mutable_step()->set_step(1);
  frame.payload = Payload(std::vector<float>(floats, 1.0f));
  return frame;
}

std::string Hello() {
  Frame frame;
  frame.header.mutable_hello()->set_epoch(1);
  return Message(frame);
}

int Connect(int port) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  EXPECT_EQ(connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  return fd;
}

class GrpcLinkTest : public testing::Test {
 protected:
  GrpcLinkTest() {
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port_);
    service_.Register(builder);
    server_ = builder.BuildAndStart();
    address_ = fmt::format("127.0.0.1:{}", port_);
    bystander_ = Dial().value();
  }
  // Whatever was done to other links, the one that was there before still
  // works.
  ~GrpcLinkTest() override {
    const int before = FrameCount();
    EXPECT_TRUE(bystander_->Send(Step(8)).ok());
    EXPECT_TRUE(handler_.AwaitFrames(before + 1));
    bystander_.reset();
    service_.Shutdown();
    server_->Shutdown();
  }

  int FrameCount() {
    absl::MutexLock lock(&handler_.mu);
    return handler_.frames;
  }
  absl::StatusOr<std::unique_ptr<LinkSender>> Dial() {
    return MakeGrpcLinkDialer(16 << 20)->Dial(address_, v1::LinkHello(), kTimeout, nullptr);
  }

  // Sends raw messages on one call, ignoring credits, and returns how the
  // server ended it.
  absl::Status RawCall(const std::string& method, const std::vector<std::string>& messages) {
    const auto channel = grpc::CreateChannel(address_, grpc::InsecureChannelCredentials());
    grpc::GenericStub stub(channel);
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
    grpc::CompletionQueue queue;
    void* tag = nullptr;
    bool ok = false;
    const auto call = stub.PrepareCall(&context, method, &queue);
    call->StartCall(nullptr);
    queue.Next(&tag, &ok);
    for (const std::string& message : messages) {
      const grpc::Slice slice(message);
      call->Write(grpc::ByteBuffer(&slice, 1), nullptr);
      if (!queue.Next(&tag, &ok) || !ok) break;
    }
    grpc::ByteBuffer reply;
    do {
      call->Read(&reply, nullptr);
    } while (queue.Next(&tag, &ok) && ok);
    grpc::Status status;
    call->Finish(&status, nullptr);
    queue.Next(&tag, &ok);
    queue.Shutdown();
    while (queue.Next(&tag, &ok)) {
    }
    return FromGrpcStatus(status);
  }
  absl::StatusCode RawCode(const std::vector<std::string>& messages) {
    return RawCall(kLinkMethod, messages).code();
  }

  Counter handler_;
  GrpcLinkService service_{&handler_, kMaxMessage};
  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
  std::string address_;
  std::unique_ptr<LinkSender> bystander_;
};

TEST_F(GrpcLinkTest, WrongMethodIsUnimplemented) {
  EXPECT_EQ(RawCall("/stagecoach.v1.StageLink/Upload", {Hello()}).code(),
            absl::StatusCode::kUnimplemented);
}

TEST_F(GrpcLinkTest, MalformedFramesEndTheirLink) {
  EXPECT_EQ(RawCode({"abc"}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(RawCode({std::string("\x40\0\0\0garbage", 11)}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(RawCode({""}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(RawCode({Message(Step(4))}),
            absl::StatusCode::kInvalidArgument);  // no hello first
  EXPECT_EQ(RawCode({Hello(), Message(Step(4)) + "x"}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(RawCode({Hello(), std::string("\xff\xff\xff\x7f....", 8)}),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(FrameCount(), 0);
}

TEST_F(GrpcLinkTest, OversizeMessageEndsItsLink) {
  EXPECT_EQ(RawCode({Hello(), std::string(kMaxMessage + 1, 'x')}),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(MakeGrpcLinkDialer(kMaxMessage)
                ->Dial(address_, v1::LinkHello(), kTimeout, nullptr)
                .value()
                ->Send(Step(kMaxMessage / 4))
                .code(),
            absl::StatusCode::kResourceExhausted);  // already at the sender, if
                                                    // it has the bound
}

TEST_F(GrpcLinkTest, SendingWithoutCreditEndsTheLink) {
  {
    absl::MutexLock lock(&handler_.mu);
    handler_.hold = true;
  }
  std::vector<std::string> messages(kLinkCredits + 2, Message(Step(4)));
  messages[0] = Hello();
  EXPECT_EQ(RawCode(messages), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(FrameCount(), static_cast<int>(kLinkCredits));
  absl::MutexLock lock(&handler_.mu);
  handler_.hold = false;
  handler_.held.clear();  // credits of a dead link may come back late
}

TEST_F(GrpcLinkTest, SilentPeerIsDroppedByTheHelloDeadline) {
  EXPECT_EQ(RawCode({}), absl::StatusCode::kDeadlineExceeded);
}

TEST_F(GrpcLinkTest, GarbageOnThePortHurtsNobody) {
  for (const std::string& garbage :
       {std::string("GET / HTTP/1.1\r\nHost: x\r\n\r\n"), std::string("\x16\x03\x01\x02\0\x01", 6),
        std::string(100000, '\xff'), std::string("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff")}) {
    const int fd = Connect(port_);
    EXPECT_GT(send(fd, garbage.data(), garbage.size(), MSG_NOSIGNAL), 0);
    close(fd);
  }
}

TEST_F(GrpcLinkTest, DialingAPeerThatNeverAnswersTimesOut) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  ASSERT_EQ(bind(fd, reinterpret_cast<sockaddr*>(&address), size), 0);
  ASSERT_EQ(listen(fd, 4), 0);  // connections complete, nobody accepts
  ASSERT_EQ(getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size), 0);
  const absl::Time start = absl::Now();
  const auto sender = MakeGrpcLinkDialer(kMaxMessage)
                          ->Dial(fmt::format("127.0.0.1:{}", ntohs(address.sin_port)),
                                 v1::LinkHello(), absl::Milliseconds(300), nullptr);
  EXPECT_EQ(sender.status().code(), absl::StatusCode::kDeadlineExceeded) << sender.status();
  EXPECT_LT(absl::Now() - start, absl::Seconds(2));
  close(fd);
}

// The bound is generous for loaded machines; `stagecoach bench hop` measures.
TEST(HopBenchTest, MeasuresBothTransports) {
  for (HopTransport transport : {HopTransport::kInProcess, HopTransport::kGrpc}) {
    const HopLatency hop = MeasureHop(transport, 16 << 10, 1000).value();
    EXPECT_EQ(hop.count, 1000);
    EXPECT_GT(hop.p50_us, 0);
    EXPECT_LE(hop.p50_us, hop.p99_us);
    EXPECT_LE(hop.p99_us, hop.max_us);
    EXPECT_LT(hop.p50_us, 5000);
    fmt::print("{} 16 KiB: p50 {:.1f} p90 {:.1f} p99 {:.1f} max {:.1f} us one way\n",
               transport == HopTransport::kGrpc ? "grpc" : "in-process", hop.p50_us, hop.p90_us,
               hop.p99_us, hop.max_us);
  }
}

}  // namespace
}  // namespace stagecoach
