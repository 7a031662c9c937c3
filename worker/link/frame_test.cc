#include "worker/link/frame.h"

#include <cstring>
#include <limits>

#include "gtest/gtest.h"

namespace stagecoach {
namespace {

v1::FrameHeader StepOf(int tokens) {
  v1::FrameHeader header;
  header.set_epoch(7);
  header.mutable_step()->set_step(3);
  for (int i = 0; i < tokens; ++i) header.mutable_step()->add_token_ids(i);
  return header;
}

// An encoded frame in aligned memory, `shift` bytes after a 16-byte boundary.
struct Message {
  Message(const v1::FrameHeader& header, std::vector<float> values, size_t shift = 0)
      : Message(EncodeHeader(header).value(), std::move(values), shift) {}
  Message(const std::string& head, std::vector<float> values, size_t shift) {
    size = head.size() + values.size() * sizeof(float);
    memory = std::shared_ptr<std::byte[]>(new std::byte[size + shift + 1]);
    data = memory.get() + shift;
    std::memcpy(data, head.data(), head.size());
    if (!values.empty()) std::memcpy(data + head.size(), values.data(), size - head.size());
  }
  absl::StatusOr<Frame> Decode(size_t max_payload = 1 << 20) const {
    return DecodeFrame(std::span(data, size), memory, max_payload);
  }

  std::shared_ptr<std::byte[]> memory;
  std::byte* data;
  size_t size;
};

TEST(FrameTest, RoundTripsAndAlignsForEveryHeaderSize) {
  const std::vector<float> values = {1, -2.5f, 3e30f, std::numeric_limits<float>::quiet_NaN()};
  for (int tokens = 0; tokens < 40; ++tokens) {
    const v1::FrameHeader header = StepOf(tokens);
    const std::string head = EncodeHeader(header).value();
    EXPECT_EQ(head.size() % kPayloadAlignment, 0u) << tokens;
    const Message message(header, values);
    const Frame frame = message.Decode().value();
    EXPECT_EQ(frame.header.SerializeAsString(), header.SerializeAsString());
    ASSERT_EQ(frame.payload.values().size(), values.size());
    EXPECT_EQ(std::memcmp(frame.payload.values().data(), values.data(), 16), 0);
  }
}

TEST(FrameTest, ViewsAlignedPayloadInPlaceAndKeepsItAlive) {
  Frame frame;
  {
    const Message message(StepOf(2), {4, 5, 6});
    frame = message.Decode().value();
    EXPECT_EQ(static_cast<const void*>(frame.payload.values().data()),
              message.data + message.size - 12);
  }
  EXPECT_EQ(frame.payload.values()[2], 6);
}

TEST(FrameTest, CopiesUnalignedPayload) {
  const Message message(StepOf(2), {4, 5, 6}, 1);
  const Frame frame = message.Decode().value();
  EXPECT_NE(frame.payload.owner().get(), message.memory.get());
  EXPECT_EQ(frame.payload.values()[1], 5);
}

TEST(FrameTest, RefusesWhatIsNotAFrame) {
  const Message good(StepOf(2), {1, 2});
  for (size_t cut = 0; cut < good.size; ++cut) {  // every prefix but those that end on a float
    const auto frame = DecodeFrame(std::span(good.data, cut), good.memory, 1 << 20);
    const bool whole = cut == good.size - 4 || cut == good.size - 8;
    EXPECT_EQ(frame.status().code(),
              whole ? absl::StatusCode::kOk : absl::StatusCode::kInvalidArgument)
        << cut;
  }
  EXPECT_EQ(Message(EncodeHeader(v1::FrameHeader()).value(), {}, 0).Decode().status().code(),
            absl::StatusCode::kInvalidArgument);  // no body
  EXPECT_EQ(Message(std::string("\4\0\0\0\xff\xff\xff\xff", 8), {}, 0).Decode().status().code(),
            absl::StatusCode::kInvalidArgument);  // not protobuf
}

TEST(FrameTest, BoundsHeaderAndPayload) {
  EXPECT_EQ(Message(std::string("\xff\xff\xff\xff....", 8), {}, 0).Decode().status().code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(Message(StepOf(1), {1, 2}).Decode(4).status().code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(Message(StepOf(1), {1, 2}).Decode(8).ok());
  EXPECT_EQ(EncodeHeader(StepOf(1 << 20)).status().code(), absl::StatusCode::kResourceExhausted);
}

TEST(FrameTest, MaxPayloadBytesIsTheLargerMatrix) {
  EXPECT_EQ(MaxPayloadBytes(256, 1024, 8), 8u * 1024 * 4);
  EXPECT_EQ(MaxPayloadBytes(4096, 1024, 8), 8u * 4096 * 4);
  EXPECT_EQ(MaxPayloadBytes(-1, 0, 8), 0u);
  constexpr int kMax = std::numeric_limits<int>::max();
  EXPECT_GT(MaxPayloadBytes(kMax, kMax, kMax), 1ull << 62);
}

}  // namespace
}  // namespace stagecoach
