#include "coordinator/stop_matcher.h"

#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "gtest/gtest.h"

namespace stagecoach {
namespace {

struct Result {
  std::string text;
  std::optional<size_t> stop_index;
  friend bool operator==(const Result&, const Result&) = default;
};

std::ostream& operator<<(std::ostream& out, const Result& result) {
  return out << '"' << result.text << "\" stop "
             << (result.stop_index ? std::to_string(*result.stop_index) : "none");
}

// Everything that is shown when `pieces` arrive one after the other.
Result Shown(const std::vector<std::string>& stops, bool include_stop,
             const std::vector<std::string>& pieces) {
  StopMatcher matcher(stops, include_stop);
  Result result;
  for (const std::string& piece : pieces) {
    const StopMatcher::Output output = matcher.Push(piece);
    result.text += output.text;
    if (output.stop_index) {
      EXPECT_FALSE(result.stop_index.has_value());
      result.stop_index = output.stop_index;
    }
  }
  result.text += matcher.Flush();
  return result;
}

// The definition, by looking at every prefix of the whole text.
Result ShownByDefinition(const std::vector<std::string>& stops, bool include_stop,
                         const std::string& text) {
  for (size_t end = 1; end <= text.size(); ++end) {
    const std::string seen = text.substr(0, end);
    size_t longest = 0;
    Result result;
    for (size_t s = 0; s < stops.size(); ++s) {
      const size_t length = stops[s].size();
      if (length > longest && length <= end && seen.substr(end - length) == stops[s]) {
        longest = length;
        result.stop_index = s;
      }
    }
    if (longest == 0) continue;
    result.text = include_stop ? seen : seen.substr(0, end - longest);
    return result;
  }
  return {text, std::nullopt};
}

TEST(StopMatcherTest, NoStopsPassEverythingAtOnce) {
  StopMatcher matcher({}, false);
  EXPECT_EQ(matcher.Push("abc").text, "abc");
  EXPECT_EQ(matcher.Flush(), "");
}

TEST(StopMatcherTest, HoldsBackOnlyWhatMayBecomeAStop) {
  StopMatcher matcher({"\n\nUser:"}, false);
  EXPECT_EQ(matcher.Push("Hello\n").text, "Hello");
  EXPECT_EQ(matcher.Push("\n").text, "");
  EXPECT_EQ(matcher.Push("\n").text, "\n");  // the last two line breaks may still be the start
  EXPECT_EQ(matcher.Push("Us").text, "");
  const StopMatcher::Output last = matcher.Push("er: hi");
  EXPECT_EQ(last.text, "");
  EXPECT_EQ(last.stop_index, 0u);
  EXPECT_TRUE(matcher.matched());
  EXPECT_EQ(matcher.Push("more").text, "");
  EXPECT_EQ(matcher.Flush(), "");
}

TEST(StopMatcherTest, FlushReturnsAnUnfinishedStop) {
  StopMatcher matcher({"STOP"}, false);
  EXPECT_EQ(matcher.Push("a STO").text, "a ");
  EXPECT_EQ(matcher.Flush(), "STO");
  EXPECT_FALSE(matcher.matched());
}

TEST(StopMatcherTest, IncludeStopShowsIt) {
  EXPECT_EQ(Shown({"ab", "END"}, true, {"xE", "ND", "y"}), (Result{"xEND", 1}));
  EXPECT_EQ(Shown({"ab", "END"}, false, {"xE", "ND", "y"}), (Result{"x", 1}));
}

TEST(StopMatcherTest, FirstCompleteWinsThenTheLongest) {
  EXPECT_EQ(Shown({"abcd", "bc"}, false, {"xabcd"}), (Result{"xa", 1}));
  EXPECT_EQ(Shown({"c", "abc"}, false, {"xabc"}), (Result{"x", 1}));
}

TEST(StopMatcherTest, EmptyStopNeverMatches) {
  EXPECT_EQ(Shown({"", "b"}, false, {"aab"}), (Result{"aa", 1}));
}

TEST(StopMatcherTest, AgreesWithTheDefinitionHoweverTheTextIsCut) {
  std::mt19937 random(1);
  const auto random_text = [&](int longest) {
    std::string text(std::uniform_int_distribution<int>(0, longest)(random), 'a');
    for (char& c : text) c = "aab"[random() % 3];
    return text;
  };
  int matches = 0;
  for (int round = 0; round < 20000; ++round) {
    std::vector<std::string> stops(random() % 4);
    for (std::string& stop : stops) stop = random_text(6);
    const std::string text = random_text(20);
    std::vector<std::string> pieces;
    for (size_t pos = 0; pos < text.size();) {
      pieces.push_back(text.substr(pos, random() % 4));
      pos += pieces.back().size();
    }
    const bool include_stop = random() % 2;
    const Result expected = ShownByDefinition(stops, include_stop, text);
    ASSERT_EQ(Shown(stops, include_stop, pieces), expected) << text;
    matches += expected.stop_index.has_value();
  }
  EXPECT_GT(matches, 2000);
}

TEST(StopMatcherTest, LongSelfSimilarStopIsLinear) {
  const std::string stop = std::string(1 << 16, 'a') + "b";
  StopMatcher matcher({stop}, false);
  std::string shown;
  for (int i = 0; i < 16; ++i) shown += matcher.Push(std::string(1 << 16, 'a')).text;
  const StopMatcher::Output last = matcher.Push("b");
  EXPECT_EQ(shown.size() + last.text.size(), size_t{15} << 16);
  EXPECT_EQ(last.stop_index, 0u);
}

}  // namespace
}  // namespace stagecoach
