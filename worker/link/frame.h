// A frame: what crosses a StageLink. Header and payload stay apart so that activations are neither
// copied into nor parsed out of a protobuf.
#ifndef STAGECOACH_WORKER_LINK_FRAME_H_
#define STAGECOACH_WORKER_LINK_FRAME_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "proto/stage.pb.h"

namespace stagecoach {

inline constexpr uint32_t kProtocolVersion = 2;
inline constexpr int kMaxStepTokens = 16384;  // rows that a frame may carry, whatever the plan
inline constexpr int kMaxSlots = 1024;
inline constexpr size_t kMaxFrameHeaderBytes = 1 << 20;
// Encoded headers are padded so that the payload starts at a multiple of this in the message.
inline constexpr size_t kPayloadAlignment = 16;

// Shared, immutable float32 values. Copying a Payload shares the bytes.
class Payload {
 public:
  Payload() = default;
  explicit Payload(std::vector<float> values);
  // `owner` keeps `values` alive.
  Payload(std::span<const float> values, std::shared_ptr<const void> owner);

  std::span<const float> values() const { return values_; }
  const std::shared_ptr<const void>& owner() const { return owner_; }

 private:
  std::span<const float> values_;
  std::shared_ptr<const void> owner_;
};

struct Frame {
  v1::FrameHeader header;
  Payload payload;
};

// The largest payload that a link of this model may carry.
size_t MaxPayloadBytes(int d_model, int vocab_size, int max_step_tokens);

// --- Codec. One frame is one message:
//   [u32 LE length of the next part][FrameHeader, padded by its field `padding`][payload bytes]
// The payload is float32 little-endian.

// The first two parts; the message is complete once the payload's bytes follow.
// Errors: RESOURCE_EXHAUSTED over kMaxFrameHeaderBytes.
absl::StatusOr<std::string> EncodeHeader(const v1::FrameHeader& header);

// `owner` keeps `message` alive: the payload is viewed in place when its bytes are aligned for
// float, and copied once otherwise. Errors: INVALID_ARGUMENT for bytes that are not a frame (or a
// frame without a body); RESOURCE_EXHAUSTED for a header or payload over its bound.
absl::StatusOr<Frame> DecodeFrame(std::span<const std::byte> message,
                                  std::shared_ptr<const void> owner, size_t max_payload_bytes);

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_LINK_FRAME_H_
