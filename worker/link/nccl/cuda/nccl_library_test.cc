#include "worker/link/nccl/cuda/nccl_library.h"

#include "gtest/gtest.h"

namespace stagecoach {
namespace {

TEST(NcclLibrary, LoadsAndTellsItsVersion) {
  const auto nccl = LoadNcclLibrary();
  if (!nccl.ok()) {
    EXPECT_EQ(nccl.status().code(), absl::StatusCode::kUnavailable);
    GTEST_SKIP() << nccl.status();
  }
  EXPECT_EQ((*nccl)->version().substr(0, 2), "2.");
}

TEST(NcclLibrary, MakesIdsThatDiffer) {
  const auto nccl = LoadNcclLibrary();
  if (!nccl.ok()) GTEST_SKIP() << nccl.status();
  NcclId a{}, b{};
  if ((*nccl)->GetUniqueId(&a) != NcclCode::kSuccess) GTEST_SKIP() << (*nccl)->LastError();
  ASSERT_EQ((*nccl)->GetUniqueId(&b), NcclCode::kSuccess);
  EXPECT_NE(a, b);
}

}  // namespace
}  // namespace stagecoach
