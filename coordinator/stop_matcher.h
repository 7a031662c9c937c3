// Finds stop strings in text that arrives piece by piece.
#ifndef STAGECOACH_COORDINATOR_STOP_MATCHER_H_
#define STAGECOACH_COORDINATOR_STOP_MATCHER_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace stagecoach {

// What may be shown never depends on how the text was cut into pieces: the stop string that is
// complete first wins (of several that end at the same byte, the longest). O(stops) amortised per
// byte. Not thread-safe.
class StopMatcher {
 public:
  struct Output {
    std::string text;                  // may be shown now, after everything before
    std::optional<size_t> stop_index;  // the stop string that has just matched
  };

  // Empty stop strings never match. With include_stop the stop string itself is shown too.
  StopMatcher(std::vector<std::string> stops, bool include_stop);

  // Holds back the longest end of the text that a stop string may begin with. After a match the
  // rest of the text is dropped, and later calls return nothing.
  Output Push(std::string_view text);
  // The text has ended: what is held back. Nothing after a match.
  std::string Flush();

  bool matched() const { return matched_; }

 private:
  // Knuth-Morris-Pratt: `borders`[i] = length of the longest proper border of the first i + 1
  // bytes.
  struct Stop {
    std::string text;
    std::vector<uint32_t> borders;
    size_t progress = 0;  // length of the longest prefix that the text seen so far ends with
  };

  static void Advance(char byte, Stop* stop);

  const bool include_stop_;
  std::vector<Stop> stops_;
  std::string held_;
  bool matched_ = false;
};

}  // namespace stagecoach

#endif  // STAGECOACH_COORDINATOR_STOP_MATCHER_H_
