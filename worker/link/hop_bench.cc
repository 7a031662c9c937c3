#include "worker/link/hop_bench.h"

#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "fmt/format.h"
#include "worker/link/grpc_link.h"
#include "worker/link/in_process_link.h"
#include "worker/link/spin_wait.h"

namespace stagecoach {
namespace {

constexpr absl::Duration kDialTimeout = absl::Seconds(10);
constexpr absl::Duration kRoundTripTimeout = absl::Seconds(10);
constexpr int kWarmUp = 100;
constexpr size_t kHeaderAllowance = 4096;

// Keeps the latest frame for a waiting thread.
class Mailbox : public LinkHandler {
 public:
  absl::Status OnLink(uint64_t, const v1::LinkHello&) override { return absl::OkStatus(); }
  void OnFrame(uint64_t, Frame frame, CreditReturn) override {
    absl::MutexLock lock(&mu_);
    frame_ = std::move(frame);
    full_ = true;
    arrivals_.fetch_add(1, std::memory_order_release);
  }
  void OnLinkClosed(uint64_t, const absl::Status&) override {
    absl::MutexLock lock(&mu_);
    closed_ = true;
  }

  // DEADLINE_EXCEEDED, or UNAVAILABLE once the link is closed.
  absl::StatusOr<Frame> Take(absl::Duration timeout) {
    SpinUntilArrival(arrivals_, taken_++, WhenWanted::kStay);  // as stages wait
    const auto ready = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return full_ || closed_; };
    absl::MutexLock lock(&mu_);
    if (!mu_.AwaitWithTimeout(absl::Condition(&ready), timeout)) {
      return absl::DeadlineExceededError(
          fmt::format("no frame came over the link within {}", absl::FormatDuration(timeout)));
    }
    if (!full_) return absl::UnavailableError("the link closed");
    full_ = false;
    return std::move(frame_);
  }

 private:
  std::atomic<uint64_t> arrivals_ = 0;
  uint64_t taken_ = 0;  // of the one thread that takes
  absl::Mutex mu_;
  Frame frame_ ABSL_GUARDED_BY(mu_);
  bool full_ ABSL_GUARDED_BY(mu_) = false;
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
};

// A listening end of either transport.
class Listener {
 public:
  Listener(InProcessHub* hub, std::string name, LinkHandler* handler)
      : hub_(hub), address_(std::move(name)) {
    hub_->Listen(address_, handler);
  }
  Listener(LinkHandler* handler, size_t max_message_bytes)
      : service_(std::make_unique<GrpcLinkService>(handler, max_message_bytes)) {
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    service_->Register(builder);
    server_ = builder.BuildAndStart();
    address_ = fmt::format("127.0.0.1:{}", port);
  }
  ~Listener() {
    if (hub_ != nullptr) hub_->StopListening(address_);
    if (service_ != nullptr) service_->Shutdown();
    if (server_ != nullptr) server_->Shutdown();
  }
  const std::string& address() const { return address_; }

 private:
  InProcessHub* hub_ = nullptr;
  std::unique_ptr<GrpcLinkService> service_;
  std::unique_ptr<grpc::Server> server_;
  std::string address_;
};

// Sends every frame that reaches it onwards until its link closes, from a thread of its own as a
// stage does.
void EchoLoop(Mailbox& in, LinkSender& out) {
  for (;;) {
    absl::StatusOr<Frame> frame = in.Take(kRoundTripTimeout);
    if (!frame.ok() || !out.Send(*std::move(frame)).ok()) return;
  }
}

absl::StatusOr<std::vector<double>> RoundTrips(Mailbox& back, LinkSender& out, const Frame& frame,
                                               int count, absl::Duration limit) {
  std::vector<double> micros;
  const absl::Time end = absl::Now() + limit;
  for (int i = 0; i < count && (i == 0 || absl::Now() < end); ++i) {
    const absl::Time start = absl::Now();
    if (absl::Status sent = out.Send(frame); !sent.ok()) return sent;
    if (auto echoed = back.Take(kRoundTripTimeout); !echoed.ok()) return echoed.status();
    micros.push_back(absl::ToDoubleMicroseconds(absl::Now() - start));
  }
  return micros;
}

}  // namespace

HopLatency SummariseHop(std::vector<double> round_trips) {
  std::sort(round_trips.begin(), round_trips.end());
  const size_t n = round_trips.size();
  const auto one_way = [&](double q) {
    return round_trips[std::min(n - 1, static_cast<size_t>(q * n))] / 2;
  };
  return {one_way(0.5), one_way(0.9), one_way(0.99), one_way(1.0), static_cast<int>(n)};
}

absl::StatusOr<HopLatency> MeasureHop(HopTransport transport, size_t bytes, int count,
                                      absl::Duration limit) {
  if (count < 1) return absl::InvalidArgumentError("count must be at least 1");
  const size_t max_message_bytes = bytes + kHeaderAllowance;
  Mailbox there, back;
  InProcessHub hub;
  std::unique_ptr<LinkDialer> grpc_dialer = MakeGrpcLinkDialer(max_message_bytes);
  const bool grpc = transport == HopTransport::kGrpc;
  const auto listen = [&](std::string name, Mailbox* mailbox) {
    return grpc ? std::make_unique<Listener>(mailbox, max_message_bytes)
                : std::make_unique<Listener>(&hub, std::move(name), mailbox);
  };
  LinkDialer& dialer = grpc ? *grpc_dialer : static_cast<LinkDialer&>(hub);
  const auto there_listener = listen("there", &there);
  const auto back_listener = listen("back", &back);
  auto out = dialer.Dial(there_listener->address(), v1::LinkHello(), kDialTimeout, nullptr);
  if (!out.ok()) return out.status();
  auto home = dialer.Dial(back_listener->address(), v1::LinkHello(), kDialTimeout, nullptr);
  if (!home.ok()) return home.status();

  Frame frame;
  frame.header.set_epoch(1);
  frame.header.mutable_step()->set_step(1);
  frame.header.mutable_step()->set_d_model(static_cast<uint32_t>(bytes / sizeof(float)));
  frame.payload = Payload(std::vector<float>(bytes / sizeof(float), 1.0f));
  std::thread echo([&] { EchoLoop(there, **home); });
  auto times = RoundTrips(back, **out, frame, kWarmUp, limit);
  if (times.ok()) times = RoundTrips(back, **out, frame, count, limit);
  (*out)->Close();  // the echo thread sees its link close
  echo.join();
  if (!times.ok()) return times.status();
  return SummariseHop(*std::move(times));
}

}  // namespace stagecoach
