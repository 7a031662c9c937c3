// What the tests of the CUDA backend share.
#ifndef STAGECOACH_KERNELS_CUDA_CUDA_TEST_H_
#define STAGECOACH_KERNELS_CUDA_CUDA_TEST_H_

#include <cstdlib>
#include <memory>
#include <string>

#include "gtest/gtest.h"
#include "kernels/cuda/cuda_backend.h"

namespace stagecoach {

// Skips the test, with the reason, on a machine without a GPU that can be used.
class CudaTest : public testing::Test {
 protected:
  void SetUp() override {
    auto backend = MakeCudaBackend(Options());
    if (!backend.ok()) GTEST_SKIP() << backend.status();
    backend_ = *std::move(backend);
  }
  virtual CudaOptions Options() const { return {}; }

  std::unique_ptr<Backend> backend_;
};

// tests/data/<name>; STAGECOACH_SOURCE_DIR in the environment says where tests/ is if the program
// runs on another machine than the one it was built on.
inline std::string TestDataPath(const std::string& name) {
  const char* const moved = std::getenv("STAGECOACH_SOURCE_DIR");
  return std::string(moved != nullptr ? moved : STAGECOACH_SOURCE_DIR) + "/tests/data/" + name;
}

}  // namespace stagecoach

#endif  // STAGECOACH_KERNELS_CUDA_CUDA_TEST_H_
