// Weights come onto the GPU the same by every way, and are counted.
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "kernels/cuda/cuda_test.h"
#include "kernels/cuda/quant_matmul.h"
#include "kernels/random_tensor.h"
#include "model/block_decode.h"
#include "model/direct_file.h"
#include "model/model_error.h"

namespace stagecoach {
namespace {

constexpr int kRows = 3;

TEST(CanPairRows, OfOneQuantisedTypeAndShapeAnd256Rows) {
  using cuda::CanPairRows;
  const auto matrix = [](TensorType type, int n, int k) {
    return cuda::PackedMatrix{.type = type, .n = n, .k = k};
  };
  const cuda::PackedMatrix gate = matrix(TensorType::kQ4_K, 512, 256);
  EXPECT_TRUE(CanPairRows(gate, gate));
  EXPECT_FALSE(CanPairRows(gate, matrix(TensorType::kQ6_K, 512, 256)));
  EXPECT_FALSE(CanPairRows(gate, matrix(TensorType::kQ4_K, 512, 512)));
  EXPECT_FALSE(CanPairRows(gate, matrix(TensorType::kQ4_K, 768, 256)));
  for (const auto& [type, n] : {std::pair(TensorType::kQ4_K, 528), {TensorType::kF16, 512}}) {
    EXPECT_FALSE(CanPairRows(matrix(type, n, 256), matrix(type, n, 256)));
  }
}

// A head of 46 MB in Q4_K: more than one piece of the ring, whichever way it goes.
class CudaUpload : public CudaTest {
 protected:
  void SetUp() override {
    CudaTest::SetUp();
    if (IsSkipped()) return;
    params_.layers = 1;
    params_.d_model = 4096;
    params_.heads = params_.kv_heads = 32;
    params_.key_length = params_.value_length = params_.rope_dims = 128;
    params_.ffn_length = 4096;
    params_.vocab_size = 20000;
    params_.context_length = 64;
    params_.norm_epsilon = 1e-5f;
    RandomSource random(7);
    unit_ = MakeRandomUnit(random, params_, {Unit::Kind::kHead}, TensorType::kQ4_K, false);
    residual_ = RandomFloats(random, size_t{kRows} * params_.d_model);
    auto workspace = backend_->NewWorkspace(params_, kRows);
    ASSERT_TRUE(workspace.ok()) << workspace.status();
    workspace_ = *std::move(workspace);
  }

  std::vector<float> Logits(const UnitWeights& head) {
    std::vector<int32_t> rows(kRows);
    std::iota(rows.begin(), rows.end(), 0);
    std::vector<float> logits(size_t{kRows} * params_.vocab_size);
    EXPECT_TRUE(backend_->SetResidual(*workspace_, residual_).ok());
    EXPECT_TRUE(backend_->Head(*workspace_, head, rows, logits).ok());
    return logits;
  }

  // All of each tensor at once, in pinned memory that is overwritten once it is let go.
  absl::StatusOr<std::unique_ptr<UnitWeights>> BuildPinned() {
    const auto builder = backend_->NewUnitBuilder(params_, unit_.unit);
    for (size_t i = 0; i < unit_.tensors.size(); ++i) {
      const RandomTensor& tensor = unit_.tensors[i];
      auto memory = backend_->NewHostMemory(tensor.raw.size());
      if (!memory.ok()) return memory.status();
      const std::shared_ptr<HostMemory> own = *memory;
      std::memcpy(own->data(), tensor.raw.data(), tensor.raw.size());
      const TensorPart part = {.raw = {own->data(), tensor.raw.size()},
                               .memory = {own.get(), [own](const HostMemory*) {
                                            std::memset(own->data(), 0xff, own->size());
                                          }}};
      if (auto added = builder->AddPart(unit_.roles[i], tensor.info, part); !added.ok()) {
        return added;
      }
    }
    return builder->Finish();
  }

  ModelParams params_;
  RandomUnit unit_;
  std::vector<float> residual_;
  std::unique_ptr<Workspace> workspace_;
};

TEST_F(CudaUpload, HostMemoryIsPinnedAndAligned) {
  for (const size_t bytes : {size_t{1}, size_t{5000}, size_t{9} << 20}) {
    const auto memory = backend_->NewHostMemory(bytes);
    ASSERT_TRUE(memory.ok()) << memory.status();
    EXPECT_TRUE((*memory)->direct());
    EXPECT_GE((*memory)->size(), bytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>((*memory)->data()) % kDirectAlignment, 0u);
  }
  EXPECT_TRUE(absl::IsResourceExhausted(backend_->NewHostMemory(size_t{1} << 60).status()));
}

TEST_F(CudaUpload, EveryWayGivesTheSameBits) {
  const auto staged = BuildUnit(*backend_, params_, unit_);
  const auto pinned = BuildPinned();
  const auto parts = BuildUnit(*backend_, params_, unit_, /*in_parts=*/true);
  ASSERT_TRUE(staged.ok() && pinned.ok() && parts.ok())
      << staged.status() << pinned.status() << parts.status();
  const std::vector<float> expected = Logits(**staged);
  EXPECT_EQ(Logits(**pinned), expected);
  EXPECT_EQ(Logits(**parts), expected);
}

// New weights take the memory of those before.
TEST_F(CudaUpload, WeightsFollowEachOtherAndAreCounted) {
  auto weights = BuildPinned();
  ASSERT_TRUE(weights.ok()) << weights.status();
  const std::vector<float> expected = Logits(**weights);
  for (int i = 0; i < 20; ++i) {
    const uint64_t before = backend_->uploads().bytes;
    weights = BuildPinned();
    ASSERT_TRUE(weights.ok()) << weights.status();
    ASSERT_EQ(Logits(**weights), expected) << i;
    uint64_t bytes = 0;
    for (const RandomTensor& tensor : unit_.tensors) bytes += tensor.raw.size();
    EXPECT_EQ(backend_->uploads().bytes - before, bytes);
  }
  EXPECT_GT(backend_->uploads().busy_seconds, 0);
}

// Weights that would be infinite in the registers of a product.
TEST_F(CudaUpload, RefusesScalesThatHalvesCannotHold) {
  RandomTensor& output = unit_.tensors.back();
  ASSERT_TRUE(BuildUnit(*backend_, params_, unit_).ok());
  BlockQ4_K block;
  std::byte* const last = output.raw.data() + output.raw.size() - sizeof(block);
  memcpy(&block, last, sizeof(block));
  block.d = FloatToHalf(1);
  block.scales[0] = 63;
  memcpy(last, &block, sizeof(block));
  const absl::Status refused = BuildUnit(*backend_, params_, unit_).status();
  EXPECT_EQ(GetModelError(refused), ModelError::kUnsupported) << refused;
}

}  // namespace
}  // namespace stagecoach
