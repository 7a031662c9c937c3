// A frame: what crosses a StageLink. Header and payload stay apart so that activations are neither
// copied into nor parsed out of a protobuf.
#ifndef STAGECOACH_WORKER_LINK_FRAME_H_
#define STAGECOACH_WORKER_LINK_FRAME_H_

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "proto/stage.pb.h"

namespace stagecoach {

inline constexpr uint32_t kProtocolVersion = 1;
inline constexpr size_t kMaxFrameHeaderBytes = 4 << 20;

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

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_LINK_FRAME_H_
