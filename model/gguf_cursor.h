// Sequential reading of a GGUF header through one bounded buffer.
#ifndef STAGECOACH_MODEL_GGUF_CURSOR_H_
#define STAGECOACH_MODEL_GGUF_CURSOR_H_

#include <xxhash.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "absl/status/status.h"
#include "model/file.h"

namespace stagecoach {

// Reads forward only. `what` names the thing being read in error messages. Not thread-safe.
class GgufCursor {
 public:
  // `file` must outlive the cursor.
  explicit GgufCursor(const RandomAccessFile& file);

  uint64_t position() const { return position_; }
  uint64_t remaining() const { return file_.size() - position_; }

  // Fills `out`. Errors: kTruncated, kIo.
  absl::Status Read(std::span<std::byte> out, std::string_view what);

  // Reads one little-endian number (the host is little-endian, as everywhere in the project).
  template <typename T>
  absl::Status ReadNumber(T* out, std::string_view what) {
    static_assert(std::is_arithmetic_v<T>);
    return Read(std::as_writable_bytes(std::span<T>(out, 1)), what);
  }

  // kTruncated unless the file has `bytes` more bytes.
  absl::Status Require(uint64_t bytes, std::string_view what) const;

  // xxh3-128 in hex of the file's bytes from 0 to `end` (at most the file's size), where
  // position() <= end. Moves the position there; call once, last.
  absl::Status HashUpTo(uint64_t end, std::string* hash);

 private:
  struct FreeHash {
    void operator()(XXH3_state_t* state) const { XXH3_freeState(state); }
  };

  absl::Status Refill();  // hashes the used-up buffer and reads the next

  const RandomAccessFile& file_;
  uint64_t position_ = 0;
  std::vector<std::byte> buffer_;  // bytes [buffer_start_, buffer_start_ + buffer_.size())
  uint64_t buffer_start_ = 0;
  std::unique_ptr<XXH3_state_t, FreeHash> hash_;  // of bytes [0, buffer_start_)
};

}  // namespace stagecoach

#endif  // STAGECOACH_MODEL_GGUF_CURSOR_H_
