#include "worker/link/grpc_wire.h"

#include <grpcpp/support/slice.h>

#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "fmt/format.h"

namespace stagecoach {
namespace {

constexpr size_t kMaxStatusMessageBytes = 1024;

std::span<const std::byte> SliceBytes(const grpc::Slice& slice) {
  return {reinterpret_cast<const std::byte*>(slice.begin()), slice.size()};
}

// A slice over memory that `owner` keeps alive.
grpc::Slice SharedSlice(std::span<const float> values, std::shared_ptr<const void> owner) {
  using Owner = std::shared_ptr<const void>;
  return grpc::Slice(
      const_cast<float*>(values.data()), values.size_bytes(),
      [](void* owner) { delete static_cast<Owner*>(owner); }, new Owner(std::move(owner)));
}

}  // namespace

absl::StatusOr<grpc::ByteBuffer> FrameToBuffer(const Frame& frame, size_t max_message_bytes) {
  const absl::StatusOr<std::string> header = EncodeHeader(frame.header);
  if (!header.ok()) return header.status();
  const std::span<const float> values = frame.payload.values();
  if (header->size() + values.size_bytes() > max_message_bytes) {
    return absl::ResourceExhaustedError(fmt::format("frame of {} bytes is over the limit of {}",
                                                    header->size() + values.size_bytes(),
                                                    max_message_bytes));
  }
  const grpc::Slice slices[] = {
      grpc::Slice(*header),
      values.empty() ? grpc::Slice() : SharedSlice(values, frame.payload.owner())};
  return grpc::ByteBuffer(slices, values.empty() ? 1 : 2);
}

absl::StatusOr<Frame> BufferToFrame(const grpc::ByteBuffer& buffer, size_t max_message_bytes) {
  auto whole = std::make_shared<grpc::Slice>();
  if (buffer.TrySingleSlice(whole.get()).ok()) {
    // `whole`, not a copy of it, is the owner: short slices hold their bytes within themselves.
    const std::span<const std::byte> bytes = SliceBytes(*whole);
    return DecodeFrame(bytes, std::move(whole), max_message_bytes);
  }
  const size_t size = buffer.Length();
  if (size > max_message_bytes) {
    return absl::ResourceExhaustedError(
        fmt::format("message of {} bytes is over the limit of {}", size, max_message_bytes));
  }
  std::vector<grpc::Slice> slices;
  if (!buffer.Dump(&slices).ok()) return absl::InvalidArgumentError("message has no bytes");
  const std::shared_ptr<std::byte[]> joined(new std::byte[size]);
  size_t filled = 0;
  for (const grpc::Slice& slice : slices) {
    if (slice.size() == 0) continue;
    std::memcpy(joined.get() + filled, slice.begin(), slice.size());
    filled += slice.size();
  }
  return DecodeFrame(std::span(joined.get(), filled), joined, max_message_bytes);
}

grpc::ByteBuffer ReplyToBuffer(const v1::LinkReply& reply) {
  const grpc::Slice slice(reply.SerializeAsString());
  return grpc::ByteBuffer(&slice, 1);
}

absl::StatusOr<v1::LinkReply> BufferToReply(const grpc::ByteBuffer& buffer) {
  grpc::Slice slice;
  v1::LinkReply reply;
  if (!buffer.DumpToSingleSlice(&slice).ok() ||
      !reply.ParseFromArray(slice.begin(), static_cast<int>(slice.size()))) {
    return absl::InvalidArgumentError("link reply does not parse");
  }
  return reply;
}

grpc::Status ToGrpcStatus(const absl::Status& status) {
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()),
                      std::string(status.message().substr(0, kMaxStatusMessageBytes)));
}

absl::Status FromGrpcStatus(const grpc::Status& status) {
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
}

}  // namespace stagecoach
