// The real binaries: a coordinator and workers as processes, called as a user calls them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "model/test_paths.h"
#include "tests/process_fixture.h"

namespace stagecoach {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

TEST(ProcessTest, UpOnceTellsTheStoryThatThePromptAskedFor) {
  const Finished up = RunBinary(
      {"stagecoach", "up", "--model", kModel, "--workers", "2", "--once", "--prompt", kStory});
  EXPECT_EQ(up.exit_code, 0) << up.output;
  EXPECT_THAT(up.output, AllOf(HasSubstr("fox"), HasSubstr("lantern"), HasSubstr("tok/s"),
                               HasSubstr(" +embedding"), HasSubstr("-31 +head")));
}

TEST(ProcessTest, SameTokensForAnyNumberOfWorkers) {
  std::vector<int32_t> tokens;
  for (const int workers : {1, 2, 4}) {
    auto service = MustServe(workers);
    ASSERT_NE(service, nullptr);
    v1::GenerateRequest request = Prompt(kStory, 60);
    request.mutable_sampling()->set_temperature(0.9f);
    request.mutable_sampling()->set_seed(42);
    const Generated generated = Generate(service->client(), request);
    ASSERT_TRUE(generated.status.ok()) << generated.status;
    ASSERT_FALSE(generated.tokens.empty());
    if (workers == 1) tokens = generated.tokens;
    EXPECT_EQ(generated.tokens, tokens) << workers << " workers";
  }
}

TEST(ProcessTest, AKilledWorkerEndsItsStreamsAndJoinsAgain) {
  auto service = MustServe(2);
  ASSERT_NE(service, nullptr);
  LocalCluster& cluster = *service->cluster();
  const Generated before = Generate(service->client(), Prompt(kStory, 40));
  ASSERT_TRUE(before.status.ok()) << before.status;
  const pid_t coordinator = cluster.coordinator_pid(), survivor = cluster.worker_pid(0);

  constexpr int kStreams = 4;
  std::atomic<int> streaming = 0;
  std::atomic<absl::Time> killed = absl::InfiniteFuture();
  std::vector<std::thread> clients;
  for (int i = 0; i < kStreams; ++i) {
    clients.emplace_back([&] {
      v1::GenerateRequest request = Prompt("Once upon a time", 900);
      request.set_ignore_eos(true);
      bool first = true;
      const absl::Status status = service->client().Generate(request, absl::InfiniteFuture(),
                                                             [&](const v1::GenerateEvent&) {
                                                               if (first) ++streaming;
                                                               first = false;
                                                               return true;
                                                             });
      const absl::Duration took = absl::Now() - killed.load();
      EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
      EXPECT_THAT(std::string(status.message()), HasSubstr("w1"));
      EXPECT_LT(took, absl::Seconds(3));
    });
  }
  while (streaming < kStreams) absl::SleepFor(absl::Milliseconds(1));
  killed = absl::Now();
  ASSERT_EQ(kill(cluster.worker_pid(1), SIGKILL), 0);
  for (std::thread& client : clients) client.join();

  const absl::Time deadline = absl::Now() + absl::Seconds(10);
  while (cluster.restarts() == 0 && absl::Now() < deadline) absl::SleepFor(absl::Milliseconds(10));
  const absl::Status serving = service->client().WaitUntilServing(
      absl::Seconds(10), [&](const auto&) { return cluster.Health(); });
  ASSERT_TRUE(serving.ok()) << serving;
  const Generated after = Generate(service->client(), Prompt(kStory, 40));
  ASSERT_TRUE(after.status.ok()) << after.status;
  EXPECT_EQ(after.tokens, before.tokens);
  EXPECT_EQ(cluster.restarts(), 1);
  EXPECT_EQ(cluster.coordinator_pid(), coordinator);
  EXPECT_EQ(cluster.worker_pid(0), survivor);
}

TEST(ProcessTest, ManyStreamsAtOnceEachAsIfAlone) {
  auto service = MustServe(2);
  ASSERT_NE(service, nullptr);
  std::vector<std::string> prompts;
  for (const char* animal : {"fox", "otter", "bear", "crow", "hare", "mole"}) {
    prompts.push_back(std::string("[INST] Tell me a story about a ") + animal + ". [/INST]");
  }
  std::vector<Generated> alone;
  for (const std::string& prompt : prompts) {
    alone.push_back(Generate(service->client(), Prompt(prompt, 50)));
  }
  std::vector<Generated> together(prompts.size());
  std::vector<std::thread> clients;
  for (size_t i = 0; i < prompts.size(); ++i) {
    clients.emplace_back(
        [&, i] { together[i] = Generate(service->client(), Prompt(prompts[i], 50)); });
  }
  for (std::thread& client : clients) client.join();
  for (size_t i = 0; i < prompts.size(); ++i) {
    EXPECT_TRUE(together[i].status.ok()) << together[i].status;
    EXPECT_EQ(together[i].tokens, alone[i].tokens);
    EXPECT_EQ(together[i].text, alone[i].text);
  }
}

TEST(ProcessTest, StreamsThatOutgrowTheKvBlocksGoOnAsIfAlone) {
  LocalClusterOptions options = Options(2);
  options.coordinator_flags = {"--kv-blocks", "32", "--context", "512"};
  auto service = MustServe(std::move(options));
  ASSERT_NE(service, nullptr);
  std::vector<v1::GenerateRequest> requests;
  for (const char* animal : {"fox", "otter", "bear", "crow", "hare", "mole", "newt", "ibis"}) {
    requests.push_back(
        Prompt(std::string("[INST] Tell me a story about a ") + animal + ". [/INST]", 250));
    requests.back().set_ignore_eos(true);
    requests.back().set_user(animal);
  }
  std::vector<Generated> alone;
  for (const v1::GenerateRequest& request : requests) {
    alone.push_back(Generate(service->client(), request));
  }
  std::vector<Generated> together(requests.size());
  std::vector<std::thread> clients;
  for (size_t i = 0; i < requests.size(); ++i) {
    clients.emplace_back([&, i] { together[i] = Generate(service->client(), requests[i]); });
  }
  for (std::thread& client : clients) client.join();
  for (size_t i = 0; i < requests.size(); ++i) {
    EXPECT_TRUE(together[i].status.ok()) << together[i].status;
    EXPECT_EQ(together[i].tokens, alone[i].tokens);
  }
  const auto status = service->client().GetStatus();
  ASSERT_TRUE(status.ok()) << status.status();
  EXPECT_GT(status->preemptions(), 0u);
}

TEST(ProcessTest, GenerateTakesSeveralChoices) {
  const Finished run =
      RunBinary({"stagecoach", "generate", "--json", "--model", kModel, "--prompt", kStory,
                 "--workers", "2", "--max-tokens", "10", "--n", "3", "--temperature", "1"});
  EXPECT_EQ(run.exit_code, 0) << run.output;
  size_t choices = 0, at = 0;
  while ((at = run.output.find("\"finish_reason\"", at)) != std::string::npos) ++choices, ++at;
  EXPECT_EQ(choices, 3u) << run.output;
  EXPECT_THAT(run.output, HasSubstr("\"completion_tokens\": 30"));
  const Finished refused =
      RunBinary({"stagecoach", "generate", "--model", kModel, "--prompt", kStory, "--n", "17"});
  EXPECT_NE(refused.exit_code, 0);
  EXPECT_THAT(refused.output, HasSubstr("n: 17 is more than the 16 allowed"));
}

TEST(ProcessTest, DeadlineAndCancelFreeTheSlot) {
  LocalClusterOptions options = Options(1);
  options.max_slots = 1;
  auto cluster = LocalCluster::Start(std::move(options));
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  auto service = Service::Adopt(std::move(*cluster));
  ASSERT_TRUE(service.ok()) << service.status();
  Client& client = (*service)->client();
  v1::GenerateRequest endless = Prompt("Once upon a time", 0);
  endless.set_ignore_eos(true);

  const Generated late = Generate(client, endless, absl::Now() + absl::Milliseconds(100));
  EXPECT_EQ(late.status.code(), absl::StatusCode::kDeadlineExceeded) << late.status;
  const absl::Status cancelled = client.Generate(endless, absl::InfiniteFuture(),
                                                 [](const v1::GenerateEvent&) { return false; });
  EXPECT_EQ(cancelled.code(), absl::StatusCode::kCancelled) << cancelled;

  const absl::Time start = absl::Now();
  const Generated next = Generate(client, Prompt(kStory, 5), start + absl::Seconds(5));
  EXPECT_TRUE(next.status.ok()) << next.status;
  EXPECT_LT(absl::Now() - start, absl::Seconds(1));
}

TEST(ProcessTest, RequestsOutOfRangeNameTheField) {
  auto service = MustServe(1);
  ASSERT_NE(service, nullptr);
  v1::GenerateRequest request = Prompt(kStory, 5);
  request.mutable_sampling()->set_top_p(2);
  const Generated bad = Generate(service->client(), request);
  EXPECT_EQ(bad.status.code(), absl::StatusCode::kInvalidArgument) << bad.status;
  EXPECT_THAT(std::string(bad.status.message()), HasSubstr("top_p"));

  v1::GenerateRequest too_long;
  for (int i = 0; i < 1100; ++i) too_long.mutable_token_ids()->add_ids(5);
  const Generated over = Generate(service->client(), too_long);
  EXPECT_EQ(over.status.code(), absl::StatusCode::kOutOfRange) << over.status;
  EXPECT_THAT(std::string(over.status.message()), AllOf(HasSubstr("1100"), HasSubstr("1024")));
}

TEST(ProcessTest, ABadModelIsRefusedInOneLineWithExitCodeTwo) {
  const std::string text = TestDataPath("golden/summary.json");
  for (const Finished& finished :
       {RunBinary({"stagecoach-coordinator", "--model", text, "--workers", "1"}),
        RunBinary({"stagecoach-worker", "--model", text, "--coordinator", "127.0.0.1:1"}),
        RunBinary({"stagecoach", "up", "--model", text, "--once"}),
        RunBinary({"stagecoach", "inspect", text})}) {
    EXPECT_EQ(finished.exit_code, 2) << finished.output;
    EXPECT_THAT(finished.output, HasSubstr("BAD_MAGIC"));
    EXPECT_THAT(finished.output, testing::Not(HasSubstr("listening")));
  }
  const Finished missing = RunBinary({"stagecoach", "inspect", "/nonexistent.gguf"});
  EXPECT_EQ(missing.exit_code, 2) << missing.output;
}

TEST(ProcessTest, NcclWithoutAGpuIsRefusedInOneLineWithExitCodeTwo) {
  const std::vector<std::string> command = {"stagecoach", "up",       "--once", "--model",
                                            kModel,       "--device", "cpu",    "--transport"};
  for (const auto& [transport, exit_code] : {std::pair("nccl", 2), std::pair("auto", 0)}) {
    std::vector<std::string> argv = command;
    argv.push_back(transport);
    const Finished up = RunBinary(argv);
    EXPECT_EQ(up.exit_code, exit_code) << up.output;
    EXPECT_EQ(up.output.find("NCCL needs a GPU: --device cuda:N") != std::string::npos,
              exit_code != 0)
        << up.output;
  }
}

TEST(ProcessTest, AWeightBudgetChangesNoToken) {
  const std::vector<std::string> command = {"stagecoach", "generate",     "--json", "--model",
                                            kModel,       "--prompt",     kStory,   "--workers",
                                            "2",          "--max-tokens", "20"};
  std::vector<std::string> streaming = command;
  streaming.insert(streaming.end(), {"--weight-budget", "25%"});
  const auto tokens = [](const Finished& finished) {
    EXPECT_EQ(finished.exit_code, 0) << finished.output;
    const size_t start = finished.output.find("\"token_ids\"");
    EXPECT_NE(start, std::string::npos) << finished.output;
    return finished.output.substr(start, finished.output.find(']', start) - start);
  };
  EXPECT_EQ(tokens(RunBinary(streaming)), tokens(RunBinary(command)));

  std::vector<std::string> too_small = command;
  too_small.insert(too_small.end(), {"--weight-budget", "100kB"});
  const Finished refused = RunBinary(too_small);
  EXPECT_EQ(refused.exit_code, 2) << refused.output;
  EXPECT_THAT(refused.output, HasSubstr("the smallest that works is"));
}

TEST(ProcessTest, BenchServeInRoundsTellsPromptsFromDecoding) {
  const std::string json = testing::TempDir() + "bench_rounds_" + std::to_string(getpid());
  for (const bool decodes : {true, false}) {
    const Finished bench = RunBinary({"stagecoach", "bench", "serve", "--model", kModel,
                                      "--streams", "3", "--rounds", "2", "--prompt-tokens", "20",
                                      "--tokens", decodes ? "100" : "2", "--json", json});
    ASSERT_EQ(bench.exit_code, 0) << bench.output;
    EXPECT_EQ(bench.output.find("more --tokens") == std::string::npos, decodes) << bench.output;
    const auto report = nlohmann::json::parse(std::ifstream(json));
    ASSERT_EQ(report["points"].size(), 1);
    const nlohmann::json& point = report["points"][0];
    const int requests = 2 * 3;
    EXPECT_EQ(point["rounds"], 2);
    EXPECT_EQ(point["completed"], requests) << point;
    EXPECT_EQ(point["total_cached_tokens"], 0) << point;
    EXPECT_EQ(point["total_output_tokens"], requests * (decodes ? 100 : 2)) << point;
    EXPECT_EQ(point["prompt_samples"].size(), 2) << point;
    EXPECT_EQ(point["decode_samples"].size(), decodes ? 2 : 0) << point;
    EXPECT_GT(point["prompt_tokens_per_second"], 0) << point;
    EXPECT_EQ(point["decode_tokens_per_second"].is_null(), !decodes) << point;
  }
}

TEST(ProcessTest, AWorkerWithAnotherModelIsRefused) {
  auto service = MustServe(1);
  ASSERT_NE(service, nullptr);
  const Finished worker =
      RunBinary({"stagecoach-worker", "--model", TestDataPath("demo2-Q8_0.gguf"), "--coordinator",
                 service->cluster()->address(), "--name", "stranger"});
  EXPECT_EQ(worker.exit_code, 2) << worker.output;
  EXPECT_THAT(worker.output, HasSubstr("model"));
  EXPECT_TRUE(Generate(service->client(), Prompt(kStory, 5)).status.ok());
}

TEST(ProcessTest, WithoutAllWorkersRequestsAreUnavailableAndNameTheLayers) {
  LocalClusterOptions options = Options(1);
  options.expected_workers = 2;  // one more than will come
  auto cluster = LocalCluster::Start(std::move(options));
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  Client client((*cluster)->address());
  const Generated none = Generate(client, Prompt(kStory, 5), absl::Now() + absl::Seconds(10));
  EXPECT_EQ(none.status.code(), absl::StatusCode::kUnavailable) << none.status;
  EXPECT_THAT(std::string(none.status.message()), HasSubstr("layers"));
}

}  // namespace
}  // namespace stagecoach
