#include "worker/stage.h"

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/reference/reference_backend.h"
#include "kernels/sampling.h"
#include "model/model_error.h"
#include "worker/stage_fixture.h"

namespace stagecoach {
namespace {

using ::testing::HasSubstr;

struct BackendCase {
  std::string name;
  std::unique_ptr<Backend> (*make)();
  std::string model;
};

class StageTest : public ::testing::TestWithParam<BackendCase> {
 protected:
  void SetUp() override {
    backend_ = GetParam().make();
    auto model = OpenHookedModel(GetParam().model, hook_);
    ASSERT_TRUE(model.ok()) << model.status();
    model_ = *std::move(model);
    for (int i = 0; i < 60; ++i) prompt_.push_back(i == 0 ? 1 : (i * 37 + 11) % Vocab());
  }
  int Vocab() const { return model_->params().vocab_size; }
  StageRow Row(const StageRow::Options& options = {}) {
    return StageRow(backend_.get(), model_, options);
  }
  std::span<const int32_t> Tokens(size_t first, size_t count) const {
    return std::span<const int32_t>(prompt_).subspan(first, count);
  }
  // Logits of the first `count` tokens of the prompt run alone, in one step, by one stage.
  std::vector<float> Expected(size_t count) {
    StageRow row = Row();
    const auto out =
        row.Run(StepBuilder(1).Open(0, 1).Rows(0, 1, 0, Tokens(0, count)).Logits().Build());
    EXPECT_TRUE(out.ok()) << out.status();
    const auto values = out->payload.values();
    return {values.begin(), values.end()};
  }
  std::span<const float> LogitsRow(std::span<const float> logits, size_t row) const {
    return logits.subspan(row * Vocab(), Vocab());
  }

  const std::shared_ptr<ReadHook> hook_ = std::make_shared<ReadHook>();
  std::unique_ptr<Backend> backend_;
  std::shared_ptr<const ModelFile> model_;
  std::vector<int32_t> prompt_;
};

TEST_P(StageTest, TwoStagesGiveTheBitsOfOne) {
  const std::vector<float> expected = Expected(40);
  StageRow row = Row({.splits = {1}});
  const auto out = row.Run(StepBuilder(1).Open(0, 1).Rows(0, 1, 0, Tokens(0, 40)).Logits().Build());
  ASSERT_TRUE(out.ok()) << out.status();
  ASSERT_EQ(out->payload.values().size(), 40u * Vocab());
  EXPECT_TRUE(SameBits(out->payload.values(), expected));
  EXPECT_EQ(out->header.result().step(), 1);
  EXPECT_EQ(out->header.result().vocab(), Vocab());
  EXPECT_EQ(out->header.result().timings_size(), 2);
  EXPECT_GT(out->header.result().timings(0).compute_us(), 0);
}

TEST_P(StageTest, ChunksAndCompanyDoNotChangeBits) {
  const std::vector<float> expected = Expected(40);
  StageRow row = Row({.splits = {1}});
  std::vector<float> logits;
  const auto step = [&](StepBuilder builder) {
    const auto out = row.Run(builder.Build());
    ASSERT_TRUE(out.ok()) << out.status();
    for (const auto& result : out->header.result().sequences()) EXPECT_EQ(result.status_code(), 0);
    logits.insert(logits.end(), out->payload.values().begin(), out->payload.values().end());
  };
  step(StepBuilder(1)
           .Open(2, 9)
           .Open(0, 8)
           .Rows(0, 8, 0, Tokens(20, 9))
           .Rows(2, 9, 0, Tokens(0, 7))
           .Logits());
  step(StepBuilder(2).Rows(2, 9, 7, Tokens(7, 1)).Logits().Rows(0, 8, 9, Tokens(3, 2)));
  step(StepBuilder(3).Close(0).Rows(2, 9, 8, Tokens(8, 32)).Logits());
  EXPECT_TRUE(SameBits(logits, expected));
  EXPECT_EQ(row[0].steps(), 3);
  EXPECT_EQ(row[0].tokens(), 9 + 7 + 3 + 32);
  EXPECT_GT(row[1].compute_seconds(), 0);
}

TEST_P(StageTest, SlotsAreReusedEvenWithinOneStep) {
  const std::vector<float> expected = Expected(10);
  StageRow row = Row({.max_slots = 1});
  ASSERT_TRUE(row.Run(StepBuilder(1).Open(0, 1).Rows(0, 1, 0, Tokens(5, 50)).Build()).ok());
  for (uint64_t step = 2; step < 5; ++step) {
    const auto out = row.Run(
        StepBuilder(step).Close(0).Open(0, step).Rows(0, step, 0, Tokens(0, 10)).Logits().Build());
    ASSERT_TRUE(out.ok()) << out.status();
    EXPECT_TRUE(SameBits(out->payload.values(), expected));
  }
  const auto out = row.Run(StepBuilder(5).Close(0).Build());
  ASSERT_TRUE(out.ok()) << out.status();
  EXPECT_EQ(out->header.result().sequences_size(), 0);
}

TEST_P(StageTest, SamplesWithTheHistoryOfTheSequence) {
  v1::SamplingParams proto;
  proto.set_temperature(0.8f);
  proto.set_repetition_penalty(1.3f);
  proto.set_presence_penalty(1.5f);
  proto.set_frequency_penalty(0.5f);
  proto.set_seed(42);
  proto.set_logprobs(3);
  const SamplingParams params{.temperature = 0.8f,
                              .repetition_penalty = 1.3f,
                              .presence_penalty = 1.5f,
                              .frequency_penalty = 0.5f,
                              .seed = 42,
                              .logprobs = 3};
  StageRow row = Row({.splits = {1}});
  std::vector<int32_t> history(prompt_.begin(), prompt_.begin() + 6);
  ASSERT_TRUE(
      row.Run(StepBuilder(1).Open(1, 7, proto, 6).Rows(1, 7, 0, Tokens(0, 4)).Build()).ok());
  auto out = row.Run(StepBuilder(2).Rows(1, 7, 4, Tokens(4, 2)).Sample().Logits().Build());
  for (uint64_t step = 3; step < 20; ++step) {
    ASSERT_TRUE(out.ok()) << out.status();
    const v1::SequenceResult& result = out->header.result().sequences(0);
    const auto logits = out->payload.values();
    const auto expected = Sample(logits.last(Vocab()), params, history, 6, history.size());
    ASSERT_TRUE(expected.ok()) << expected.status();
    ASSERT_TRUE(result.sampled());
    EXPECT_EQ(result.token_id(), expected->token_id);
    EXPECT_EQ(result.logprob(), expected->logprob);
    EXPECT_THAT(result.top_ids(), ::testing::ElementsAreArray(expected->top_ids));
    EXPECT_THAT(result.top_logprobs(), ::testing::ElementsAreArray(expected->top_logprobs));
    const uint32_t position = history.size();
    history.push_back(result.token_id());
    out = row.Run(
        StepBuilder(step).Rows(1, 7, position, {&history.back(), 1}).Sample().Logits().Build());
  }
}

// Decode steps whose tokens the stage fills in, beside the same with tokens that came back: with
// penalties, so that the history counts, and with a draw. In every third step one sequence's token
// is known after all.
TEST_P(StageTest, RowsAheadGoOnWithWhatWasSampled) {
  v1::SamplingParams sampling;
  sampling.set_repetition_penalty(1.3f);
  sampling.set_presence_penalty(1.5f);
  sampling.set_frequency_penalty(0.5f);
  sampling.set_temperature(0.8f);
  sampling.set_seed(7);
  StageRow known = Row(), ahead = Row();
  const auto first = [&] {
    return StepBuilder(1)
        .Open(2, 1, sampling, 9)
        .Open(0, 2, {}, 4)
        .Rows(2, 1, 0, Tokens(0, 9))
        .Sample()
        .Rows(0, 2, 0, Tokens(9, 4))
        .Sample()
        .Build();
  };
  auto expected = known.Run(first());
  ASSERT_TRUE(expected.ok()) << expected.status();
  ASSERT_TRUE(ahead.Run(first()).ok());
  const int32_t zero[] = {0};
  for (uint32_t i = 0; i < 20; ++i) {
    const int32_t tokens[] = {expected->header.result().sequences(0).token_id(),
                              expected->header.result().sequences(1).token_id()};
    expected = known.Run(StepBuilder(2 + i)
                             .Rows(2, 1, 9 + i, {&tokens[0], 1})
                             .Logits()
                             .Sample()
                             .Rows(0, 2, 4 + i, {&tokens[1], 1})
                             .Sample()
                             .Build());
    ASSERT_TRUE(expected.ok()) << expected.status();
    StepBuilder step(2 + i);
    if (i % 3 == 2) {
      step.Rows(2, 1, 9 + i, {&tokens[0], 1});
    } else {
      step.Rows(2, 1, 9 + i, zero).Ahead();
    }
    step.Logits().Sample().Rows(0, 2, 4 + i, zero).Ahead().Sample();
    const auto out = ahead.Run(step.Build());
    ASSERT_TRUE(out.ok()) << out.status();
    EXPECT_TRUE(SameBits(out->payload.values(), expected->payload.values()));
    for (int s : {0, 1}) {
      EXPECT_EQ(out->header.result().sequences(s).token_id(),
                expected->header.result().sequences(s).token_id());
    }
  }
}

TEST_P(StageTest, ScoresAreTheLogProbabilitiesOfTheLogits) {
  const std::vector<float> logits = Expected(50);
  StageRow row = Row({.splits = {1}});
  std::vector<float> scores;
  const auto run = [&](StepBuilder builder) {
    const auto out = row.Run(builder.Build());
    ASSERT_TRUE(out.ok()) << out.status();
    const v1::SequenceResult& result = out->header.result().sequences(0);
    EXPECT_FALSE(result.sampled());
    EXPECT_TRUE(out->payload.values().empty());
    scores.insert(scores.end(), result.target_logprobs().begin(), result.target_logprobs().end());
  };
  run(StepBuilder(1).Open(0, 1).Rows(0, 1, 0, Tokens(0, 40)).Targets(Tokens(1, 40)));
  run(StepBuilder(2).Rows(0, 1, 40, Tokens(40, 10)).Targets(Tokens(41, 9)));
  ASSERT_EQ(scores.size(), 49u);
  for (size_t i = 0; i < scores.size(); ++i) {
    const auto expected = LogProbability(LogitsRow(logits, i), prompt_[i + 1]);
    ASSERT_TRUE(expected.ok());
    EXPECT_EQ(scores[i], *expected) << i;
  }
}

TEST_P(StageTest, NonFiniteActivationsHitTheirSequenceAlone) {
  for (const float poison :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    const std::vector<float> expected = Expected(12);
    StageRow row = Row({.splits = {1}});
    const Frame frame = StepBuilder(1)
                            .Open(0, 1)
                            .Open(1, 2)
                            .Rows(0, 1, 0, Tokens(20, 12))
                            .Sample()
                            .Rows(1, 2, 0, Tokens(0, 12))
                            .Logits()
                            .Build();
    auto middle = row[0].Run(frame);
    ASSERT_TRUE(middle.ok()) << middle.status();
    std::vector<float> payload(middle->payload.values().begin(), middle->payload.values().end());
    payload[5 * model_->params().d_model + 3] = poison;  // row 5 of 12 of the first sequence
    middle->payload = Payload(std::move(payload));
    auto out = row.Run(*middle, 1);
    ASSERT_TRUE(out.ok()) << out.status();
    const v1::StepResult& result = out->header.result();
    ASSERT_EQ(result.sequences_size(), 2);
    EXPECT_EQ(result.sequences(0).status_code(),
              static_cast<uint32_t>(absl::StatusCode::kDataLoss));
    EXPECT_FALSE(result.sequences(0).sampled());
    EXPECT_EQ(result.sequences(1).status_code(), 0);
    EXPECT_EQ(result.sequences(1).logits_rows(), 12);
    EXPECT_TRUE(SameBits(out->payload.values(), expected));

    // Lost until it is closed; then the slot is as good as new.
    out = row.Run(StepBuilder(2).Rows(0, 1, 12, Tokens(3, 1)).Sample().Build());
    ASSERT_TRUE(out.ok()) << out.status();
    EXPECT_EQ(out->header.result().sequences(0).status_code(),
              static_cast<uint32_t>(absl::StatusCode::kDataLoss));
    out = row.Run(StepBuilder(3).Close(0).Open(0, 3).Rows(0, 3, 0, Tokens(0, 12)).Logits().Build());
    ASSERT_TRUE(out.ok()) << out.status();
    EXPECT_EQ(out->header.result().sequences(0).status_code(), 0);
    EXPECT_TRUE(SameBits(out->payload.values(), expected));
  }
}

TEST_P(StageTest, WildFiniteActivationsHurtNobodyElse) {
  const std::vector<float> expected = Expected(12);
  StageRow row = Row({.splits = {1}, .max_slots = 2});
  auto middle = row[0].Run(StepBuilder(1)
                               .Open(0, 1)
                               .Open(1, 2)
                               .Rows(0, 1, 0, Tokens(20, 12))
                               .Logits()
                               .Rows(1, 2, 0, Tokens(0, 12))
                               .Logits()
                               .Build());
  ASSERT_TRUE(middle.ok()) << middle.status();
  std::vector<float> payload(middle->payload.values().begin(), middle->payload.values().end());
  for (int i = 0; i < 12 * model_->params().d_model; ++i) payload[i] = i % 2 ? 1e30f : -3e38f;
  middle->payload = Payload(std::move(payload));
  auto out = row.Run(*middle, 1);
  ASSERT_TRUE(out.ok()) << out.status();
  const v1::StepResult& result = out->header.result();
  const size_t wild_rows = result.sequences(0).logits_rows();
  EXPECT_EQ(wild_rows, result.sequences(0).status_code() == 0 ? 12u : 0u);
  EXPECT_TRUE(SameBits(out->payload.values().subspan(wild_rows * Vocab()), expected));
  for (const float value : out->payload.values()) ASSERT_TRUE(std::isfinite(value));
  out = row.Run(StepBuilder(2).Close(0).Open(0, 3).Rows(0, 3, 0, Tokens(0, 12)).Logits().Build());
  ASSERT_TRUE(out.ok()) << out.status();
  EXPECT_TRUE(SameBits(out->payload.values(), expected));
}

TEST_P(StageTest, AStepThatFailedForWantOfWeightsCanBeRunAgain) {
  const std::vector<float> expected = Expected(8);
  StageRow row = Row({.prefetch = false});
  const TensorInfo& tensor =
      *model_->UnitTensors({.kind = Unit::Kind::kLayer, .layer = 1})[0].tensor;
  hook_->Set([&](const RandomAccessFile& file, uint64_t offset,
                 std::span<std::byte> out) -> absl::StatusOr<size_t> {
    if (offset == tensor.offset) return MakeModelError(ModelError::kIo, "unplugged");
    return file.ReadSome(offset, out);
  });
  const Frame frame = StepBuilder(1).Open(0, 1, {}, 8).Rows(0, 1, 0, Tokens(0, 8)).Logits().Build();
  const absl::Status status = row.Run(frame).status();
  EXPECT_EQ(GetModelError(status), ModelError::kIo) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(tensor.name));
  EXPECT_EQ(row[0].steps(), 0);
  hook_->Set(nullptr);
  const auto out = row.Run(frame);
  ASSERT_TRUE(out.ok()) << out.status();
  EXPECT_TRUE(SameBits(out->payload.values(), expected));
}

std::unique_ptr<Backend> MakeCpu() { return MakeCpuBackend({.threads = 2}); }

INSTANTIATE_TEST_SUITE_P(Backends, StageTest,
                         ::testing::Values(BackendCase{"reference", MakeReferenceBackend,
                                                       "demo2-F32.gguf"},
                                           BackendCase{"cpu_f32", MakeCpu, "demo2-F32.gguf"},
                                           BackendCase{"cpu_q4_k", MakeCpu, "demo2-Q4_K_S.gguf"}),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace stagecoach
