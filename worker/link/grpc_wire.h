// What both ends of a gRPC link agree on: the method, and frames as byte buffers.
#ifndef STAGECOACH_WORKER_LINK_GRPC_WIRE_H_
#define STAGECOACH_WORKER_LINK_GRPC_WIRE_H_

#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/status.h>

#include <cstddef>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "worker/link/frame.h"

namespace stagecoach {

inline constexpr char kLinkMethod[] = "/stagecoach.v1.StageLink/Connect";

// A peer that answers nothing for the sum of the two is taken for dead.
inline constexpr absl::Duration kLinkKeepaliveTime = absl::Seconds(10);
inline constexpr absl::Duration kLinkKeepaliveTimeout = absl::Seconds(5);

// Large enough that a frame of activations crosses in one HTTP/2 frame, without window updates.
inline constexpr int kLinkHttp2FrameBytes = 1 << 20;
inline constexpr int kLinkLookaheadBytes = 8 << 20;

// The payload's memory is referenced, not copied. Errors: RESOURCE_EXHAUSTED over
// max_message_bytes or the header bound.
absl::StatusOr<grpc::ByteBuffer> FrameToBuffer(const Frame& frame, size_t max_message_bytes);
// A message in one piece is viewed in place, otherwise joined by one copy. Errors: DecodeFrame's.
absl::StatusOr<Frame> BufferToFrame(const grpc::ByteBuffer& buffer, size_t max_message_bytes);

grpc::ByteBuffer ReplyToBuffer(const v1::LinkReply& reply);
absl::StatusOr<v1::LinkReply> BufferToReply(const grpc::ByteBuffer& buffer);

// Same codes; long messages are cut to what fits HTTP/2 trailers.
grpc::Status ToGrpcStatus(const absl::Status& status);
absl::Status FromGrpcStatus(const grpc::Status& status);

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_LINK_GRPC_WIRE_H_
