#include "model/gguf_cursor.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "fmt/format.h"
#include "model/model_error.h"

namespace stagecoach {
namespace {

static_assert(std::endian::native == std::endian::little);

constexpr size_t kBufferBytes = 256 << 10;

}  // namespace

GgufCursor::GgufCursor(const RandomAccessFile& file) : file_(file), hash_(XXH3_createState()) {
  XXH3_128bits_reset(hash_.get());
}

absl::Status GgufCursor::Require(uint64_t bytes, std::string_view what) const {
  if (bytes <= remaining()) return absl::OkStatus();
  return MakeModelError(
      ModelError::kTruncated,
      fmt::format("{} needs {} bytes at byte {}, but the file ends at byte {}; fetch it again",
                  what, bytes, position_, file_.size()));
}

absl::Status GgufCursor::Refill() {
  XXH3_128bits_update(hash_.get(), buffer_.data(), buffer_.size());
  buffer_start_ += buffer_.size();
  buffer_.resize(std::min<uint64_t>(kBufferBytes, file_.size() - buffer_start_));
  return ReadFully(file_, buffer_start_, buffer_);
}

absl::Status GgufCursor::Read(std::span<std::byte> out, std::string_view what) {
  if (absl::Status status = Require(out.size(), what); !status.ok()) return status;
  while (!out.empty()) {
    if (position_ == buffer_start_ + buffer_.size()) {
      if (absl::Status status = Refill(); !status.ok()) return status;
    }
    const size_t at = position_ - buffer_start_;
    const size_t n = std::min(out.size(), buffer_.size() - at);
    std::memcpy(out.data(), buffer_.data() + at, n);
    out = out.subspan(n);
    position_ += n;
  }
  return absl::OkStatus();
}

absl::Status GgufCursor::HashUpTo(uint64_t end, std::string* hash) {
  end = std::min(end, file_.size());
  while (end > buffer_start_ + buffer_.size()) {
    if (absl::Status status = Refill(); !status.ok()) return status;
  }
  XXH3_128bits_update(hash_.get(), buffer_.data(), end - buffer_start_);
  const XXH128_hash_t digest = XXH3_128bits_digest(hash_.get());
  *hash = fmt::format("{:016x}{:016x}", digest.high64, digest.low64);
  position_ = end;
  return absl::OkStatus();
}

}  // namespace stagecoach
