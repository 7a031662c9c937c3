#include "worker/link/frame.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <utility>

#include "fmt/format.h"

namespace stagecoach {
namespace {

static_assert(std::endian::native == std::endian::little,
              "payloads are sent as they lie in memory");

constexpr size_t kLengthBytes = sizeof(uint32_t);
constexpr char kPaddingTag = (v1::FrameHeader::kPaddingFieldNumber << 3) | 2;  // length-delimited

bool IsAlignedForFloat(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % alignof(float) == 0;
}

// The smallest encoding of the padding field that brings `size` to a multiple of the alignment.
std::string PaddingField(size_t size) {
  size_t bytes = (kPayloadAlignment - size % kPayloadAlignment) % kPayloadAlignment;
  if (bytes == 0) return "";
  if (bytes == 1) bytes += kPayloadAlignment;  // tag and length take two
  std::string field(bytes, '\0');
  field[0] = kPaddingTag;
  field[1] = static_cast<char>(bytes - 2);
  return field;
}

Payload MakePayload(std::span<const std::byte> bytes, std::shared_ptr<const void> owner) {
  const size_t count = bytes.size() / sizeof(float);
  if (count == 0) return Payload();
  if (IsAlignedForFloat(bytes.data())) {
    return Payload(std::span(reinterpret_cast<const float*>(bytes.data()), count),
                   std::move(owner));
  }
  std::vector<float> values(count);
  std::memcpy(values.data(), bytes.data(), bytes.size());
  return Payload(std::move(values));
}

}  // namespace

Payload::Payload(std::vector<float> values) {
  auto owned = std::make_shared<const std::vector<float>>(std::move(values));
  values_ = *owned;
  owner_ = std::move(owned);
}

Payload::Payload(std::span<const float> values, std::shared_ptr<const void> owner)
    : values_(values), owner_(std::move(owner)) {}

size_t MaxPayloadBytes(int d_model, int vocab_size, int max_step_tokens) {
  const uint64_t columns = std::max({d_model, vocab_size, 0});
  const uint64_t rows = std::max(max_step_tokens, 0);  // both < 2^31: the product fits
  return std::min<uint64_t>(columns * rows, std::numeric_limits<int64_t>::max() / sizeof(float)) *
         sizeof(float);
}

absl::StatusOr<std::string> EncodeHeader(const v1::FrameHeader& header) {
  const size_t size = header.ByteSizeLong();
  const std::string padding = PaddingField(kLengthBytes + size);
  if (size + padding.size() > kMaxFrameHeaderBytes) {
    return absl::ResourceExhaustedError(
        fmt::format("frame header of {} bytes is over the limit of {}", size + padding.size(),
                    kMaxFrameHeaderBytes));
  }
  const uint32_t length = static_cast<uint32_t>(size + padding.size());
  std::string out(kLengthBytes, '\0');
  std::memcpy(out.data(), &length, kLengthBytes);
  header.AppendToString(&out);
  return out + padding;
}

absl::StatusOr<Frame> DecodeFrame(std::span<const std::byte> message,
                                  std::shared_ptr<const void> owner, size_t max_payload_bytes) {
  uint32_t length = 0;
  if (message.size() < kLengthBytes) {
    return absl::InvalidArgumentError(
        fmt::format("a frame of {} bytes has no header length", message.size()));
  }
  std::memcpy(&length, message.data(), kLengthBytes);
  if (length > kMaxFrameHeaderBytes) {
    return absl::ResourceExhaustedError(fmt::format(
        "frame header of {} bytes is over the limit of {}", length, kMaxFrameHeaderBytes));
  }
  message = message.subspan(kLengthBytes);
  if (length > message.size()) {
    return absl::InvalidArgumentError(
        fmt::format("frame header of {} bytes, but {} follow", length, message.size()));
  }
  const std::span<const std::byte> payload = message.subspan(length);
  if (payload.size() % sizeof(float) != 0) {
    return absl::InvalidArgumentError(
        fmt::format("payload of {} bytes is not a whole number of float32", payload.size()));
  }
  if (payload.size() > max_payload_bytes) {
    return absl::ResourceExhaustedError(fmt::format("payload of {} bytes is over the limit of {}",
                                                    payload.size(), max_payload_bytes));
  }
  Frame frame;
  if (!frame.header.ParseFromArray(message.data(), static_cast<int>(length))) {
    return absl::InvalidArgumentError("frame header does not parse");
  }
  if (frame.header.body_case() == v1::FrameHeader::BODY_NOT_SET) {
    return absl::InvalidArgumentError("frame has no known body");
  }
  frame.header.clear_padding();
  frame.payload = MakePayload(payload, std::move(owner));
  return frame;
}

}  // namespace stagecoach
