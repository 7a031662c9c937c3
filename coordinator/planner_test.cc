#include "coordinator/planner.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <random>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/test_paths.h"

namespace stagecoach {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr int kBlocks = 4;
constexpr PlanLimits kLimits = {
    .max_slots = 2, .max_context = 64, .max_step_tokens = 16, .kv = {.blocks = kBlocks}};

ModelSizes EqualLayers(int layers) {
  return {.layers = std::vector<uint64_t>(layers, 1000),
          .embedding = 500,
          .embedding_row = 5,
          .head = 800,
          .kv_position = 1,
          .workspace_row = 2,
          .logits_row = 3};
}

std::vector<WorkerCapacity> Workers(int count, uint64_t memory = 1 << 30, double bandwidth = 1e9) {
  std::vector<WorkerCapacity> workers;
  for (int w = 0; w < count; ++w) {
    workers.push_back({"w" + std::to_string(w), memory, bandwidth});
  }
  return workers;
}

std::vector<int> Counts(const Plan& plan) {
  std::vector<int> counts;
  for (const PlanStage& stage : plan.stages) counts.push_back(stage.last_layer - stage.first_layer);
  return counts;
}

double Slowest(const Plan& plan) {
  double slowest = 0;
  for (const PlanStage& stage : plan.stages) {
    slowest = std::max(slowest, stage.seconds_per_token);
  }
  return slowest;
}

void ExpectContiguous(const Plan& plan, int layers) {
  int next = 0;
  for (const PlanStage& stage : plan.stages) {
    EXPECT_EQ(stage.first_layer, next);
    EXPECT_GT(stage.last_layer, stage.first_layer);
    next = stage.last_layer;
  }
  EXPECT_EQ(next, layers);
}

// The least slowest stage and, for it, the least sum of squared counts, by trying every split.
struct Best {
  double slowest = std::numeric_limits<double>::infinity();
  int squares = 0;
};

void TrySplits(const ModelSizes& sizes, const std::vector<WorkerCapacity>& workers,
               const PlanLimits& limits, size_t w, int first, double slowest, int squares,
               Best& best) {
  const int layers = static_cast<int>(sizes.layers.size());
  if (w == workers.size()) {
    if (first != layers) return;
    if (slowest < best.slowest || (slowest == best.slowest && squares < best.squares)) {
      best = {slowest, squares};
    }
    return;
  }
  for (int last = first + 1; last <= layers; ++last) {
    if (StageBytes(sizes, limits, kBlocks, first, last) > workers[w].memory_bytes) continue;
    double bytes = 0;
    for (int layer = first; layer < last; ++layer) bytes += sizes.layers[layer];
    if (first == 0) bytes += sizes.embedding_row;
    if (last == layers) bytes += sizes.head;
    TrySplits(sizes, workers, limits, w + 1, last,
              std::max(slowest, bytes / workers[w].read_bytes_per_second),
              squares + (last - first) * (last - first), best);
  }
}

TEST(PlannerTest, MatchesBruteForceOnRandomInstances) {
  std::mt19937 random(7);
  const auto pick = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(random);
  };
  int feasible = 0, refused = 0;
  for (int round = 0; round < 3000; ++round) {
    ModelSizes sizes = EqualLayers(pick(1, 9));
    for (uint64_t& bytes : sizes.layers) bytes = pick(1, 4) * 500;
    sizes.head = pick(0, 4000);
    sizes.embedding = pick(0, 4000);
    const int count = pick(1, static_cast<int>(sizes.layers.size()));
    std::vector<WorkerCapacity> workers;
    for (int w = 0; w < count; ++w) {
      workers.push_back({"w", static_cast<uint64_t>(pick(1500, 9000)), pick(1, 4) * 1000.0});
    }
    Best best;
    TrySplits(sizes, workers, kLimits, 0, 0, 0, 0, best);
    const absl::StatusOr<Plan> plan = MakePlan(sizes, workers, kLimits);
    if (std::isinf(best.slowest)) {
      EXPECT_EQ(plan.status().code(), absl::StatusCode::kResourceExhausted);
      ++refused;
      continue;
    }
    ++feasible;
    ASSERT_TRUE(plan.ok()) << plan.status();
    ExpectContiguous(*plan, static_cast<int>(sizes.layers.size()));
    int squares = 0;
    for (const PlanStage& stage : plan->stages) {
      const int layers = stage.last_layer - stage.first_layer;
      squares += layers * layers;
      EXPECT_LE(StageBytes(sizes, kLimits, kBlocks, stage.first_layer, stage.last_layer),
                workers[&stage - plan->stages.data()].memory_bytes);
    }
    EXPECT_EQ(Slowest(*plan), best.slowest);
    EXPECT_EQ(squares, best.squares);
  }
  EXPECT_GT(feasible, 500);
  EXPECT_GT(refused, 500);
}

TEST(PlannerTest, SplitsEqualLayersEqually) {
  for (int workers = 1; workers <= 32; ++workers) {
    ModelSizes sizes = EqualLayers(32);
    sizes.head = 0;
    const absl::StatusOr<Plan> plan = MakePlan(sizes, Workers(workers), kLimits);
    ASSERT_TRUE(plan.ok()) << plan.status();
    ExpectContiguous(*plan, 32);
    const std::vector<int> counts = Counts(*plan);
    const auto [least, most] = std::minmax_element(counts.begin(), counts.end());
    EXPECT_EQ(*most, (32 + workers - 1) / workers);
    // The first stage also reads an embedding row, so it may be left with one layer less.
    EXPECT_LE(*most - *least, 1) << workers;
  }
}

TEST(PlannerTest, GivesTheHeadsStageFewerLayers) {
  ModelSizes sizes = EqualLayers(10);
  sizes.embedding_row = 0;
  sizes.head = 2000;
  const absl::StatusOr<Plan> plan = MakePlan(sizes, Workers(2), kLimits);
  ASSERT_TRUE(plan.ok());
  EXPECT_EQ(Counts(*plan), (std::vector<int>{6, 4}));
  EXPECT_EQ(plan->stages[0].weight_bytes, 6500u);
  EXPECT_EQ(plan->stages[1].weight_bytes, 6000u);
  EXPECT_EQ(plan->stages[0].kv_bytes, 6u * 2 * 64);
}

TEST(PlannerTest, FollowsBandwidthAndTakesUnknownOnesAsEqual) {
  ModelSizes sizes = EqualLayers(12);
  sizes.embedding_row = sizes.head = 0;
  std::vector<WorkerCapacity> workers = Workers(3);
  workers[1].read_bytes_per_second = 2e9;
  EXPECT_EQ(Counts(*MakePlan(sizes, workers, kLimits)), (std::vector<int>{3, 6, 3}));
  workers[1].read_bytes_per_second = 0;
  EXPECT_EQ(Counts(*MakePlan(sizes, workers, kLimits)), (std::vector<int>{4, 4, 4}));
  // What a worker reports may be nonsense.
  workers[1].read_bytes_per_second = std::numeric_limits<double>::quiet_NaN();
  EXPECT_EQ(Counts(*MakePlan(sizes, workers, kLimits)), (std::vector<int>{4, 4, 4}));
  workers[1].read_bytes_per_second = -1;
  EXPECT_EQ(Counts(*MakePlan(sizes, workers, kLimits)), (std::vector<int>{4, 4, 4}));
}

TEST(PlannerTest, ObeysMemoryEvenIfSlower) {
  ModelSizes sizes = EqualLayers(12);
  sizes.embedding_row = sizes.head = 0;
  std::vector<WorkerCapacity> workers = Workers(2);
  workers[0].memory_bytes = StageBytes(sizes, kLimits, kBlocks, 0, 2);
  EXPECT_EQ(Counts(*MakePlan(sizes, workers, kLimits)), (std::vector<int>{2, 10}));
  workers[0].memory_bytes -= 1;
  EXPECT_EQ(Counts(*MakePlan(sizes, workers, kLimits)), (std::vector<int>{1, 11}));
}

TEST(PlannerTest, CountsABudgetedWorkersWeightsAsItsBudget) {
  ModelSizes sizes = EqualLayers(12);
  sizes.embedding = sizes.embedding_row = sizes.head = 0;
  sizes.load_buffers = 50;
  std::vector<WorkerCapacity> workers = Workers(1);
  workers[0].memory_bytes = StageBytes(sizes, kLimits, kBlocks, 0, 12) - 12'000 + 5'000;
  EXPECT_FALSE(MakePlan(sizes, workers, kLimits).ok());
  workers[0].weight_budget_bytes = 5'000;
  const absl::StatusOr<Plan> plan = MakePlan(sizes, workers, kLimits);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->stages[0].weight_bytes, 12'000u);
  // Beside a window of two layers, an eighth more and the buffers.
  const double streamed = 12'000 - (5'000 - 2'250 - 50);
  EXPECT_EQ(plan->stages[0].streamed_bytes, streamed);
  EXPECT_DOUBLE_EQ(plan->stages[0].seconds_per_token,
                   (12'000 - streamed) / 1e9 + streamed / kDefaultLoadBytesPerSecond);
  workers[0].load_bytes_per_second = 1e6;
  EXPECT_DOUBLE_EQ(MakePlan(sizes, workers, kLimits)->stages[0].seconds_per_token,
                   (12'000 - streamed) / 1e9 + streamed / 1e6);
  workers[0].weight_budget_bytes = 12'000;  // everything
  EXPECT_EQ(MakePlan(sizes, Workers(1), kLimits)->stages[0].streamed_bytes, 0u);
}

TEST(PlannerTest, GivesStreamingWorkersFewerLayers) {
  ModelSizes sizes = EqualLayers(12);
  sizes.embedding = sizes.embedding_row = sizes.head = 0;
  std::vector<WorkerCapacity> workers = Workers(2, 1 << 30, 10e9);
  workers[1].weight_budget_bytes = 3'250;
  workers[1].load_bytes_per_second = 1e9;
  // Layer 4 of the second worker would cost 1 resident + 3 streamed: 31 resident ones elsewhere.
  EXPECT_EQ(Counts(*MakePlan(sizes, workers, kLimits)), (std::vector<int>{9, 3}));
  workers[1].load_bytes_per_second = 10e9;  // as fast as memory
  EXPECT_EQ(Counts(*MakePlan(sizes, workers, kLimits)), (std::vector<int>{6, 6}));
  workers[1].weight_budget_bytes = 0;
  workers[1].weight_budget_percent = 100;  // no limit
  workers[1].load_bytes_per_second = 1;
  EXPECT_EQ(Counts(*MakePlan(sizes, workers, kLimits)), (std::vector<int>{6, 6}));
}

TEST(PlannerTest, RefusesABudgetBelowTwoLayers) {
  ModelSizes sizes = EqualLayers(4);
  std::vector<WorkerCapacity> workers = Workers(1);
  workers[0].weight_budget_bytes = 2'249;
  const absl::Status status = MakePlan(sizes, workers, kLimits).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("weight budget is too small for two layers"));
  workers[0].weight_budget_bytes = 2'250;  // embedding and head stream, too
  EXPECT_TRUE(MakePlan(sizes, workers, kLimits).ok());
  workers[0].weight_budget_bytes = 0;
  workers[0].weight_budget_percent = 10;  // 530 bytes
  EXPECT_FALSE(MakePlan(sizes, workers, kLimits).ok());
  workers[0].weight_budget_percent = 50;
  EXPECT_TRUE(MakePlan(sizes, workers, kLimits).ok());
}

TEST(PlannerTest, IsDeterministicOnTies) {
  ModelSizes sizes = EqualLayers(10);
  sizes.embedding_row = sizes.head = 0;
  EXPECT_EQ(Counts(*MakePlan(sizes, Workers(4), kLimits)), (std::vector<int>{3, 3, 2, 2}));
}

TEST(PlannerTest, RefusesWithReasons) {
  const ModelSizes sizes = EqualLayers(4);
  EXPECT_EQ(MakePlan(sizes, {}, kLimits).status().code(), absl::StatusCode::kInvalidArgument);
  const absl::Status many = MakePlan(sizes, Workers(5), kLimits).status();
  EXPECT_EQ(many.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(many.message()), HasSubstr("5 workers for 4 layers"));
  EXPECT_EQ(MakePlan(sizes, Workers(1), {}).status().code(), absl::StatusCode::kInvalidArgument);

  const absl::Status small = MakePlan(sizes, Workers(2, 100), kLimits).status();
  EXPECT_EQ(small.code(), absl::StatusCode::kResourceExhausted);
  const std::string needed = std::to_string(StageBytes(sizes, kLimits, kBlocks, 0, 2));
  EXPECT_THAT(
      std::string(small.message()),
      AllOf(HasSubstr("w0 needs " + needed + " bytes"), HasSubstr("has 100 bytes"),
            HasSubstr("w1 needs"), HasSubstr("alone is not enough"), HasSubstr("more workers")));
}

TEST(PlannerTest, SaysHowManyBlocksAndPositionsFit) {
  const ModelSizes sizes = EqualLayers(4);
  PlanLimits limits = {
      .max_slots = 8, .max_context = 64, .max_step_tokens = 16, .kv = {.blocks = 20}};
  const uint64_t memory = StageBytes(sizes, limits, 6, 0, 4);
  const absl::Status status = MakePlan(sizes, Workers(1, memory), limits).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr("it fits with 6 KV blocks"));
  limits.kv.blocks = 0;
  limits.max_context = 1000;
  EXPECT_THAT(std::string(MakePlan(sizes, Workers(1, memory), limits).status().message()),
              HasSubstr("it fits with a context of 192 positions"));
}

TEST(PlannerTest, TheDefaultPoolHoldsAllSlotsOrSixteenFullSequencesAndShrinks) {
  const ModelSizes sizes = EqualLayers(4);
  PlanLimits limits = {.max_slots = 3, .max_context = 70, .max_step_tokens = 16};
  EXPECT_EQ(MakePlan(sizes, Workers(2), limits)->kv_blocks, 3 * 3);
  limits.max_slots = 64;
  EXPECT_EQ(MakePlan(sizes, Workers(2), limits)->kv_blocks, 3 * kDefaultFullSequences);
  for (const int blocks : {3, 4, 30}) {
    const uint64_t memory = StageBytes(sizes, limits, blocks, 0, 4);
    EXPECT_EQ(MakePlan(sizes, Workers(1, memory), limits)->kv_blocks, blocks);
  }
  const uint64_t memory = StageBytes(sizes, limits, 3, 0, 4);
  EXPECT_EQ(MakePlan(sizes, Workers(1, memory - 1), limits).status().code(),
            absl::StatusCode::kResourceExhausted);
}

TEST(PlannerTest, StepsAreLongerIfAllWorkersAreGpus) {
  const ModelSizes sizes = EqualLayers(4);
  PlanLimits limits = {.max_slots = 3, .max_context = 70};
  std::vector<WorkerCapacity> workers = Workers(2);
  EXPECT_EQ(MakePlan(sizes, workers, limits)->max_step_tokens, kCpuStepTokens);
  workers[0].gpu = true;
  EXPECT_EQ(MakePlan(sizes, workers, limits)->max_step_tokens, kCpuStepTokens);
  workers[1].gpu = true;
  EXPECT_EQ(MakePlan(sizes, workers, limits)->max_step_tokens, kGpuStepTokens);
  limits.max_step_tokens = 16;
  EXPECT_EQ(MakePlan(sizes, workers, limits)->max_step_tokens, 16);
  // Their rows take memory, which the KV pool then lacks.
  limits = {.max_slots = 64, .max_context = 70, .max_step_tokens = kCpuStepTokens};
  for (WorkerCapacity& worker : workers) worker.memory_bytes = StageBytes(sizes, limits, 40, 0, 2);
  const int blocks = MakePlan(sizes, workers, limits)->kv_blocks;
  limits.max_step_tokens = 0;
  EXPECT_LT(MakePlan(sizes, workers, limits)->kv_blocks, blocks);
}

// A head is read in one go, a layer's weights by kernels that wait for each other.
TEST(PlannerTest, AGpusLayersTakeMoreThanTheirBytes) {
  ModelSizes sizes = EqualLayers(32);
  for (uint64_t& layer : sizes.layers) layer = 144'000'000;
  sizes.head = 600'000'000;
  std::vector<WorkerCapacity> workers = Workers(2, uint64_t{1} << 40, 4.4e12);
  EXPECT_EQ(Counts(*MakePlan(sizes, workers, kLimits)), std::vector<int>({18, 14}));
  for (WorkerCapacity& worker : workers) worker.gpu = true;
  const Plan plan = *MakePlan(sizes, workers, kLimits);
  EXPECT_EQ(Counts(plan), std::vector<int>({17, 15}));
  EXPECT_NEAR(plan.stages[0].seconds_per_token, 17 * (144e6 / 4.4e12 + kGpuLayerSeconds), 1e-9);
}

TEST(PlannerTest, APoolByMemoryIsTheSmallestOverTheStages) {
  ModelSizes sizes = EqualLayers(12);
  sizes.embedding_row = sizes.head = 0;
  PlanLimits limits = {
      .max_slots = 4, .max_context = 64, .max_step_tokens = 16, .kv = {.memory_bytes = 100000}};
  // Six layers each: 6 * 32 bytes of KV for a block.
  EXPECT_EQ(MakePlan(sizes, Workers(2), limits)->kv_blocks, 100000 / (6 * 32));
  std::vector<WorkerCapacity> workers = Workers(2);
  workers[1].memory_bytes = StageBytes(sizes, limits, 77, 6, 12) + 6 * 32 - 1;
  EXPECT_EQ(MakePlan(sizes, workers, limits)->kv_blocks, 77);
  limits.kv.memory_bytes = 2 * 6 * 32 - 1;
  const absl::Status small = MakePlan(sizes, Workers(2), limits).status();
  EXPECT_EQ(small.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(small.message()), HasSubstr("--kv-memory"));

  limits.kv.memory_bytes = 0;
  limits.kv.memory_percent = 50;
  const absl::StatusOr<Plan> half = MakePlan(sizes, Workers(2, 1 << 20), limits);
  ASSERT_TRUE(half.ok()) << half.status();
  EXPECT_EQ(half->kv_blocks, (1 << 19) / (6 * 32));
  EXPECT_EQ(half->stages[0].kv_bytes, uint64_t{6 * 32} * half->kv_blocks);
}

TEST(PlannerTest, APoolOfLessThanOneSequenceIsRefused) {
  PlanLimits limits = kLimits;
  limits.kv.blocks = 1;
  const absl::Status status = MakePlan(EqualLayers(4), Workers(1), limits).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr("64 positions"), HasSubstr("takes 2")));
}

TEST(PlannerTest, SurvivesAbsurdSizes) {
  ModelSizes sizes = EqualLayers(3);
  sizes.layers[1] = UINT64_MAX;
  sizes.kv_position = UINT64_MAX;
  EXPECT_EQ(MakePlan(sizes, Workers(2), kLimits).status().code(),
            absl::StatusCode::kResourceExhausted);
}

class PlannerModelTest : public testing::Test {
 protected:
  void SetUp() override {
    absl::StatusOr<std::shared_ptr<const ModelFile>> model =
        ModelFile::Open(TestDataPath("demo-Q4_K_M.gguf"));
    ASSERT_TRUE(model.ok()) << model.status();
    model_ = *std::move(model);
  }
  std::shared_ptr<const ModelFile> model_;
};

TEST_F(PlannerModelTest, PlansTheDemoModelOver1To32Workers) {
  const PlanLimits limits = {.max_slots = 8, .max_context = 512, .max_step_tokens = 256};
  uint64_t weights = 0;
  for (const Unit& unit : StageUnits(model_->params(), 0, 32)) weights += model_->UnitBytes(unit);
  double previous = std::numeric_limits<double>::infinity();
  for (int workers = 1; workers <= 32; ++workers) {
    const absl::StatusOr<Plan> plan = MakePlan(*model_, Workers(workers), limits);
    ASSERT_TRUE(plan.ok()) << plan.status();
    ExpectContiguous(*plan, 32);
    uint64_t sum = 0;
    for (const PlanStage& stage : plan->stages) sum += stage.weight_bytes;
    EXPECT_EQ(sum, weights);
    EXPECT_LE(Slowest(*plan), previous);
    previous = Slowest(*plan);
  }
}

TEST_F(PlannerModelTest, FormatsATableWithOneLinePerStage) {
  const PlanLimits limits = {.max_slots = 8, .max_context = 512, .max_step_tokens = 256};
  const absl::StatusOr<Plan> plan = MakePlan(*model_, Workers(4), limits);
  ASSERT_TRUE(plan.ok());
  const std::string table = FormatPlan(*model_, *plan);
  EXPECT_EQ(std::count(table.begin(), table.end(), '\n'), 7) << table;
  EXPECT_THAT(table, AllOf(HasSubstr("w0"), HasSubstr("w3"), HasSubstr("0.."), HasSubstr("..31"),
                           HasSubstr("32 layers over 4 stages"), HasSubstr("128 KV blocks")));
}

TEST_F(PlannerModelTest, CountsTheMatrixOfTiedEmbeddingsAtBothEnds) {
  // The head of a tied model is the embedding matrix again, held by another worker.
  ModelSizes sizes = MeasureModel(*model_);
  sizes.head = sizes.embedding;
  const absl::StatusOr<Plan> plan = MakePlan(sizes, Workers(2), kLimits);
  ASSERT_TRUE(plan.ok());
  uint64_t layers = 0;
  for (uint64_t bytes : sizes.layers) layers += bytes;
  EXPECT_EQ(plan->stages[0].weight_bytes + plan->stages[1].weight_bytes,
            layers + 2 * sizes.embedding);
}

}  // namespace
}  // namespace stagecoach
