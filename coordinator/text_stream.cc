#include "coordinator/text_stream.h"

#include <utility>

namespace stagecoach {

TextStream::TextStream(const Tokenizer* tokenizer, Options options)
    : detokenizer_(tokenizer, options.at_start, options.render_special),
      matcher_(std::move(options.stops), options.include_stop) {}

TextStream::Output TextStream::Push(int32_t id) { return matcher_.Push(detokenizer_.Push(id)); }

TextStream::Output TextStream::Flush() {
  Output output = matcher_.Push(detokenizer_.Flush());
  output.text += matcher_.Flush();
  return output;
}

}  // namespace stagecoach
