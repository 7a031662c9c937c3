// What becomes of non-finite values, watched through a backend whose KV can be looked into.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "gtest/gtest.h"
#include "worker/glass_backend.h"
#include "worker/stage.h"
#include "worker/stage_fixture.h"

namespace stagecoach {
namespace {

using Code = absl::StatusCode;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

class StagePoisonTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto model = OpenHookedModel("demo-Q4_K_M.gguf", std::make_shared<ReadHook>());
    ASSERT_TRUE(model.ok()) << model.status();
    model_ = *std::move(model);
  }

  // NaN arises in the first of three stages, in a row of a prompt that is not sampled.
  void TravelsToTheLastStageAndIsClearedOnClose(bool channels);

  GlassBackend backend_;
  std::shared_ptr<const ModelFile> model_;
};

// It must reach the coordinator as the error of that sequence alone.
void StagePoisonTest::TravelsToTheLastStageAndIsClearedOnClose(bool channels) {
  backend_.poison_layer = 3;
  backend_.poison_token = 100;
  StageRow row(&backend_, model_,
               {.splits = {10, 20}, .max_slots = 2, .max_context = 80, .channels = channels});
  std::vector<int32_t> bad(40, 5), good(40, 7);
  bad[6] = 100;
  auto out = row.Run(StepBuilder(1).Open(0, 1).Open(1, 2).Rows(0, 1, 0, bad).Build());
  ASSERT_TRUE(out.ok()) << out.status();
  EXPECT_EQ(out->header.result().sequences(0).status_code(),
            static_cast<uint32_t>(Code::kDataLoss));
  EXPECT_FALSE(backend_.KvIsFinite());

  out = row.Run(
      StepBuilder(2).Rows(1, 2, 0, good).Sample().Rows(0, 1, 40, {&good[0], 1}).Sample().Build());
  ASSERT_TRUE(out.ok()) << out.status();
  EXPECT_EQ(out->header.result().sequences(0).status_code(), 0);
  EXPECT_EQ(out->header.result().sequences(0).token_id(), 7 + 32);
  EXPECT_EQ(out->header.result().sequences(1).status_code(),
            static_cast<uint32_t>(Code::kDataLoss));
  EXPECT_FALSE(out->header.result().sequences(1).sampled());

  out = row.Run(StepBuilder(3).Close(0).Rows(1, 2, 40, {&good[0], 1}).Sample().Build());
  ASSERT_TRUE(out.ok()) << out.status();
  EXPECT_EQ(out->header.result().sequences(0).token_id(), 7 + 32);
  EXPECT_TRUE(backend_.KvIsFinite());
  const int slot_1 = kTestSlotBlocks * kKvBlockPositions;  // its first position
  EXPECT_EQ(backend_.caches[2]->keys[0][slot_1], 7 + 20) << "another sequence's KV was cleared";

  out = row.Run(StepBuilder(4).Open(0, 3).Rows(0, 3, 0, good).Sample().Build());
  ASSERT_TRUE(out.ok()) << out.status();
  EXPECT_EQ(out->header.result().sequences(0).status_code(), 0);
}

TEST_F(StagePoisonTest, InFramesTravelsToTheLastStageAndIsClearedOnClose) {
  TravelsToTheLastStageAndIsClearedOnClose(/*channels=*/false);
}
TEST_F(StagePoisonTest, ByChannelsTravelsToTheLastStageAndIsClearedOnClose) {
  TravelsToTheLastStageAndIsClearedOnClose(/*channels=*/true);
}

TEST_F(StagePoisonTest, IsClearedBeforeTheSlotIsUsedInTheSameStep) {
  backend_.poison_layer = 31;
  backend_.poison_token = 100;
  StageRow row(&backend_, model_, {.max_slots = 1, .max_context = 64});
  const std::vector<int32_t> bad = {100}, good = {7, 7};
  ASSERT_TRUE(row.Run(StepBuilder(1).Open(0, 1).Rows(0, 1, 0, bad).Build()).ok());
  // A NaN of another origin in the KV of the poisoned sequence.
  backend_.caches[0]->keys[4][0] = kNan;
  backend_.caches[0]->keys[4][20] = kNan;
  const auto out = row.Run(StepBuilder(2).Close(0).Open(0, 2).Rows(0, 2, 0, good).Sample().Build());
  ASSERT_TRUE(out.ok()) << out.status();
  EXPECT_EQ(out->header.result().sequences(0).token_id(), 7 + 32);
  EXPECT_TRUE(backend_.KvIsFinite());
  EXPECT_EQ(backend_.caches[0]->keys[4][1], 7 + 4);
}

// What was shared before is finite and stays.
TEST_F(StagePoisonTest, ASharedPrefixSurvivesThePoisonedSequence) {
  backend_.poison_layer = 31;
  backend_.poison_token = 100;
  StageRow row(&backend_, model_, {.max_slots = 2, .max_context = 80});
  const std::vector<int32_t> prefix(32, 7), bad = {100};
  ASSERT_TRUE(row.Run(StepBuilder(1).Open(0, 1).Rows(0, 1, 0, prefix).Build()).ok());
  ASSERT_TRUE(row.Run(StepBuilder(2).Close(0).Build()).ok());
  ASSERT_TRUE(
      row.Run(StepBuilder(3).Open(1, 2).Cached({0}, prefix).Rows(1, 2, 32, bad).Blocks({5}).Build())
          .ok());
  GlassKv& kv = *backend_.caches[0];
  kv.keys[4][5 * kKvBlockPositions] = kNan;  // of another origin, where the bad row is
  ASSERT_TRUE(row.Run(StepBuilder(4).Close(1).Build()).ok());
  EXPECT_TRUE(backend_.KvIsFinite());
  EXPECT_EQ(kv.keys[4][0], 7 + 4);
}

TEST_F(StagePoisonTest, BlocksAreClearedAndCopiedWhenTheCoordinatorSaysSo) {
  StageRow row(&backend_, model_, {.max_slots = 1, .max_context = 64});
  const std::vector<int32_t> tokens(40, 7);
  ASSERT_TRUE(row.Run(StepBuilder(1).Open(0, 1).Rows(0, 1, 0, tokens).Build()).ok());
  GlassKv& kv = *backend_.caches[0];
  kv.keys[9][3 * kKvBlockPositions + 1] = kNan;
  ASSERT_TRUE(row.Run(StepBuilder(2).Clear(3).Copy(0, 2).Build()).ok());
  EXPECT_TRUE(backend_.KvIsFinite());
  EXPECT_EQ(kv.keys[9][2 * kKvBlockPositions + 31], 7 + 9);
  EXPECT_EQ(kv.keys[9][3 * kKvBlockPositions], 0);
}

// Behind a row whose activations, or logits, are not finite a row ahead has no token to go on with:
// it ends as that one did, and its company never hears of it.
TEST_F(StagePoisonTest, ARowAheadBehindAFailedRowEndsAlike) {
  class BadHead : public GlassBackend {
   public:
    absl::Status Head(Workspace& workspace, const UnitWeights& head, std::span<const int32_t> rows,
                      std::span<float> logits) override {
      auto status = GlassBackend::Head(workspace, head, rows, logits);
      const size_t vocab = logits.size() / rows.size();
      for (size_t i = 0; i < rows.size(); ++i) {
        if (logits[i * vocab + 50 + 32] == 1.0f) logits[i * vocab] = kNan;
      }
      return status;
    }
  } backend;
  backend.poison_layer = 31;
  backend.poison_token = 100;
  const int32_t zero[] = {0};
  for (const int32_t bad : {100, 50}) {
    StageRow row(&backend, model_, {.max_slots = 2});
    const int32_t token[] = {bad}, good[] = {7};
    auto out = row.Run(StepBuilder(1)
                           .Open(0, 1)
                           .Open(1, 2)
                           .Rows(0, 1, 0, token)
                           .Sample()
                           .Rows(1, 2, 0, good)
                           .Sample()
                           .Build());
    for (uint32_t step = 2;; ++step) {
      ASSERT_TRUE(out.ok()) << out.status();
      const v1::StepResult& result = out->header.result();
      EXPECT_EQ(result.sequences(0).status_code(), static_cast<uint32_t>(Code::kDataLoss));
      EXPECT_FALSE(result.sequences(0).sampled());
      EXPECT_EQ(result.sequences(1).status_code(), 0u);
      EXPECT_EQ(result.sequences(1).token_id(), 7 + 32 * (static_cast<int>(step) - 1));
      if (step == 4) break;
      out = row.Run(StepBuilder(step)
                        .Rows(0, 1, step - 1, zero)
                        .Ahead()
                        .Sample()
                        .Rows(1, 2, step - 1, zero)
                        .Ahead()
                        .Sample()
                        .Build());
    }
    // Nothing is left for who comes next.
    out = row.Run(StepBuilder(4).Close(0).Open(0, 3).Rows(0, 3, 0, good).Sample().Build());
    ASSERT_TRUE(out.ok()) << out.status();
    EXPECT_EQ(out->header.result().sequences(0).token_id(), 7 + 32);
    for (const auto& layer : backend.caches.back()->keys) {
      for (const float key : layer) EXPECT_TRUE(std::isfinite(key));
    }
  }
}

TEST_F(StagePoisonTest, NonFiniteLogitsEndTheSequenceOnly) {
  class BadHead : public GlassBackend {
   public:
    absl::Status Head(Workspace& workspace, const UnitWeights& head, std::span<const int32_t> rows,
                      std::span<float> logits) override {
      auto status = GlassBackend::Head(workspace, head, rows, logits);
      const size_t vocab = logits.size() / rows.size();
      for (size_t i = 0; i < rows.size(); ++i) {
        if (rows[i] == 2) logits[i * vocab + 9] = std::numeric_limits<float>::infinity();
      }
      return status;
    }
  } backend;
  StageRow row(&backend, model_, {.max_slots = 2});
  const std::vector<int32_t> tokens = {7, 8, 9};
  const auto out = row.Run(StepBuilder(1)
                               .Open(0, 1)
                               .Open(1, 2)
                               .Rows(0, 1, 0, tokens)
                               .Logits()
                               .Sample()
                               .Rows(1, 2, 0, tokens)
                               .Logits()
                               .Sample()
                               .Build());
  ASSERT_TRUE(out.ok()) << out.status();
  const v1::SequenceResult& lost = out->header.result().sequences(0);
  EXPECT_EQ(lost.status_code(), static_cast<uint32_t>(Code::kDataLoss));
  EXPECT_EQ(lost.logits_rows(), 0);
  EXPECT_FALSE(lost.sampled());
  const v1::SequenceResult& fine = out->header.result().sequences(1);
  EXPECT_EQ(fine.status_code(), 0);
  EXPECT_EQ(fine.logits_rows(), 3);
  EXPECT_EQ(fine.token_id(), 9 + 32);
  ASSERT_EQ(out->payload.values().size(), 3u * 1024);
  EXPECT_EQ(out->payload.values()[7 + 32], 1.0f);
}

}  // namespace
}  // namespace stagecoach
