// Worker processes on GPUs whose activations go by NCCL. On one GPU NCCL is told that each process
// is a host of its own; with several GPUs the same tests run on two of them as well. Skipped, with
// the reason, where there is no GPU or no NCCL.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "kernels/device.h"
#include "tests/process_fixture.h"
#include "worker/link/nccl/nccl_transport.h"

namespace stagecoach {
namespace {

using ::testing::HasSubstr;

// What the processes log, with the time.
class Log {
 public:
  void Add(const std::string& line) {
    std::fprintf(stderr, "%s\n", line.c_str());
    absl::MutexLock lock(&mu_);
    lines_.push_back({absl::Now(), line});
  }
  // Lines with both words since `since`; waits for the first one, at most `timeout`.
  int Count(const std::string& word, const std::string& other, absl::Time since = {},
            absl::Duration timeout = absl::ZeroDuration()) {
    const absl::Time end = absl::Now() + timeout;
    for (;;) {
      int count = 0;
      {
        absl::MutexLock lock(&mu_);
        for (const auto& [time, line] : lines_) {
          count += time >= since && line.find(word) != std::string::npos &&
                   line.find(other) != std::string::npos;
        }
      }
      if (count > 0 || absl::Now() >= end) return count;
      absl::SleepFor(absl::Milliseconds(1));
    }
  }

 private:
  struct Line {
    absl::Time time;
    std::string text;
  };
  absl::Mutex mu_;
  std::vector<Line> lines_ ABSL_GUARDED_BY(mu_);
};

std::vector<int32_t> Sampled(Client& client, const std::string& animal) {
  v1::GenerateRequest request =
      Prompt("[INST] Tell me a story about a " + animal + ". [/INST]", 60);
  request.mutable_sampling()->set_temperature(0.9f);
  request.mutable_sampling()->set_seed(42);
  const Generated generated = Generate(client, request);
  EXPECT_TRUE(generated.status.ok()) << generated.status;
  EXPECT_FALSE(generated.tokens.empty());
  return generated.tokens;
}

// GPUs that two workers use: the same one, or one each.
class ProcessNcclTest : public testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    for (int gpu = 0; gpu < GetParam(); ++gpu) {
      const auto device = OpenDevice("cuda:" + std::to_string(gpu), {});
      if (!device.ok()) GTEST_SKIP() << device.status();
    }
    if (const auto nccl = OpenNccl({}); !nccl.ok()) GTEST_SKIP() << nccl.status();
  }

  LocalClusterOptions GpuOptions(int workers, const std::string& transport) {
    LocalClusterOptions options = Options(workers);
    const bool own = GetParam() > 1 && workers > 1;
    options.worker_flags = {"--device", own ? "cuda:{}" : "cuda:0", "--transport", transport};
    if (transport == "nccl" && GetParam() == 1) {
      options.worker_environment = {"NCCL_HOSTID=node{}", "NCCL_SOCKET_IFNAME=lo",
                                    "NCCL_IB_DISABLE=1"};
    }
    options.on_log = [this](const std::string& line) { log_.Add(line); };
    return options;
  }

  Log log_;
};

TEST_P(ProcessNcclTest, TheSameTokensAsOverGrpcAndInOneProcess) {
  std::vector<std::vector<int32_t>> expected;
  for (const auto& [workers, transport] :
       {std::pair(1, "grpc"), std::pair(2, "grpc"), std::pair(2, "nccl")}) {
    auto service = MustServe(GpuOptions(workers, transport));
    ASSERT_NE(service, nullptr);
    std::vector<std::vector<int32_t>> tokens(4);
    std::vector<std::thread> clients;
    const char* const animals[] = {"fox", "otter", "bear", "crow"};
    for (size_t i = 0; i < tokens.size(); ++i) {
      clients.emplace_back([&, i] { tokens[i] = Sampled(service->client(), animals[i]); });
    }
    for (std::thread& client : clients) client.join();
    if (expected.empty()) expected = tokens;
    EXPECT_EQ(tokens, expected) << workers << " workers over " << transport;
    EXPECT_EQ(log_.Count("activations go by NCCL", "[w"), transport == std::string("nccl") ? 1 : 0);
  }
}

TEST_P(ProcessNcclTest, AfterAKillTheOtherRankAbortsWithinTwoSecondsAndRejoins) {
  auto service = MustServe(GpuOptions(2, "nccl"));
  ASSERT_NE(service, nullptr);
  LocalCluster& cluster = *service->cluster();
  const std::vector<int32_t> before = Sampled(service->client(), "fox");
  for (const int victim : {1, 0}) {
    const pid_t survivor = cluster.worker_pid(1 - victim);
    const int restarts = cluster.restarts();
    std::atomic<bool> streaming = false;
    std::thread client([&] {
      v1::GenerateRequest request = Prompt("Once upon a time", 900);
      request.set_ignore_eos(true);
      const absl::Status status = service->client().Generate(request, absl::InfiniteFuture(),
                                                             [&](const v1::GenerateEvent&) {
                                                               streaming = true;
                                                               return true;
                                                             });
      EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
      streaming = true;
    });
    while (!streaming) absl::SleepFor(absl::Milliseconds(1));
    const absl::Time killed = absl::Now();
    ASSERT_EQ(kill(cluster.worker_pid(victim), SIGKILL), 0);
    EXPECT_EQ(log_.Count("NCCL communicators aborted", "[w" + std::to_string(1 - victim), killed,
                         absl::Seconds(2)),
              1);
    client.join();
    const absl::Time deadline = absl::Now() + absl::Seconds(20);
    while (cluster.restarts() == restarts && absl::Now() < deadline) {
      absl::SleepFor(absl::Milliseconds(10));
    }
    const absl::Status serving = service->client().WaitUntilServing(
        absl::Seconds(60), [&](const auto&) { return cluster.Health(); });
    ASSERT_TRUE(serving.ok()) << serving;
    EXPECT_EQ(Sampled(service->client(), "fox"), before);
    EXPECT_EQ(cluster.worker_pid(1 - victim), survivor);
    EXPECT_GE(log_.Count("activations", "by NCCL", killed), 2);
  }
}

TEST_P(ProcessNcclTest, TwoRanksOnOneDeviceAreRefusedOrFallBack) {
  if (GetParam() > 1) GTEST_SKIP() << "of one GPU only";
  std::vector<std::string> command = {
      "stagecoach", "up",     "--once",   "--model", kModel,         "--workers", "2",
      "--device",   "cuda:0", "--prompt", "Hello",   "--max-tokens", "3",         "--transport"};
  command.push_back("nccl");
  const Finished refused = RunBinary(command);
  EXPECT_EQ(refused.exit_code, 2) << refused.output;
  EXPECT_THAT(refused.output, HasSubstr("two ranks on one device"));
  command.back() = "auto";
  const Finished fallen_back = RunBinary(command);
  EXPECT_EQ(fallen_back.exit_code, 0) << fallen_back.output;
  EXPECT_THAT(fallen_back.output, testing::Not(HasSubstr("by NCCL")));
}

INSTANTIATE_TEST_SUITE_P(Gpus, ProcessNcclTest, testing::Values(1, 2));

}  // namespace
}  // namespace stagecoach
