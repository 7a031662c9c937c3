// What the tests of the CUDA backend share.
#ifndef STAGECOACH_KERNELS_CUDA_CUDA_TEST_H_
#define STAGECOACH_KERNELS_CUDA_CUDA_TEST_H_

#include <memory>

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

}  // namespace stagecoach

#endif  // STAGECOACH_KERNELS_CUDA_CUDA_TEST_H_
