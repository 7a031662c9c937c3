// The conformance suite on the reference backend, and on backends that are broken on purpose: a
// suite that cannot fail proves nothing.
#include "kernels/conformance.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/reference/reference_backend.h"

namespace stagecoach {
namespace {

std::vector<std::string> Failures(Backend& backend, const std::string& filter) {
  std::vector<std::string> failures;
  const std::vector<ConformanceResult> results = RunConformance(backend, {.filter = filter});
  EXPECT_FALSE(results.empty()) << filter;
  for (const ConformanceResult& result : results) {
    if (!result.passed) failures.push_back(result.name + ": " + result.detail);
  }
  return failures;
}

constexpr double kTimedSeconds = 0.25;  // what BrokenBackend says that a run took

// The reference backend, with a hook on the float results of its operations.
class BrokenBackend : public Backend {
 public:
  // result: [rows][result.size() / rows].
  virtual void Break(std::span<float> result, int rows) = 0;

  BackendInfo info() const override { return reference_->info(); }
  absl::Status SetOpTimer(OpTimer* timer) override {
    timer_ = timer;
    return absl::OkStatus();
  }
  absl::Status CheckTensor(TensorRole role, const TensorInfo& tensor) const override {
    return reference_->CheckTensor(role, tensor);
  }
  std::unique_ptr<UnitBuilder> NewUnitBuilder(const ModelParams& params,
                                              const Unit& unit) override {
    return reference_->NewUnitBuilder(params, unit);
  }
  absl::StatusOr<std::unique_ptr<KvCache>> NewKvCache(const KvShape& shape) override {
    return reference_->NewKvCache(shape);
  }
  absl::StatusOr<std::unique_ptr<Workspace>> NewWorkspace(const ModelParams& params,
                                                          int max_rows) override {
    return reference_->NewWorkspace(params, max_rows);
  }
  absl::Status Embed(Workspace& workspace, const UnitWeights& embedding,
                     std::span<const int32_t> token_ids) override {
    return reference_->Embed(workspace, embedding, token_ids);
  }
  absl::Status SetResidual(Workspace& workspace, std::span<const float> residual) override {
    return reference_->SetResidual(workspace, residual);
  }
  absl::Status RunLayer(Workspace& workspace, const UnitWeights& layer, KvCache& kv, int kv_layer,
                        const StepBatch& batch) override {
    return reference_->RunLayer(workspace, layer, kv, kv_layer, batch);
  }
  absl::Status GetResidual(Workspace& workspace, std::span<float> residual) override {
    return reference_->GetResidual(workspace, residual);
  }
  absl::Status Head(Workspace& workspace, const UnitWeights& head, std::span<const int32_t> rows,
                    std::span<float> logits) override {
    return Broken(reference_->Head(workspace, head, rows, logits), logits, rows.size());
  }
  absl::Status CopyKvBlocks(KvCache& kv, std::span<const KvBlockCopy> copies) override {
    return reference_->CopyKvBlocks(kv, copies);
  }
  absl::Status ClearKvBlocks(KvCache& kv, std::span<const int32_t> blocks) override {
    return reference_->ClearKvBlocks(kv, blocks);
  }
  absl::Status MatMul(const TensorInfo& tensor, std::span<const std::byte> raw,
                      std::span<const float> x, int rows, std::span<float> y) override {
    return Broken(reference_->MatMul(tensor, raw, x, rows, y), y, rows);
  }
  absl::Status RmsNorm(std::span<const float> x, int rows, std::span<const float> weight,
                       float epsilon, std::span<float> y) override {
    return Broken(reference_->RmsNorm(x, rows, weight, epsilon, y), y, rows);
  }
  absl::Status Rope(const ModelParams& params, std::span<float> x, int heads, int head_dim,
                    std::span<const int32_t> positions) override {
    return Broken(reference_->Rope(params, x, heads, head_dim, positions), x, positions.size());
  }
  absl::Status SwiGlu(std::span<const float> gate, std::span<const float> up,
                      std::span<float> out) override {
    return Broken(reference_->SwiGlu(gate, up, out), out, 1);
  }
  absl::Status Attention(const ModelParams& params, std::span<const float> q,
                         std::span<const float> k, std::span<const float> v, KvCache& kv,
                         int kv_layer, const StepBatch& batch, std::span<float> out) override {
    return Broken(reference_->Attention(params, q, k, v, kv, kv_layer, batch, out), out,
                  batch.rows);
  }

 private:
  absl::Status Broken(absl::Status status, std::span<float> result, size_t rows) {
    while (timer_ != nullptr && !timer_->Enough()) timer_->Add(kTimedSeconds);
    if (status.ok()) Break(result, static_cast<int>(rows));
    return status;
  }
  const std::unique_ptr<Backend> reference_ = MakeReferenceBackend();
  OpTimer* timer_ = nullptr;
};

class SwapsFirstRows final : public BrokenBackend {
  void Break(std::span<float> result, int rows) override {
    if (rows < 2) return;
    const size_t row = result.size() / rows;
    std::swap_ranges(result.begin(), result.begin() + row, result.begin() + row);
  }
};

class ScalesBy final : public BrokenBackend {
 public:
  explicit ScalesBy(float factor) : factor_(factor) {}

 private:
  void Break(std::span<float> result, int) override {
    for (float& value : result) value *= factor_;
  }
  const float factor_;
};

class LastIs final : public BrokenBackend {
 public:
  explicit LastIs(float value) : value_(value) {}

 private:
  void Break(std::span<float> result, int) override { result.back() = value_; }
  const float value_;
};

// Within any tolerance, but not the same in a batch: the last bit of a row depends on the batch.
class DependsOnBatch final : public BrokenBackend {
  void Break(std::span<float> result, int rows) override {
    if (rows > 8) result[0] = std::nextafter(result[0], 1e9f);
  }
};

class Fails final : public BrokenBackend {
  void Break(std::span<float>, int) override {}
  absl::Status MatMul(const TensorInfo&, std::span<const std::byte>, std::span<const float>, int,
                      std::span<float>) override {
    return absl::InternalError("device lost");
  }
};

// A few cases of every operation.
constexpr const char* kSamples[] = {
    "MatMul/Q4_K/n=17,k=768/", "MatMul/F32/n=5,k=32/",
    "RmsNorm/columns=64",      "Rope/plain",
    "SwiGlu/count=512",        "Attention/heads=4,kv=4,key=64,value=64/KV F32/",
    "Model/plain/Q6_K/"};

TEST(Conformance, ReferencePasses) {
  const std::unique_ptr<Backend> reference = MakeReferenceBackend();
  for (const char* filter :
       {"MatMul/Q2_K/n=17", "MatMul/Q8_0/n=5", "MatMul/BF16/n=64", "RmsNorm/", "Rope/", "SwiGlu/",
        "Attention/heads=4,kv=2,key=96,value=64/KV F16", "Model/plain/Q6_K/",
        "Model/biases, frequency factors, unequal heads/Q4_0", "UnitBuilder/"}) {
    EXPECT_THAT(Failures(*reference, filter), testing::IsEmpty());
  }
}

TEST(Conformance, SwappedRowsFail) {
  SwapsFirstRows backend;
  for (const char* filter :
       {"MatMul/Q4_K/n=17,k=768/rows=2", "MatMul/F32/n=5,k=32/rows=33",
        "RmsNorm/columns=64,rows=33,epsilon=1e-05", "Rope/plain",
        "key=64,value=64/KV F32/chunk over a tile edge", "Model/plain/Q6_K/"}) {
    EXPECT_THAT(Failures(backend, filter), testing::Not(testing::IsEmpty())) << filter;
  }
}

TEST(Conformance, ScaledResultsFail) {
  ScalesBy backend(1.05f);
  for (const char* filter : kSamples) {
    EXPECT_THAT(Failures(backend, filter), testing::Not(testing::IsEmpty())) << filter;
  }
}

TEST(Conformance, OneBadElementFails) {
  for (const float value :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    LastIs backend(value);
    for (const char* filter : kSamples) {
      for (const ConformanceResult& result : RunConformance(backend, {.filter = filter})) {
        EXPECT_FALSE(result.passed) << result.name;
      }
    }
  }
}

TEST(Conformance, OneBitThatDependsOnTheBatchFailsTheBitCasesAlone) {
  DependsOnBatch backend;
  for (const char* filter : {"MatMul/Q4_K/n=17,k=768/", "Attention/heads=4,kv=4,key=64,value=64/",
                             "Model/plain/Q6_K/"}) {
    const std::vector<std::string> failures = Failures(backend, filter);
    EXPECT_THAT(failures, testing::Not(testing::IsEmpty())) << filter;
    EXPECT_THAT(failures, testing::Each(testing::HasSubstr("bits differ"))) << filter;
  }
}

TEST(Conformance, AnErrorFailsWithItsMessage) {
  Fails backend;
  EXPECT_THAT(Failures(backend, "MatMul/Q4_K/n=17,k=768/rows=1"),
              testing::Each(testing::HasSubstr("device lost")));
}

std::vector<TimingResult> Time(Backend& backend, const TimingOptions& options) {
  std::vector<TimingResult> results;
  TimeConformance(backend, options, [&](const TimingResult& result) { results.push_back(result); });
  return results;
}

TEST(TimeConformance, TimesWhatIsRight) {
  ScalesBy backend(1);
  const std::vector<TimingResult> results = Time(
      backend, {.filter = "", .types = {"F32", "Q4_K"}, .shapes = {{64, 512}}, .rows = {1, 5}});
  ASSERT_EQ(results.size(), 4u + 6 + 5);
  for (const TimingResult& result : results) {
    EXPECT_EQ(result.error, "") << result.op << " " << result.shape;
    EXPECT_EQ(result.seconds, kTimedSeconds) << result.op << " " << result.shape;
    EXPECT_GT(result.bytes, 0u) << result.op << " " << result.shape;
  }
  EXPECT_EQ(results[2].type, "Q4_K");
  EXPECT_EQ(results[2].bytes, 64u * 2 * 144);
  EXPECT_EQ(results[3].flops, 2u * 64 * 512 * 5);
}

TEST(TimeConformance, RefusesWhatIsWrong) {
  ScalesBy backend(1.1f);
  for (const TimingResult& result :
       Time(backend, {.filter = "u", .types = {"Q8_0"}, .shapes = {{64, 512}}, .rows = {5}})) {
    EXPECT_THAT(result.error, testing::HasSubstr("WRONG")) << result.op << " " << result.shape;
    EXPECT_EQ(result.seconds, 0) << result.op << " " << result.shape;
  }
}

TEST(TimeConformance, SaysThatABackendHasNoTimer) {
  const std::unique_ptr<Backend> reference = MakeReferenceBackend();
  const std::vector<TimingResult> results = Time(*reference, {.filter = "Rope", .rows = {1}});
  ASSERT_EQ(results.size(), 1u);
  EXPECT_THAT(results[0].error, testing::HasSubstr("does not time"));
}

}  // namespace
}  // namespace stagecoach
