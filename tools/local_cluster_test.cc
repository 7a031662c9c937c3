// What the processes are started with; scripts in their place print it. The real binaries:
// tests/process_test.cc.
#include "tools/local_cluster.h"

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tools/service.h"

namespace stagecoach {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::StartsWith;

class LocalClusterTest : public testing::Test {
 protected:
  LocalClusterTest()
      : folder_(std::filesystem::temp_directory_path() /
                ("local_cluster_test." + std::to_string(getpid()))) {
    std::filesystem::create_directories(folder_);
    Script("stagecoach-coordinator", "echo listening on 127.0.0.1:1\nexec sleep 60");
    Script("stagecoach-worker", "echo \"$NODE: $*\"\nexec sleep 60");
  }
  ~LocalClusterTest() override { std::filesystem::remove_all(folder_); }

  void Script(const std::string& name, const std::string& text) {
    const std::filesystem::path path = folder_ / name;
    std::ofstream(path) << "#!/bin/sh\n" << text << "\n";
    std::filesystem::permissions(path, std::filesystem::perms::owner_all);
  }
  // The first lines of all workers of a cluster with these flags.
  std::vector<std::string> WorkerLines(const std::vector<std::string>& flags) {
    ServiceFlags service;
    CLI::App app;
    AddServiceFlags(app, service);
    std::vector<std::string> reversed(flags.rbegin(), flags.rend());
    app.parse(reversed);
    LocalClusterOptions options = ToClusterOptions(service);
    options.bin_dir = folder_;
    absl::Mutex mu;
    std::vector<std::string> lines;
    options.on_log = [&](const std::string& line) {
      absl::MutexLock lock(&mu);
      if (line.starts_with("[w")) lines.push_back(line);
    };
    const size_t workers = static_cast<size_t>(options.workers);
    const auto cluster = LocalCluster::Start(std::move(options));
    EXPECT_TRUE(cluster.ok()) << cluster.status();
    const auto all = [&] { return lines.size() == workers; };
    absl::MutexLock lock(&mu);
    EXPECT_TRUE(mu.AwaitWithTimeout(absl::Condition(&all), absl::Seconds(20)));
    return lines;
  }

  const std::filesystem::path folder_;
};

TEST_F(LocalClusterTest, WorkerIOnGpuI) {
  const std::vector<std::string> lines =
      WorkerLines({"--model", "m.gguf", "--workers", "3", "--device", "cuda:{}", "--transport",
                   "nccl", "--worker-env", "NODE=node{}"});
  for (const std::string index : {"0", "1", "2"}) {
    EXPECT_THAT(lines, Contains(AllOf(StartsWith("[w" + index + "] node" + index + ": "),
                                      HasSubstr("--name w" + index + " "),
                                      HasSubstr("--device cuda:" + index + " "),
                                      HasSubstr("--transport nccl"), HasSubstr("--model m.gguf"))));
  }
}

TEST_F(LocalClusterTest, AllWorkersOnOneGpu) {
  const std::vector<std::string> lines =
      WorkerLines({"--model", "m.gguf", "--workers", "2", "--device", "cuda:1"});
  EXPECT_THAT(lines,
              testing::Each(AllOf(HasSubstr("--device cuda:1 "), HasSubstr("--transport auto"))));
}

}  // namespace
}  // namespace stagecoach
