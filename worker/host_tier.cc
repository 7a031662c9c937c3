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

bool HostTensor::Read(uint64_t offset, std::span<std::byte> out) const {
  if (whole_ != nullptr) {
    std::memcpy(out.data(), whole_->data() + offset, out.size());
    return true;
  }
  try {
    std::vector<std::byte> scratch(2 * kChunkBytes);
    for (const Chunk& chunk : chunks_) {
      const uint64_t begin = std::max(chunk.offset, offset);
      const uint64_t end = std::min(chunk.offset + chunk.raw_bytes, offset + out.size());
      if (begin >= end) continue;
      const std::span<std::byte> wanted = out.subspan(begin - offset, end - begin);
      if (wanted.size() == chunk.raw_bytes) {
        if (!ReadChunk(chunk, scratch, wanted)) return false;
        continue;
      }
      const std::span<std::byte> all =
          std::span<std::byte>(scratch).subspan(kChunkBytes, chunk.raw_bytes);
      if (!ReadChunk(chunk, scratch, all)) return false;
      std::memcpy(wanted.data(), all.data() + (begin - chunk.offset), wanted.size());
    }
  } catch (const std::bad_alloc&) {
    return false;
  }
  return true;
}

bool HostTensor::ReadChunk(const Chunk& chunk, std::span<std::byte> scratch,
                           std::span<std::byte> out) const {
  if (chunk.data.size() == chunk.raw_bytes) {
    std::memcpy(out.data(), chunk.data.data(), out.size());
    return true;
  }
  if (!Decompress(codec_, chunk.data, scratch.first(chunk.raw_bytes))) return false;
  Unshuffle(scratch.data(), element_, out);
  return true;
}

HostTierWriter::HostTierWriter(HostTier* tier, const TensorInfo* tensor)
    : tier_(tier), tensor_(tensor), compress_(tier->TryCodec(*tensor)) {
  if (!tier_->Wants(*tensor_, compress_ ? 1 : tensor_->bytes)) {
    tier_ = nullptr;
    return;
  }
  held_ = std::make_shared<HostTensor>();
  held_->element_ = ElementBytes(tensor->type);
}

void HostTierWriter::Append(std::span<const std::byte> raw) {
  if (tier_ == nullptr) return;
  bool ok = false;
  try {
    ok = compress_ ? AppendCompressed(raw) : AppendWhole(raw);
  } catch (const std::bad_alloc&) {
    // A cache may go without.
  }
  if (!ok) *this = HostTierWriter();
}

bool HostTierWriter::AppendWhole(std::span<const std::byte> raw) {
  if (raw.size() > tensor_->bytes - written_) return false;
  if (memory_ == nullptr) memory_ = tier_->allocate_(tensor_->bytes);
  if (memory_ == nullptr) return false;
  std::memcpy(memory_->data() + written_, raw.data(), raw.size());
  written_ += raw.size();
  held_->bytes_ = written_;
  return true;
}

bool HostTierWriter::AppendCompressed(std::span<const std::byte> raw) {
  held_->codec_ = tier_->codec_;
  shuffled_.resize(kChunkBytes);
  compressed_.resize(CompressBound(held_->codec_));
  for (size_t at = 0; at < raw.size(); at += kChunkBytes) {
    const auto chunk = raw.subspan(at, std::min(kChunkBytes, raw.size() - at));
    Shuffle(chunk, held_->element_, shuffled_.data());
    const size_t size = Compress(held_->codec_, {shuffled_.data(), chunk.size()}, compressed_);
    const bool worth = size > 0 && size < chunk.size();
    const std::span<const std::byte> kept =
        worth ? std::span<const std::byte>(compressed_).first(size) : chunk;
    held_->chunks_.push_back({written_, chunk.size(), {kept.begin(), kept.end()}});
    held_->bytes_ += kept.size();
    written_ += chunk.size();
    if (!tier_->Wants(*tensor_, held_->bytes_)) return false;
  }
  return true;
}

bool HostTierWriter::StartOver() {
  if (!tier_->Wants(*tensor_, tensor_->bytes)) return false;
  memory_ = tier_->allocate_(tensor_->bytes);
  if (memory_ == nullptr || !held_->Read(0, {memory_->data(), tensor_->bytes})) return false;
  held_->chunks_.clear();
  held_->bytes_ = tensor_->bytes;
  return true;
}

void HostTierWriter::Finish() {
  if (tier_ == nullptr || written_ != tensor_->bytes) return;
  if (compress_ && !tier_->NoteTry(*tensor_, held_->bytes_) && !StartOver()) return;
  held_->whole_ = std::move(memory_);
  tier_->Keep(*tensor_, std::move(held_));
  *this = HostTierWriter();
}

void HostTier::SetWanted(std::vector<const TensorInfo*> tensors) {
  std::vector<std::shared_ptr<const HostTensor>> dropped;  // freed after the mutex
  absl::MutexLock lock(&mu_);
  wanted_ = {tensors.begin(), tensors.end()};
  for (auto it = held_.begin(); it != held_.end();) {
    if (wanted_.contains(it->first)) {
      ++it;
      continue;
    }
    stats_.bytes -= it->second->bytes();
    stats_.raw_bytes -= it->first->bytes;
    dropped.push_back(std::move(it->second));
    it = held_.erase(it);
  }
}

std::shared_ptr<const HostTensor> HostTier::Find(const TensorInfo& tensor) {
  absl::MutexLock lock(&mu_);
  const auto it = held_.find(&tensor);
  if (it == held_.end()) return nullptr;
  ++stats_.hits;
  return it->second;
}

HostTierWriter HostTier::Write(const TensorInfo& tensor) { return {this, &tensor}; }

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

bool HostTier::NoteTry(const TensorInfo& tensor, uint64_t bytes) {
  const bool pays = static_cast<double>(tensor.bytes) >= kLeastRatio * static_cast<double>(bytes);
  absl::MutexLock lock(&mu_);
  stats_.tried_raw_bytes += tensor.bytes;
  stats_.tried_bytes += bytes;
  if (!pays) incompressible_.insert(tensor.type);
  return pays;
}

void HostTier::Keep(const TensorInfo& tensor, std::shared_ptr<const HostTensor> held) {
  absl::MutexLock lock(&mu_);
  if (!wanted_.contains(&tensor) || stats_.bytes + held->bytes() > capacity_bytes_) return;
  const uint64_t bytes = held->bytes();
  if (!held_.try_emplace(&tensor, std::move(held)).second) return;
  stats_.bytes += bytes;
  stats_.raw_bytes += tensor.bytes;
}

HostTierStats HostTier::Stats() const {
  absl::MutexLock lock(&mu_);
  return stats_;
}

}  // namespace stagecoach
