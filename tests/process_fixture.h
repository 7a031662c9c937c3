// For tests of the real binaries: services as processes, requests in short.
#ifndef STAGECOACH_TESTS_PROCESS_FIXTURE_H_
#define STAGECOACH_TESTS_PROCESS_FIXTURE_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/clock.h"
#include "model/test_paths.h"
#include "tests/stage_chain.h"
#include "tools/child_process.h"
#include "tools/client.h"
#include "tools/local_cluster.h"
#include "tools/service.h"

namespace stagecoach {

inline const std::string kModel = TestDataPath("demo-Q4_K_M.gguf");
inline const std::string kStory = "[INST] Tell me a story about a fox and a lantern. [/INST]";

inline LocalClusterOptions Options(int workers) {
  LocalClusterOptions options;
  options.model = kModel;
  options.workers = workers;
  options.threads = 1;
  options.bin_dir = TestBinaryDir();
  options.on_log = [](const std::string& line) { std::fprintf(stderr, "%s\n", line.c_str()); };
  return options;
}

inline std::unique_ptr<Service> MustServe(LocalClusterOptions options) {
  auto cluster = LocalCluster::Start(std::move(options));
  EXPECT_TRUE(cluster.ok()) << cluster.status();
  if (!cluster.ok()) return nullptr;
  auto service = Service::Adopt(std::move(*cluster));
  EXPECT_TRUE(service.ok()) << service.status();
  return service.ok() ? std::move(*service) : nullptr;
}

inline std::unique_ptr<Service> MustServe(int workers) { return MustServe(Options(workers)); }

inline v1::GenerateRequest Prompt(const std::string& text, uint32_t max_tokens) {
  v1::GenerateRequest request;
  request.set_text(text);
  request.set_max_tokens(max_tokens);
  return request;
}

struct Generated {
  absl::Status status;
  std::string text;
  std::vector<int32_t> tokens;
};

inline Generated Generate(Client& client, const v1::GenerateRequest& request,
                          absl::Time deadline = absl::InfiniteFuture()) {
  Generated out;
  out.status = client.Generate(request, deadline, [&](const v1::GenerateEvent& event) {
    out.text += event.text();
    for (const auto& token : event.tokens()) {
      EXPECT_EQ(token.index(), out.tokens.size());
      out.tokens.push_back(token.token_id());
    }
    return true;
  });
  return out;
}

struct Finished {
  int exit_code = -1;
  std::string output;
};

inline Finished RunBinary(std::vector<std::string> argv) {
  argv[0] = TestBinaryDir() + "/" + argv[0];
  Finished finished;
  auto child =
      ChildProcess::Start(argv, [&](const std::string& line) { finished.output += line + "\n"; });
  EXPECT_TRUE(child.ok()) << child.status();
  const absl::Time deadline = absl::Now() + absl::Seconds(60);
  while ((*child)->running() && absl::Now() < deadline) absl::SleepFor(absl::Milliseconds(10));
  (*child)->DrainOutput();
  finished.exit_code = (*child)->ExitCode();
  return finished;
}

}  // namespace stagecoach

#endif  // STAGECOACH_TESTS_PROCESS_FIXTURE_H_
