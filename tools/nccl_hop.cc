#include "tools/nccl_hop.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "absl/time/clock.h"
#include "model/status_macros.h"

namespace stagecoach {
namespace {

// Both are whole and below 2^24, so that floats hold them.
struct Order {
  size_t floats = 0;
  int count = 0;  // 0: the end
};

absl::Status SendOrder(HopEnd& end, const Order& order) {
  const std::array<float, kHopOrderFloats> words = {static_cast<float>(order.floats),
                                                    static_cast<float>(order.count)};
  STAGECOACH_RETURN_IF_ERROR(end.write(words));
  return end.out->Send(kHopOrderFloats);
}

absl::Status Receive(HopEnd& end, size_t floats) {
  STAGECOACH_RETURN_IF_ERROR(end.in->Receive(floats));
  return end.in->AwaitReceived();
}

absl::StatusOr<Order> ReceiveOrder(HopEnd& end) {
  STAGECOACH_RETURN_IF_ERROR(Receive(end, kHopOrderFloats));
  std::array<float, kHopOrderFloats> words = {};
  STAGECOACH_RETURN_IF_ERROR(end.read(words));
  const auto most = static_cast<float>(end.floats);
  if (!(words[0] >= 0 && words[0] <= most && words[1] >= 0 && words[1] <= (1 << 24))) {
    return absl::DataLossError(
        fmt::format("the other process orders {} payloads of {} floats", words[1], words[0]));
  }
  return Order{static_cast<size_t>(words[0]), static_cast<int>(words[1])};
}

absl::StatusOr<std::vector<double>> RoundTrips(HopEnd& end, const Order& order) {
  STAGECOACH_RETURN_IF_ERROR(SendOrder(end, order));
  std::vector<double> micros;
  for (int i = 0; i < order.count; ++i) {
    const absl::Time start = absl::Now();
    STAGECOACH_RETURN_IF_ERROR(end.out->Send(order.floats));
    STAGECOACH_RETURN_IF_ERROR(Receive(end, order.floats));
    micros.push_back(absl::ToDoubleMicroseconds(absl::Now() - start));
  }
  return micros;
}

}  // namespace

absl::StatusOr<std::vector<double>> LeadHop(HopEnd& end, size_t floats, int count,
                                            absl::Duration limit) {
  if (floats < 1 || floats > end.floats) {
    return absl::InvalidArgumentError(
        fmt::format("payloads of {} floats, not of 1 to {}", floats, end.floats));
  }
  STAGECOACH_ASSIGN_OR_RETURN(std::vector<double> warm,
                              RoundTrips(end, {.floats = floats, .count = kHopWarmUp}));
  const auto middle = warm.begin() + kHopWarmUp / 2;
  std::ranges::nth_element(warm, middle);
  const double room = absl::ToDoubleMicroseconds(limit) / std::max(*middle, 0.1);
  const double rounds = std::clamp(room, 1.0, static_cast<double>(count));
  return RoundTrips(end, {.floats = floats, .count = static_cast<int>(rounds)});
}

absl::Status EndHop(HopEnd& end) { return SendOrder(end, {}); }

absl::Status FollowHop(HopEnd& end) {
  for (;;) {
    STAGECOACH_ASSIGN_OR_RETURN(const Order order, ReceiveOrder(end));
    if (order.count == 0) return absl::OkStatus();
    for (int i = 0; i < order.count; ++i) {
      STAGECOACH_RETURN_IF_ERROR(Receive(end, order.floats));
      STAGECOACH_RETURN_IF_ERROR(end.out->Send(order.floats));
    }
  }
}

}  // namespace stagecoach
