#include "worker/metrics.h"

#include <map>
#include <regex>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace stagecoach {
namespace {

using ::testing::HasSubstr;

TEST(MetricsTest, EverySampleIsDeclaredOnceAndWellFormed) {
  std::istringstream lines(FormatMetrics(LayerStoreStats(), {}));
  const std::regex sample(R"(([a-z_]+)(\{[a-z]+="[a-z]+"\})? (-?[0-9.e+-]+|inf|nan))");
  const std::regex comment(R"(# (HELP|TYPE) (stagecoach_worker_[a-z_]+) (.+))");
  std::map<std::string, std::string> types;
  std::set<std::string> seen;
  for (std::string line; std::getline(lines, line);) {
    std::smatch match;
    if (std::regex_match(line, match, comment)) {
      if (match[1] != "TYPE") continue;
      EXPECT_TRUE(types.emplace(match[2], match[3]).second) << line;
      EXPECT_EQ(match[3] == "counter", match[2].str().ends_with("_total")) << line;
      continue;
    }
    ASSERT_TRUE(std::regex_match(line, match, sample)) << line;
    EXPECT_TRUE(types.contains(match[1])) << line;
    EXPECT_TRUE(seen.insert(match[1].str() + match[2].str()).second) << line;
  }
  EXPECT_GT(types.size(), 20u);
}

TEST(MetricsTest, ValuesAreThoseOfTheStore) {
  const LayerStoreStats stats{.loaded_bytes = 12'345'678'901,
                              .misses = 7,
                              .stall_seconds = 0.25,
                              .streaming = true,
                              .host_bytes = 50,
                              .host_raw_bytes = 75};
  const std::string text = FormatMetrics(stats, {});
  EXPECT_THAT(text, HasSubstr("\nstagecoach_worker_loaded_bytes 12345678901\n"));
  EXPECT_THAT(text, HasSubstr("\nstagecoach_worker_acquire_misses_total 7\n"));
  EXPECT_THAT(text, HasSubstr("\nstagecoach_worker_stall_seconds_total 0.25\n"));
  EXPECT_THAT(text, HasSubstr("\nstagecoach_worker_streaming 1\n"));
  EXPECT_THAT(text, HasSubstr("\nstagecoach_worker_host_compression_ratio 1.5\n"));
}

TEST(MetricsTest, UnitsAreCountedByState) {
  const std::vector<UnitState> units = {UnitState::kResident, UnitState::kFailed,
                                        UnitState::kResident, UnitState::kQueued};
  const std::string text = FormatMetrics(LayerStoreStats(), units);
  EXPECT_THAT(text, HasSubstr("stagecoach_worker_units{state=\"resident\"} 2\n"));
  EXPECT_THAT(text, HasSubstr("stagecoach_worker_units{state=\"failed\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("stagecoach_worker_units{state=\"queued\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("stagecoach_worker_units{state=\"absent\"} 0\n"));
}

}  // namespace
}  // namespace stagecoach
