#include "kernels/device.h"

#include <string>

#include "gtest/gtest.h"

namespace stagecoach {
namespace {

TEST(OpenDevice, Cpu) {
  const auto backend = OpenDevice("cpu", {.threads = 1});
  ASSERT_TRUE(backend.ok()) << backend.status();
  EXPECT_EQ((*backend)->info().kind, "cpu");
  const auto bandwidth = MeasureDeviceBandwidth(**backend, 1);
  ASSERT_TRUE(bandwidth.ok()) << bandwidth.status();
  EXPECT_GT(*bandwidth, 1e6);
  const auto peaks = MeasureDevicePeaks(**backend, 1);
  ASSERT_TRUE(peaks.ok()) << peaks.status();
  EXPECT_GE(peaks->int8, peaks->floats);  // both 0 without AVX2
}

TEST(OpenDevice, AutoAlwaysFindsOne) {
  const auto backend = OpenDevice("auto", {.threads = 1});
  ASSERT_TRUE(backend.ok()) << backend.status();
}

TEST(OpenDevice, RefusesOtherNames) {
  for (const char* name : {"", "gpu", "cuda:", "cuda:-1", "cuda:1x", "cuda:99999999999", "CPU"}) {
    const auto backend = OpenDevice(name, {});
    EXPECT_EQ(backend.status().code(), absl::StatusCode::kInvalidArgument) << name;
  }
}

TEST(OpenDevice, SaysWhyThereIsNoSuchGpu) {
  const auto backend = OpenDevice("cuda:1000", {});
  ASSERT_FALSE(backend.ok());
  EXPECT_TRUE(backend.status().code() == absl::StatusCode::kUnavailable ||
              backend.status().code() == absl::StatusCode::kOutOfRange)
      << backend.status();
  EXPECT_FALSE(backend.status().message().empty());
}

}  // namespace
}  // namespace stagecoach
