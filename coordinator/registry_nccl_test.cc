// Which links of an epoch go by NCCL.
#include <string>
#include <vector>

#include "coordinator/limits.h"
#include "coordinator/registry_fixture.h"
#include "gmock/gmock.h"

namespace stagecoach {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

v1::WorkerHello Gpu(const std::string& name, const std::string& host, const std::string& device) {
  v1::WorkerHello hello = Hello(name);
  hello.set_backend("cuda");
  hello.set_kernel_revision("cuda-1");
  hello.add_transports("nccl");
  hello.set_host_id(host);
  hello.set_device_uuid(device);
  return hello;
}

class RegistryNcclTest : public RegistryTest {
 protected:
  // "gn": gRPC from the previous stage, NCCL to the next one.
  std::string Links(StreamId stream) {
    const auto letter = [](v1::Transport t) { return t == v1::TRANSPORT_NCCL ? 'n' : 'g'; };
    return {letter(assigned_[stream].incoming()), letter(assigned_[stream].outgoing())};
  }
  void FailNccl(StreamId stream) {
    v1::WorkerMessage message;
    v1::AssignmentFailed& failed = *message.mutable_assignment_failed();
    failed.set_epoch(registry_->epoch());
    failed.set_status_code(static_cast<uint32_t>(absl::StatusCode::kResourceExhausted));
    failed.set_message("no memory for NCCL");
    failed.set_nccl(true);
    registry_->Received(stream, message, now_);
    Apply();
    Advance(kReplanDelay * 2);
  }
};

TEST_F(RegistryNcclTest, NeighboursOnTheirOwnDevicesAndNeverTheCoordinator) {
  Make(4);
  v1::WorkerHello without = Gpu("d", "host1", "gpu1");
  without.mutable_transports()->RemoveLast();
  const StreamId a = Join(Gpu("a", "host0", "gpu0")), b = Join(Gpu("b", "host0", "gpu1")),
                 c = Join(Gpu("c", "host1", "gpu1")), d = Join(without);
  EXPECT_EQ(Links(a), "gn");
  EXPECT_EQ(Links(b), "nn");  // uuids name one GPU only together with the host
  EXPECT_EQ(Links(c), "ng");
  EXPECT_EQ(Links(d), "gg");
}

TEST_F(RegistryNcclTest, TwoRanksOnOneDeviceFallBackUnlessTheirHostsDiffer) {
  Make(2);
  const StreamId a = Join(Gpu("a", "host", "gpu0")), b = Join(Gpu("b", "host", "gpu0"));
  EXPECT_EQ(Links(a) + Links(b), "gggg");
  Close(b);
  const StreamId again = Join(Gpu("b", "node1", "gpu0"));  // by NCCL_HOSTID
  EXPECT_EQ(Links(a) + Links(again), "gnng");
}

TEST_F(RegistryNcclTest, TwoRanksOnOneDeviceAreRefusedIfOneInsists) {
  Make(2);
  v1::WorkerHello only = Gpu("a", "host", "gpu0");
  only.set_nccl_only(true);
  Join(only);
  const StreamId b = Join(Gpu("b", "host", "gpu0"));
  EXPECT_EQ(closed_[b].code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(closed_[b].message()),
              AllOf(HasSubstr("'a'"), HasSubstr("'b'"), HasSubstr("two ranks on one device"),
                    HasSubstr("--device"), HasSubstr("gpu0")));
  v1::WorkerHello grpc = Gpu("c", "host", "gpu1");
  grpc.mutable_transports()->RemoveLast();
  const StreamId c = Join(grpc);
  EXPECT_THAT(std::string(closed_[c].message()), HasSubstr("'c' does not offer NCCL"));
  const StreamId d = Join(Gpu("d", "host", "gpu1"));
  EXPECT_EQ(closed_.count(d), 0u);
  EXPECT_EQ(Links(d), "ng");
}

TEST_F(RegistryNcclTest, WhereItFailedTheNextEpochDoesWithoutUntilTheWorkerJoinsAgain) {
  Make(2);
  const StreamId a = Join(Gpu("a", "host", "gpu0")), b = Join(Gpu("b", "host", "gpu1"));
  EXPECT_EQ(Links(a) + Links(b), "gnng");
  FailNccl(b);
  EXPECT_EQ(registry_->epoch(), 2u);
  EXPECT_EQ(Links(a) + Links(b), "gggg");
  Close(b);
  const StreamId again = Join(Gpu("b", "host", "gpu1"));
  EXPECT_EQ(Links(a) + Links(again), "gnng");
}

TEST_F(RegistryNcclTest, WhoInsistsTriesAgain) {
  Make(2);
  v1::WorkerHello only = Gpu("a", "host", "gpu0");
  only.set_nccl_only(true);
  const StreamId a = Join(only), b = Join(Gpu("b", "host", "gpu1"));
  FailNccl(a);
  EXPECT_EQ(registry_->epoch(), 2u);
  EXPECT_EQ(Links(a) + Links(b), "gnng");
}

TEST_F(RegistryNcclTest, RefusesLies) {
  Make(1);
  v1::WorkerHello hello = Hello("a");
  hello.set_nccl_only(true);
  EXPECT_EQ(closed_[Greet(hello)].code(), absl::StatusCode::kFailedPrecondition);
  hello = Gpu("a", "two words", "gpu0");
  StreamId stream = Greet(hello);
  EXPECT_EQ(closed_[stream].code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(closed_[stream].message()), HasSubstr("host_id"));
  hello = Gpu("a", "host", std::string(10000, 'x'));
  stream = Greet(hello);
  EXPECT_THAT(std::string(closed_[stream].message()), HasSubstr("device_uuid"));
}

}  // namespace
}  // namespace stagecoach
