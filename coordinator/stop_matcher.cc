#include "coordinator/stop_matcher.h"

#include <algorithm>
#include <utility>

namespace stagecoach {

StopMatcher::StopMatcher(std::vector<std::string> stops, bool include_stop)
    : include_stop_(include_stop) {
  stops_.reserve(stops.size());
  for (std::string& text : stops) {
    Stop stop{.text = std::move(text)};
    // Borders by matching the string against itself, one byte late.
    stop.borders.reserve(stop.text.size());
    for (size_t i = 0; i < stop.text.size(); ++i) {
      if (i > 0) Advance(stop.text[i], &stop);
      stop.borders.push_back(static_cast<uint32_t>(stop.progress));
    }
    stop.progress = 0;
    stops_.push_back(std::move(stop));
  }
}

// Requires stop->progress < stop->text.size().
void StopMatcher::Advance(char byte, Stop* stop) {
  while (stop->progress > 0 && stop->text[stop->progress] != byte) {
    stop->progress = stop->borders[stop->progress - 1];
  }
  if (stop->text[stop->progress] == byte) ++stop->progress;
}

StopMatcher::Output StopMatcher::Push(std::string_view text) {
  Output output;
  if (matched_) return output;
  for (size_t i = 0; i < text.size(); ++i) {
    size_t matched_length = 0;
    for (size_t s = 0; s < stops_.size(); ++s) {
      Stop& stop = stops_[s];
      if (stop.text.empty()) continue;
      Advance(text[i], &stop);
      if (stop.progress == stop.text.size() && stop.progress > matched_length) {
        matched_length = stop.progress;
        output.stop_index = s;
      }
    }
    if (!output.stop_index) continue;
    matched_ = true;
    output.text = std::exchange(held_, "").append(text.substr(0, i + 1));
    if (!include_stop_) output.text.resize(output.text.size() - matched_length);
    return output;
  }
  size_t held = 0;
  for (const Stop& stop : stops_) held = std::max(held, stop.progress);
  output.text = std::move(held_).append(text);
  held_ = output.text.substr(output.text.size() - held);
  output.text.resize(output.text.size() - held);
  return output;
}

std::string StopMatcher::Flush() { return std::exchange(held_, ""); }

}  // namespace stagecoach
