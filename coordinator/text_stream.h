// The text of one sequence, made of its tokens as they come.
#ifndef STAGECOACH_COORDINATOR_TEXT_STREAM_H_
#define STAGECOACH_COORDINATOR_TEXT_STREAM_H_

#include <cstdint>
#include <string>
#include <vector>

#include "coordinator/stop_matcher.h"
#include "model/tokenizer.h"

namespace stagecoach {

// Not thread-safe; the tokenizer must outlive it.
class TextStream {
 public:
  struct Options {
    std::vector<std::string> stops;
    bool include_stop = false;    // the stop string that matched is shown too
    bool at_start = false;        // the first token starts a text (see Detokenizer)
    bool render_special = false;  // control tokens are shown as their pieces
  };
  using Output = StopMatcher::Output;

  TextStream(const Tokenizer* tokenizer, Options options);

  // The text that may be shown now that `id` has come, always whole UTF-8 characters, and the stop
  // string that it completed. Nothing after a match. Requires 0 <= id < vocab_size().
  Output Push(int32_t id);
  // The sequence has ended: what was held back. Call once; nothing after a match.
  Output Flush();

 private:
  Detokenizer detokenizer_;
  StopMatcher matcher_;
};

}  // namespace stagecoach

#endif  // STAGECOACH_COORDINATOR_TEXT_STREAM_H_
