// Skips every test of the program, with the reason, if STAGECOACH_TEST_DEVICE names a device that
// this machine lacks.
#include <gtest/gtest.h>

#include "kernels/device.h"
#include "tests/stage_chain.h"

namespace stagecoach {
namespace {

class SkipWithoutDevice : public testing::Environment {
 public:
  void SetUp() override {
    const auto backend = OpenDevice(TestDevice(), {.threads = 1});
    if (!backend.ok()) GTEST_SKIP() << backend.status();
  }
};

[[maybe_unused]] const testing::Environment* const registered =
    testing::AddGlobalTestEnvironment(new SkipWithoutDevice);

}  // namespace
}  // namespace stagecoach
