#include "worker/host_tier.h"

#include <lz4.h>
#include <zstd.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <utility>

namespace stagecoach {
namespace {

constexpr size_t kChunkBytes = 1 << 20;  // compressed one by one, so that scratch stays small
constexpr int kZstdLevel = 1;
// Smaller tensors are kept as they are: too little to save, and no measure of their type.
constexpr uint64_t kLeastCompressedBytes = 64 << 10;

size_t ElementBytes(TensorType type) {
  if (type == TensorType::kF32) return 4;
  return type == TensorType::kF16 || type == TensorType::kBF16 ? 2 : 1;
}

// All first bytes of the elements, then all second bytes, ...; size is a multiple of `element`.
void Shuffle(std::span<const std::byte> in, size_t element, std::byte* out) {
  const size_t count = in.size() / element;
  for (size_t b = 0; b < element; ++b) {
    for (size_t i = 0; i < count; ++i) out[b * count + i] = in[i * element + b];
  }
}

void Unshuffle(const std::byte* in, size_t element, std::span<std::byte> out) {
  const size_t count = out.size() / element;
  for (size_t b = 0; b < element; ++b) {
    for (size_t i = 0; i < count; ++i) out[i * element + b] = in[b * count + i];
  }
}

size_t CompressBound(HostCodec codec) {
  return codec == HostCodec::kLz4 ? static_cast<size_t>(LZ4_compressBound(kChunkBytes))
                                  : ZSTD_compressBound(kChunkBytes);
}

// Compressed size, or 0 if it failed.
size_t Compress(HostCodec codec, std::span<const std::byte> in, std::vector<std::byte>& out) {
  if (codec == HostCodec::kLz4) {
    return static_cast<size_t>(std::max(
        0, LZ4_compress_default(reinterpret_cast<const char*>(in.data()),
                                reinterpret_cast<char*>(out.data()), static_cast<int>(in.size()),
                                static_cast<int>(out.size()))));
  }
  const size_t size = ZSTD_compress(out.data(), out.size(), in.data(), in.size(), kZstdLevel);
  return ZSTD_isError(size) ? 0 : size;
}

bool Decompress(HostCodec codec, std::span<const std::byte> in, std::span<std::byte> out) {
  if (codec == HostCodec::kLz4) {
    return LZ4_decompress_safe(reinterpret_cast<const char*>(in.data()),
                               reinterpret_cast<char*>(out.data()), static_cast<int>(in.size()),
                               static_cast<int>(out.size())) == static_cast<int>(out.size());
  }
  return ZSTD_decompress(out.data(), out.size(), in.data(), in.size()) == out.size();
}

}  // namespace

// Chunks of kChunkBytes; a chunk of the same size as its original is not compressed.
struct HostTier::Stored {
  void Add(HostCodec codec, size_t element, std::span<const std::byte> raw,
           std::vector<std::byte>& shuffled, std::vector<std::byte>& compressed) {
    size_t size = 0;
    if (codec != HostCodec::kNone) {
      Shuffle(raw, element, shuffled.data());
      size = Compress(codec, {shuffled.data(), raw.size()}, compressed);
    }
    const bool worth = size > 0 && size < raw.size();
    const std::span<const std::byte> kept =
        worth ? std::span<const std::byte>(compressed.data(), size) : raw;
    chunks.emplace_back(kept.begin(), kept.end());
    bytes += kept.size();
  }

  uint64_t bytes = 0;
  HostCodec codec = HostCodec::kNone;
  std::vector<std::vector<std::byte>> chunks;
};

void HostTier::SetWanted(std::vector<const TensorInfo*> tensors) {
  std::vector<std::shared_ptr<const Stored>> dropped;  // freed after the mutex
  absl::MutexLock lock(&mu_);
  wanted_ = {tensors.begin(), tensors.end()};
  for (auto it = held_.begin(); it != held_.end();) {
    if (wanted_.contains(it->first)) {
      ++it;
      continue;
    }
    stats_.bytes -= it->second->bytes;
    stats_.raw_bytes -= it->first->bytes;
    dropped.push_back(std::move(it->second));
    it = held_.erase(it);
  }
}

bool HostTier::Get(const TensorInfo& tensor, std::span<std::byte> out) {
  std::shared_ptr<const Stored> stored;
  {
    absl::MutexLock lock(&mu_);
    const auto it = held_.find(&tensor);
    if (it == held_.end()) return false;
    stored = it->second;
  }
  try {
    const size_t element = ElementBytes(tensor.type);
    std::vector<std::byte> shuffled(stored->codec == HostCodec::kNone ? 0 : kChunkBytes);
    for (size_t i = 0, at = 0; i < stored->chunks.size(); ++i, at += kChunkBytes) {
      const std::vector<std::byte>& chunk = stored->chunks[i];
      const std::span<std::byte> raw = out.subspan(at, std::min(kChunkBytes, out.size() - at));
      if (chunk.size() == raw.size()) {
        std::memcpy(raw.data(), chunk.data(), raw.size());
      } else {
        if (!Decompress(stored->codec, chunk, {shuffled.data(), raw.size()})) return false;
        Unshuffle(shuffled.data(), element, raw);
      }
    }
  } catch (const std::bad_alloc&) {
    return false;
  }
  absl::MutexLock lock(&mu_);
  ++stats_.hits;
  return true;
}

bool HostTier::Wants(const TensorInfo& tensor, uint64_t least_bytes) const {
  absl::MutexLock lock(&mu_);
  return wanted_.contains(&tensor) && !held_.contains(&tensor) &&
         stats_.bytes + least_bytes <= capacity_bytes_;
}

bool HostTier::TryCodec(const TensorInfo& tensor) const {
  absl::MutexLock lock(&mu_);
  return codec_ != HostCodec::kNone && tensor.bytes >= kLeastCompressedBytes &&
         !incompressible_.contains(tensor.type);
}

void HostTier::Put(const TensorInfo& tensor, std::span<const std::byte> raw) {
  const bool compress = TryCodec(tensor);
  if (!Wants(tensor, compress ? 1 : tensor.bytes)) return;
  auto stored = std::make_shared<Stored>();
  try {
    const size_t element = ElementBytes(tensor.type);
    std::vector<std::byte> shuffled(compress ? kChunkBytes : 0);
    std::vector<std::byte> compressed(compress ? CompressBound(codec_) : 0);
    stored->codec = compress ? codec_ : HostCodec::kNone;
    for (size_t at = 0; at < raw.size(); at += kChunkBytes) {
      const auto chunk = raw.subspan(at, std::min(kChunkBytes, raw.size() - at));
      stored->Add(stored->codec, element, chunk, shuffled, compressed);
      if (!Wants(tensor, stored->bytes)) return;
    }
    const bool pays = static_cast<double>(raw.size()) >= kLeastRatio * stored->bytes;
    if (compress) {
      absl::MutexLock lock(&mu_);
      stats_.tried_raw_bytes += raw.size();
      stats_.tried_bytes += stored->bytes;
      if (!pays) incompressible_.insert(tensor.type);
    }
    if (compress && !pays) {
      Put(tensor, raw);  // as it is: the type is not tried again
      return;
    }
  } catch (const std::bad_alloc&) {
    return;  // a cache may go without
  }
  absl::MutexLock lock(&mu_);
  if (!wanted_.contains(&tensor) || stats_.bytes + stored->bytes > capacity_bytes_) return;
  const uint64_t bytes = stored->bytes;
  if (!held_.try_emplace(&tensor, std::move(stored)).second) return;
  stats_.bytes += bytes;
  stats_.raw_bytes += tensor.bytes;
}

HostTierStats HostTier::Stats() const {
  absl::MutexLock lock(&mu_);
  return stats_;
}

}  // namespace stagecoach
