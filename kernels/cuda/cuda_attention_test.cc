// The ways of merging a row's chunks: which of them is planned, and that none changes a bit.
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/cuda_workspace.h"
#include "kernels/cuda/device_array.h"
#include "kernels/random_tensor.h"

namespace stagecoach::cuda {
namespace {

using Merge = AttentionPlan::Merge;

constexpr int kChunkPositions = 64;
constexpr int kBlockChunks = 8;  // of a block that merges, but for twice as many of few queries

std::string Name(const AttentionPlan& plan) {
  switch (plan.merge) {
    case Merge::kWalker:
      return "walker";
    case Merge::kBlock:
      return fmt::format("block of {}{}", plan.chunks, plan.alone ? ", alone" : "");
    case Merge::kCluster:
      return fmt::format("cluster of {}", plan.chunks / kBlockChunks);
    case Merge::kScratch:
      return "scratch";
  }
  return "";
}

// Of decoding rows, the longest at `position`, on an H200, or one that has only plain kernels.
std::string PlannedFor(int rows, int heads, int kv_heads, int position,
                       KernelSet kernels = KernelSet::kBulk) {
  const KvLayout kv = {.half = true, .kv_heads = kv_heads, .key_length = 128, .value_length = 128};
  return Name(PlanAttention(
      {.rows = rows, .sequences = rows, .tiles = rows, .last_position = position}, heads, kv,
      {.multiprocessors = 132, .kernels = kernels}, /*scratch_floats=*/size_t{8} << 20));
}

TEST(PlanAttention, ClustersWhileTheyAllRunAtOnce) {
  EXPECT_EQ(PlannedFor(1, 32, 8, 1500), "cluster of 8");
  EXPECT_EQ(PlannedFor(2, 32, 8, 1500), "cluster of 4");
  EXPECT_EQ(PlannedFor(3, 32, 8, 1500), "cluster of 4");
  EXPECT_EQ(PlannedFor(4, 32, 8, 1500), "scratch");
  EXPECT_EQ(PlannedFor(15, 4, 1, 1500), "cluster of 8");
  EXPECT_EQ(PlannedFor(30, 4, 1, 1500), "cluster of 4");
  EXPECT_EQ(PlannedFor(31, 4, 1, 1500), "scratch");
  EXPECT_EQ(PlannedFor(1, 32, 32, 1500), "scratch");      // Llama-2-7B
  EXPECT_EQ(PlannedFor(8, 32, 1, 1500), "cluster of 4");  // two slices of query heads
  EXPECT_EQ(PlannedFor(20, 16, 1, 600), "cluster of 4");  // 16 queries: a block has 8 warps
}

TEST(PlanAttention, ClustersOfContextsForWhichABlockIsSlow) {
  EXPECT_EQ(PlannedFor(1, 32, 8, 255), "block of 8, alone");
  EXPECT_EQ(PlannedFor(16, 32, 8, 255), "block of 8, alone");
  EXPECT_EQ(PlannedFor(17, 32, 8, 255), "block of 8");
  EXPECT_EQ(PlannedFor(1, 32, 8, 256), "cluster of 8");
  EXPECT_EQ(PlannedFor(8, 32, 8, 1023), "cluster of 2");
  EXPECT_EQ(PlannedFor(9, 32, 8, 1023), "block of 16");  // more than run at once
  EXPECT_EQ(PlannedFor(1, 32, 32, 1023), "cluster of 2");
  EXPECT_EQ(PlannedFor(1, 32, 8, 4095), "cluster of 8");
  EXPECT_EQ(PlannedFor(1, 32, 8, 4096), "scratch");
  EXPECT_EQ(PlannedFor(2, 32, 8, 2047), "cluster of 4");
  EXPECT_EQ(PlannedFor(2, 32, 8, 2048), "scratch");
}

TEST(PlanAttention, WithoutClustersOrMuchSharedMemory) {
  EXPECT_EQ(PlannedFor(1, 32, 8, 255, KernelSet::kPlain), "block of 8");
  EXPECT_EQ(PlannedFor(1, 32, 8, 256, KernelSet::kPlain), "block of 8");
  EXPECT_EQ(PlannedFor(1, 32, 8, 1023, KernelSet::kPlain), "block of 16");
  EXPECT_EQ(PlannedFor(1, 32, 8, 1024, KernelSet::kPlain), "scratch");
}

// Rows of one sequence.
struct Rows {
  int prior;
  int rows = 1;
};

struct Step {
  int heads;
  int kv_heads;
  int length;  // of keys and values
  std::vector<Rows> sequences;
};

// A step with random queries, keys and values, on the device.
class StepOnDevice {
 public:
  StepOnDevice(const CudaDevice& device, const Step& step) : device_(device), step_(step) {
    int blocks = 0;
    for (const Rows& sequence : step.sequences) {
      rows_ += sequence.rows;
      const int end = sequence.prior + sequence.rows;
      std::vector<int32_t>& own = blocks_.emplace_back((end - 1) / kKvBlockPositions + 1);
      blocks += static_cast<int>(own.size());
      for (size_t i = 0; i < own.size(); ++i) own[i] = blocks - 1 - static_cast<int>(i);
    }
    RandomSource random(step.heads * 131 + step.length);
    kv_.resize(size_t{2} * blocks * kKvBlockPositions * step.kv_heads * step.length);
    for (uint16_t& half : kv_)
      half = (random.Next() & 0x83ff) | 0x3800;  // 0.5 to 1, of either sign
    const auto floats = [&](int heads) {
      return DeviceArray<float>(RandomFloats(random, size_t(rows_) * heads * step.length));
    };
    q_ = floats(step.heads);
    k_ = floats(step.kv_heads);
    v_ = floats(step.kv_heads);
    out_ = DeviceArray<float>(q_.size());
    kv_on_device_ = DeviceArray<uint16_t>(kv_.size());
    inputs_ =
        StepInputs::Create(device, rows_, RowsPerQueryTile(Group()), static_cast<size_t>(blocks))
            .value();
    CheckDevice(cudaDeviceSynchronize());  // the copies, which the device's streams do not wait for
    Place();
  }

  // The last row of each sequence, which has come as far, moves to `position`.
  void MoveTo(int position) {
    for (Rows& sequence : step_.sequences) sequence.prior = position + 1 - sequence.rows;
    Place();
  }

  AttentionPlan Plan(Merge merge, int chunks) const {
    const bool row_each = static_cast<size_t>(rows_) == step_.sequences.size();
    return {.rows = rows_,
            .heads = step_.heads,
            .tiles = inputs_.tiles(),
            .chunks = chunks,
            .merge = merge,
            .stores = merge != Merge::kWalker && row_each && Group() <= kQueryTile};
  }
  // All that the step may be merged by.
  std::vector<AttentionPlan> Ways() const {
    int chunks = 0;
    for (const Rows& sequence : step_.sequences) {
      chunks = std::max(chunks, (sequence.prior + sequence.rows - 1) / kChunkPositions + 1);
    }
    std::vector<AttentionPlan> ways = {Plan(Merge::kWalker, chunks), Plan(Merge::kScratch, chunks)};
    const int queries = inputs_.tiles() == rows_ ? Group() : kQueryTile;
    const bool bulk = device_.kernels() == KernelSet::kBulk;
    if (chunks <= kBlockChunks) {
      ways.push_back(Plan(Merge::kBlock, kBlockChunks));
      if (bulk) {
        ways.push_back(ways.back());
        ways.back().alone = true;
      }
    }
    if (chunks <= 2 * kBlockChunks && queries <= kQueryTile / 2) {
      ways.push_back(Plan(Merge::kBlock, 2 * kBlockChunks));
    }
    for (const int blocks : {2, 4, 8}) {
      if (bulk && chunks <= blocks * kBlockChunks) {
        ways.push_back(Plan(Merge::kCluster, blocks * kBlockChunks));
      }
    }
    return ways;
  }

  // Keys and values as at first; results that nobody has made yet.
  void Reset() {
    CheckDevice(cudaMemcpyAsync(kv_on_device_.get(), kv_.data(), kv_.size() * sizeof(uint16_t),
                                cudaMemcpyHostToDevice, device_.compute()));
    CheckDevice(cudaMemsetAsync(out_.get(), 0xff, out_.size() * sizeof(float), device_.compute()));
  }
  void Enqueue(const AttentionPlan& plan) {
    if (plan.merge == Merge::kScratch) {
      scratch_ = DeviceArray<float>(PartialFloats(rows_, step_.heads, plan.chunks, step_.length));
    }
    const KvLayout kv = {.data = reinterpret_cast<std::byte*>(kv_on_device_.get()),
                         .half = true,
                         .kv_heads = step_.kv_heads,
                         .key_length = step_.length,
                         .value_length = step_.length};
    const Activations out =
        LayOutActivations(out_.get(), ActivationForm::kFloat, rows_, step_.heads * step_.length);
    CheckDevice(StoreAndAttend(plan, inputs_.table(), {.q = q_.get(), .k = k_.get(), .v = v_.get()},
                               kv, scratch_.get(), out, device_.compute()));
  }
  std::vector<float> Result() {
    CheckDevice(cudaStreamSynchronize(device_.compute()));
    return CopyToHost(out_.get(), out_.size());
  }
  std::vector<float> Attend(const AttentionPlan& plan) {
    Reset();
    Enqueue(plan);
    return Result();
  }

 private:
  int Group() const { return step_.heads / step_.kv_heads; }

  void Place() {
    std::vector<BatchSequence> batch;
    int row = 0;
    for (size_t i = 0; i < blocks_.size(); ++i) {
      const Rows& sequence = step_.sequences[i];
      batch.push_back({.first_row = row,
                       .row_count = sequence.rows,
                       .start_position = sequence.prior,
                       .blocks = blocks_[i]});
      row += sequence.rows;
    }
    bool moved = false;
    ASSERT_TRUE(
        inputs_.SetBatch({.sequences = batch, .rows = rows_}, /*turns=*/{}, /*taken=*/{}, &moved)
            .ok());
    ASSERT_FALSE(moved);
  }

  const CudaDevice& device_;
  Step step_;
  int rows_ = 0;
  std::vector<std::vector<int32_t>> blocks_;  // of each sequence
  std::vector<uint16_t> kv_;                  // random halves, whatever they stand for
  DeviceArray<uint16_t> kv_on_device_;
  DeviceArray<float> q_, k_, v_, out_, scratch_;
  StepInputs inputs_;
};

class CudaAttention : public testing::Test {
 protected:
  void SetUp() override {
    auto device = CudaDevice::Open(0);
    if (!device.ok()) GTEST_SKIP() << device.status();
    device_ = *std::move(device);
    ASSERT_TRUE(device_->MakeCurrent().ok());
  }

  void ExpectSameBits(const std::vector<float>& one, const std::vector<float>& other) {
    ASSERT_EQ(one.size(), other.size());
    if (memcmp(one.data(), other.data(), one.size() * sizeof(float)) == 0) return;
    size_t different = 0, first = one.size();
    for (size_t i = one.size(); i-- > 0;) {
      if (memcmp(&one[i], &other[i], sizeof(float)) == 0) continue;
      ++different;
      first = i;
    }
    ADD_FAILURE() << different << " of " << one.size() << " values differ, the first at " << first
                  << ": " << one[first] << ", " << other[first];
  }

  void ExpectAllWaysAgree(const Step& step) {
    StepOnDevice on_device(*device_, step);
    const std::vector<AttentionPlan> ways = on_device.Ways();
    const std::vector<float> walked = on_device.Attend(ways[0]);
    EXPECT_TRUE(std::ranges::all_of(walked, [](float x) { return std::isfinite(x); }));
    for (const AttentionPlan& way : ways) {
      SCOPED_TRACE(fmt::format("heads={}, kv={}, length={}, rows={}, the first after {}, {}",
                               step.heads, step.kv_heads, step.length, way.rows,
                               step.sequences[0].prior, Name(way)));
      ExpectSameBits(on_device.Attend(way), walked);
    }
  }

  std::unique_ptr<CudaDevice> device_;
};

// In the sanitizers, too (run_gpu_tests.sh).
TEST_F(CudaAttention, WaysOfASmallStepAgree) {
  ExpectAllWaysAgree({4, 2, 64, {{300}, {40}}});
  ExpectAllWaysAgree({4, 1, 128, {{130, 5}}});
}

TEST_F(CudaAttention, WaysAgreeForOneRow) {
  for (const int prior : {0, 63, 64, 300, 511, 512, 700, 1023, 2100, 4000, 4095, 5000}) {
    ExpectAllWaysAgree({32, 8, 128, {{prior}}});
    ExpectAllWaysAgree({4, 4, 64, {{prior}}});
  }
  ExpectAllWaysAgree({32, 32, 128, {{700}}});
  ExpectAllWaysAgree({32, 4, 64, {{2100}}});
}

TEST_F(CudaAttention, WaysAgreeForAFewRows) {
  ExpectAllWaysAgree({32, 8, 128, {{2100}, {40}, {1050}}});
  ExpectAllWaysAgree({4, 4, 128, {{300}, {4000}, {63}, {64}, {511}, {0}, {4095}}});
  ExpectAllWaysAgree({8, 2, 64, {{700}, {699}, {4000}, {1}}});
  ExpectAllWaysAgree({32, 32, 128, {{300}, {1000}, {600}}});
  std::vector<Rows> more;
  for (int i = 0; i < 40; ++i) more.push_back({17 * i});
  ExpectAllWaysAgree({16, 4, 128, more});
}

// More than 8 queries, several rows of a sequence, more query heads than a tile takes.
TEST_F(CudaAttention, WaysAgreeForFullTiles) {
  for (const int length : {64, 128}) {
    ExpectAllWaysAgree({48, 4, length, {{2100}, {700}}});
    ExpectAllWaysAgree({8, 2, length, {{700, 9}, {20, 3}}});
    ExpectAllWaysAgree({4, 4, length, {{1015, 20}}});  // from one chunk into the next
    ExpectAllWaysAgree({24, 1, length, {{1000}, {4000}}});
  }
}

TEST_F(CudaAttention, AGraphServesOtherPositions) {
  if (device_->kernels() == KernelSet::kPlain) GTEST_SKIP() << "its GPU has no clusters";
  constexpr int kFarthest = 4000;
  StepOnDevice step(*device_, {32, 8, 128, {{kFarthest}, {kFarthest}}});
  const AttentionPlan plan = step.Plan(Merge::kCluster, 8 * kBlockChunks);
  step.Reset();  // allows the kernel its memory, too
  step.Enqueue(plan);
  cudaGraph_t graph = nullptr;
  CheckDevice(cudaStreamBeginCapture(device_->compute(), cudaStreamCaptureModeThreadLocal));
  step.Enqueue(plan);
  step.Enqueue(plan);  // as layers follow each other
  CheckDevice(cudaStreamEndCapture(device_->compute(), &graph));
  cudaGraphExec_t launchable = nullptr;
  CheckDevice(cudaGraphInstantiate(&launchable, graph, /*flags=*/0));
  for (const int position : {kFarthest, 0, 70, 300, 2100}) {
    SCOPED_TRACE(position);
    step.MoveTo(position);
    const std::vector<float> walked =
        step.Attend(step.Plan(Merge::kWalker, position / kChunkPositions + 1));
    step.Reset();
    CheckDevice(cudaGraphLaunch(launchable, device_->compute()));
    ExpectSameBits(step.Result(), walked);
  }
  CheckDevice(cudaGraphExecDestroy(launchable));
  CheckDevice(cudaGraphDestroy(graph));
}

}  // namespace
}  // namespace stagecoach::cuda
