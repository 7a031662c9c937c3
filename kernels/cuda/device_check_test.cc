#include "kernels/cuda/device_check.h"

#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace stagecoach::cuda {
namespace {

using testing::HasSubstr;
using testing::Not;

void ExpectOneLine(const absl::Status& status, absl::StatusCode code, const std::string& part) {
  EXPECT_EQ(status.code(), code) << status;
  const std::string message(status.message());
  EXPECT_THAT(message, HasSubstr(part));
  EXPECT_THAT(message, Not(HasSubstr("\n")));
}

constexpr DriverState kGood = {.error = cudaSuccess, .gpus = 2, .driver = 13000, .runtime = 13000};

TEST(CheckDriver, AnyGpuThatIsThere) {
  EXPECT_TRUE(CheckDriver(kGood, 0).ok());
  EXPECT_TRUE(CheckDriver(kGood, 1).ok());
  DriverState newer = kGood;
  newer.driver = 13020;
  EXPECT_TRUE(CheckDriver(newer, 0).ok());
}

TEST(CheckDriver, IndexOutOfRange) {
  for (const int index : {-1, 2, 1000}) {
    ExpectOneLine(CheckDriver(kGood, index), absl::StatusCode::kOutOfRange, "use cuda:0 to cuda:1");
  }
  DriverState one = kGood;
  one.gpus = 1;
  ExpectOneLine(CheckDriver(one, 1), absl::StatusCode::kOutOfRange,
                "there is no cuda:1: one GPU is visible");
}

TEST(CheckDriver, NoDriver) {
  ExpectOneLine(CheckDriver({.error = cudaErrorInsufficientDriver, .runtime = 13000}, 0),
                absl::StatusCode::kUnavailable, "no NVIDIA driver is installed");
}

TEST(CheckDriver, DriverTooOld) {
  ExpectOneLine(
      CheckDriver({.error = cudaErrorInsufficientDriver, .driver = 12040, .runtime = 13000}, 0),
      absl::StatusCode::kUnavailable, "knows CUDA 12.4, but 13.0 is needed: update the driver");
}

TEST(CheckDriver, NoGpu) {
  for (const cudaError_t error : {cudaErrorNoDevice, cudaSuccess}) {
    ExpectOneLine(CheckDriver({.error = error, .driver = 13000, .runtime = 13000}, 0),
                  absl::StatusCode::kUnavailable, "no CUDA GPU is visible");
  }
}

TEST(CheckDriver, AnyOtherError) {
  ExpectOneLine(
      CheckDriver({.error = cudaErrorSystemNotReady, .driver = 13000, .runtime = 13000}, 0),
      absl::StatusCode::kUnavailable, "cudaErrorSystemNotReady");
}

TEST(CheckGpu, AnyWithKernels) {
  EXPECT_TRUE(CheckGpu({"NVIDIA H200", 9, 0, 232448, true, KernelSet::kBulk}, 0, "90a").ok());
  EXPECT_TRUE(CheckGpu({"NVIDIA A100", 8, 0, 166912, true, KernelSet::kPlain}, 0, "80").ok());
  EXPECT_TRUE(
      CheckGpu({"NVIDIA GeForce RTX 5090", 12, 0, 101376, true, KernelSet::kPlain}, 0, "120").ok());
}

TEST(CheckGpu, SaysWhatToBuild) {
  ExpectOneLine(CheckGpu({"NVIDIA B200", 10, 0, 232448, false}, 3, "90a"),
                absl::StatusCode::kFailedPrecondition,
                "cuda:3 (NVIDIA B200, compute capability 10.0), only for 90a; build it with "
                "-DSTAGECOACH_CUDA_ARCHITECTURES=100,");
  ExpectOneLine(CheckGpu({"NVIDIA H100", 9, 0, 232448, false}, 0, "100"),
                absl::StatusCode::kFailedPrecondition, "-DSTAGECOACH_CUDA_ARCHITECTURES=90a,");
}

TEST(CheckGpu, WantsCodeForItsKindOfGpu) {  // the PTX of 10.0 is for blocks of more shared memory
  ExpectOneLine(
      CheckGpu({"NVIDIA GeForce RTX 5090", 12, 0, 101376, true, KernelSet::kBulk}, 0, "90a,100"),
      absl::StatusCode::kFailedPrecondition, "-DSTAGECOACH_CUDA_ARCHITECTURES=120,");
}

TEST(CheckGpu, SaysThatNoBuildHelps) {
  ExpectOneLine(CheckGpu({"NVIDIA V100", 7, 0, 98304, false}, 0, "90a"),
                absl::StatusCode::kFailedPrecondition, "the kernels need compute capability 8.0;");
}

}  // namespace
}  // namespace stagecoach::cuda
