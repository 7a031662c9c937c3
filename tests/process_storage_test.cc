// How the real binaries read weights, and what they say of it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "model/test_paths.h"
#include "tests/process_fixture.h"

namespace stagecoach {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

// The lines that the processes of a cluster log. Outlives the cluster. Thread-safe.
class Log {
 public:
  LocalClusterOptions Into(LocalClusterOptions options) {
    options.on_log = [this](const std::string& line) {
      absl::MutexLock lock(&mu_);
      text_ += line + "\n";
    };
    return options;
  }
  bool Await(const std::string& text) {
    const auto has = [&]() ABSL_SHARED_LOCKS_REQUIRED(mu_) {
      return text_.find(text) != std::string::npos;
    };
    absl::MutexLock lock(&mu_);
    return mu_.AwaitWithTimeout(absl::Condition(&has), absl::Seconds(10));
  }

 private:
  absl::Mutex mu_;
  std::string text_ ABSL_GUARDED_BY(mu_);
};

class ProcessStorageTest : public testing::Test {
 protected:
  ProcessStorageTest() { std::filesystem::create_directories(folder_); }
  ~ProcessStorageTest() override { std::filesystem::remove_all(folder_); }

  // The first tokens of the story from one worker with these flags.
  std::vector<int32_t> Tokens(std::vector<std::string> worker_flags, Log& log) {
    LocalClusterOptions options = Options(1);
    options.worker_flags = std::move(worker_flags);
    const auto service = MustServe(log.Into(std::move(options)));
    if (service == nullptr) return {};
    const Generated generated = Generate(service->client(), Prompt(kStory, 20));
    EXPECT_TRUE(generated.status.ok()) << generated.status;
    return generated.tokens;
  }

  // Why a worker with this manifest refuses to start.
  Finished Refusal(const std::string& manifest) {
    return RunBinary({"stagecoach-worker", "--model", kModel, "--coordinator", "127.0.0.1:1",
                      "--manifest", manifest});
  }

  const std::filesystem::path folder_ =
      testing::TempDir() + "process_storage_test." + std::to_string(::getpid());
};

TEST_F(ProcessStorageTest, NeitherTheWayOfReadingNorPrefetchChangesATokenAndMetricsComeOnSignal) {
  Log log;
  LocalClusterOptions options = Options(1);
  options.worker_flags = {"--io", "buffered"};
  const auto service = MustServe(log.Into(std::move(options)));
  ASSERT_NE(service, nullptr);
  const Generated expected = Generate(service->client(), Prompt(kStory, 20));
  ASSERT_EQ(expected.tokens.size(), 20u);
  EXPECT_TRUE(log.Await("reads of weights are buffered"));
  ASSERT_EQ(kill(service->cluster()->worker_pid(0), SIGUSR1), 0);
  EXPECT_TRUE(log.Await("stagecoach_worker_units{state=\"resident\"} 34"));
  EXPECT_TRUE(log.Await("stagecoach_worker_host_compression_ratio"));
  EXPECT_TRUE(Generate(service->client(), Prompt(kStory, 1)).status.ok()) << "it works on";

  Log direct_log, off_log;
  EXPECT_EQ(Tokens({"--io", "direct"}, direct_log), expected.tokens);
  EXPECT_TRUE(direct_log.Await("reads of weights are "));  // direct if the file system can
  EXPECT_EQ(Tokens({"--prefetch", "off"}, off_log), expected.tokens);
}

TEST_F(ProcessStorageTest, AManifestIsCheckedAtStartAndAtEveryFirstRead) {
  const std::string path = folder_ / "manifest", wrong = folder_ / "wrong";
  const Finished written = RunBinary({"stagecoach", "inspect", kModel, "--hash", "-o", path});
  ASSERT_EQ(written.exit_code, 0) << written.output;
  Log log;
  EXPECT_EQ(Tokens({"--manifest", path}, log).size(), 20u);

  EXPECT_EQ(
      RunBinary({"stagecoach", "inspect", TestDataPath("demo2-Q8_0.gguf"), "--hash", "-o", wrong})
          .exit_code,
      0);
  const Finished other = Refusal(wrong);
  EXPECT_EQ(other.exit_code, 2) << other.output;
  EXPECT_THAT(other.output, AllOf(HasSubstr("CORRUPT"), HasSubstr("manifest")));
  const Finished none = Refusal(kModel);
  EXPECT_EQ(none.exit_code, 2) << none.output;
  EXPECT_EQ(Refusal(folder_ / "missing").exit_code, 2);

  // One digit of one hash: noticed when the tensor is read, and told with its name.
  std::stringstream text;
  text << std::ifstream(path).rdbuf();
  std::string lines = text.str();
  const size_t at = lines.find("blk.3.attn_q.weight");
  ASSERT_NE(at, std::string::npos);
  char& digit = lines[lines.rfind('\n', at) + 1];
  digit = digit == '0' ? '1' : '0';
  std::ofstream(wrong) << lines;
  LocalClusterOptions options = Options(1);
  options.worker_flags = {"--manifest", wrong};
  auto cluster = LocalCluster::Start(log.Into(std::move(options)));
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  Client client((*cluster)->address());
  std::string detail;
  const absl::Time deadline = absl::Now() + absl::Seconds(10);
  while (detail.find("CORRUPT") == std::string::npos && absl::Now() < deadline) {
    const auto status = client.GetStatus();
    ASSERT_TRUE(status.ok()) << status.status();
    if (status->stages_size() > 0) detail = status->stages(0).detail();
    absl::SleepFor(absl::Milliseconds(20));
  }
  EXPECT_THAT(detail, AllOf(HasSubstr("layer 3"), HasSubstr("blk.3.attn_q.weight")));
  const Generated failed = Generate(client, Prompt(kStory, 5), absl::Now() + absl::Seconds(10));
  EXPECT_EQ(failed.status.code(), absl::StatusCode::kUnavailable) << failed.status;
}

TEST_F(ProcessStorageTest, StatusShowsWhatStreams) {
  LocalClusterOptions options = Options(2);
  options.worker_flags = {"--weight-budget",    "50%", "--host-cache", "100MB",
                          "--host-cache-codec", "lz4"};
  Log log;
  const auto service = MustServe(log.Into(std::move(options)));
  ASSERT_NE(service, nullptr);
  ASSERT_TRUE(Generate(service->client(), Prompt(kStory, 20)).status.ok());
  absl::SleepFor(absl::Milliseconds(1100));  // two heartbeats
  const std::string address = service->cluster()->address();
  const Finished table = RunBinary({"stagecoach", "status", "--server", address});
  EXPECT_EQ(table.exit_code, 0) << table.output;
  EXPECT_THAT(table.output, AllOf(HasSubstr("budget"), HasSubstr("evicted"), HasSubstr("packed")));
  std::printf("%s", table.output.c_str());
  const Finished json = RunBinary({"stagecoach", "status", "--server", address, "--json"});
  EXPECT_THAT(json.output,
              AllOf(HasSubstr("\"streaming\": true"), HasSubstr("\"host_tier\": true"),
                    testing::ContainsRegex("\"residency\": \"[Rsrcq.]*R[Rsrcq.]*\""),
                    HasSubstr("\"hit_ratio\": "), HasSubstr("\"file_bytes_per_second\": "),
                    HasSubstr("\"stalled\": false")));

  const auto resident = MustServe(1);
  ASSERT_NE(resident, nullptr);
  const Finished plain =
      RunBinary({"stagecoach", "status", "--server", resident->cluster()->address()});
  EXPECT_EQ(plain.exit_code, 0) << plain.output;
  EXPECT_THAT(plain.output, Not(HasSubstr("evicted")));
}

}  // namespace
}  // namespace stagecoach
