// Frames that break the contract: a typed error, and afterwards nothing has changed.
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/sampling.h"
#include "worker/stage.h"
#include "worker/stage_fixture.h"

namespace stagecoach {
namespace {

using Code = absl::StatusCode;
using ::testing::HasSubstr;

constexpr uint32_t kHuge = std::numeric_limits<uint32_t>::max();

struct BadFrame {
  std::string name;
  Code code;
  std::function<void(Frame&)> spoil;
};

v1::StepHeader& Step(Frame& frame) { return *frame.header.mutable_step(); }
v1::SamplingParams& Sampling(Frame& frame) {
  return *Step(frame).mutable_open(0)->mutable_sampling();
}
void AddCopy(Frame& frame, uint32_t from, uint32_t to) {
  v1::BlockCopy& copy = *Step(frame).add_copies();
  copy.set_from(from);
  copy.set_to(to);
}
void ResizePayload(Frame& frame, size_t size) {
  const auto values = frame.payload.values();
  std::vector<float> resized(values.begin(), values.end());
  resized.resize(size);
  frame.payload = Payload(std::move(resized));
}

// Spoils the good second step, whichever stage it is for. max_slots 3, max_context 40, 20 rows.
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

const std::vector<BadFrame> kBadFrames = {
    {"EpochOld", Code::kAborted, [](Frame& f) { f.header.set_epoch(kTestEpoch - 1); }},
    {"EpochNew", Code::kAborted, [](Frame& f) { f.header.set_epoch(kTestEpoch + 1); }},
    {"NoBody", Code::kInvalidArgument, [](Frame& f) { f.header.clear_body(); }},
    {"Result", Code::kInvalidArgument, [](Frame& f) { f.header.mutable_result(); }},
    {"Hello", Code::kInvalidArgument, [](Frame& f) { f.header.mutable_hello(); }},
    {"StepReplayed", Code::kAlreadyExists, [](Frame& f) { Step(f).set_step(1); }},
    {"StepZero", Code::kAlreadyExists, [](Frame& f) { Step(f).set_step(0); }},
    {"StepSkipped", Code::kOutOfRange, [](Frame& f) { Step(f).set_step(3); }},
    {"DModel", Code::kFailedPrecondition, [](Frame& f) { Step(f).set_d_model(1024); }},
    {"CloseUnknown", Code::kNotFound, [](Frame& f) { Step(f).add_close(2); }},
    {"CloseTwice", Code::kNotFound, [](Frame& f) { Step(f).add_close(1); }},
    {"CloseOutside", Code::kInvalidArgument, [](Frame& f) { Step(f).add_close(3); }},
    {"CloseHuge", Code::kInvalidArgument, [](Frame& f) { Step(f).add_close(kHuge); }},
    {"CloseUnderRows", Code::kNotFound, [](Frame& f) { Step(f).add_close(0); }},
    {"OpenOutside", Code::kInvalidArgument, [](Frame& f) { Step(f).add_open()->set_slot(3); }},
    {"OpenHuge", Code::kInvalidArgument, [](Frame& f) { Step(f).add_open()->set_slot(kHuge); }},
    {"OpenTaken", Code::kInvalidArgument, [](Frame& f) { Step(f).add_open()->set_slot(0); }},
    {"OpenTwice", Code::kInvalidArgument, [](Frame& f) { *Step(f).add_open() = Step(f).open(0); }},
    {"PromptBeyondContext", Code::kInvalidArgument,
     [](Frame& f) { Step(f).mutable_open(0)->set_prompt_tokens(41); }},
    {"TemperatureNaN", Code::kInvalidArgument, [](Frame& f) { Sampling(f).set_temperature(kNaN); }},
    {"TemperatureNegative", Code::kInvalidArgument,
     [](Frame& f) { Sampling(f).set_temperature(-1); }},
    {"TopP", Code::kInvalidArgument, [](Frame& f) { Sampling(f).set_top_p(2); }},
    {"MinP", Code::kInvalidArgument, [](Frame& f) { Sampling(f).set_min_p(-0.5f); }},
    {"RepetitionPenalty", Code::kInvalidArgument,
     [](Frame& f) { Sampling(f).set_repetition_penalty(kNaN); }},
    {"PresencePenalty", Code::kInvalidArgument,
     [](Frame& f) { Sampling(f).set_presence_penalty(-2.5f); }},
    {"FrequencyPenalty", Code::kInvalidArgument,
     [](Frame& f) { Sampling(f).set_frequency_penalty(3); }},
    {"Logprobs", Code::kInvalidArgument,
     [](Frame& f) { Sampling(f).set_logprobs(kMaxLogprobs + 1); }},
    {"LogitBiasToken", Code::kInvalidArgument,
     [](Frame& f) { (*Sampling(f).mutable_logit_bias())[-1] = 1; }},
    {"LogitBias", Code::kInvalidArgument,
     [](Frame& f) { (*Sampling(f).mutable_logit_bias())[1] = kNaN; }},
    {"RowsUnknownSlot", Code::kNotFound, [](Frame& f) { Step(f).mutable_rows(0)->set_slot(2); }},
    {"RowsOutside", Code::kInvalidArgument, [](Frame& f) { Step(f).mutable_rows(0)->set_slot(3); }},
    {"RowsForeignSequence", Code::kNotFound,
     [](Frame& f) { Step(f).mutable_rows(0)->set_sequence_id(99); }},
    {"RowsOfClosedSequence", Code::kNotFound,
     [](Frame& f) { Step(f).mutable_rows(1)->set_sequence_id(2); }},
    {"RowsTwice", Code::kInvalidArgument,
     [](Frame& f) {
       Step(f).mutable_rows(1)->set_slot(0);
       Step(f).mutable_rows(1)->set_sequence_id(1);
       Step(f).mutable_rows(1)->set_start_position(15);
     }},
    {"PositionBehind", Code::kOutOfRange,
     [](Frame& f) { Step(f).mutable_rows(0)->set_start_position(9); }},
    {"PositionAhead", Code::kOutOfRange,
     [](Frame& f) { Step(f).mutable_rows(1)->set_start_position(1); }},
    {"PositionHuge", Code::kOutOfRange,
     [](Frame& f) { Step(f).mutable_rows(0)->set_start_position(kHuge); }},
    {"RowCountZero", Code::kInvalidArgument,
     [](Frame& f) {
       Step(f).mutable_rows(0)->set_row_count(0);
       Step(f).mutable_rows(1)->set_row_count(11);
     }},
    {"RowCountHuge", Code::kInvalidArgument,
     [](Frame& f) { Step(f).mutable_rows(0)->set_row_count(kHuge); }},
    {"RowCountsWrap", Code::kInvalidArgument,
     [](Frame& f) {
       Step(f).mutable_rows(0)->set_row_count(kHuge);
       Step(f).mutable_rows(1)->set_row_count(12);
     }},
    {"RowCountOff", Code::kInvalidArgument,
     [](Frame& f) { Step(f).mutable_rows(0)->set_row_count(6); }},
    {"TokenMissing", Code::kInvalidArgument,
     [](Frame& f) { Step(f).mutable_token_ids()->RemoveLast(); }},
    {"TokenExtra", Code::kInvalidArgument, [](Frame& f) { Step(f).add_token_ids(1); }},
    {"TokenNegative", Code::kInvalidArgument, [](Frame& f) { Step(f).set_token_ids(3, -1); }},
    {"TokenBeyondVocab", Code::kInvalidArgument, [](Frame& f) { Step(f).set_token_ids(10, 1024); }},
    {"TargetsWithoutLogprobs", Code::kInvalidArgument,
     [](Frame& f) { Step(f).mutable_rows(0)->add_targets(1); }},
    {"TargetsTooFew", Code::kInvalidArgument,
     [](Frame& f) { Step(f).mutable_rows(0)->set_logprobs(true); }},
    {"TargetOutside", Code::kInvalidArgument,
     [](Frame& f) {
       Step(f).mutable_rows(0)->set_logprobs(true);
       for (const int target : {1, 2, 3, 4, 1024}) Step(f).mutable_rows(0)->add_targets(target);
     }},
    {"BlockOutside", Code::kInvalidArgument,
     [](Frame& f) { Step(f).mutable_rows(1)->set_new_blocks(0, 12); }},
    {"BlockHuge", Code::kInvalidArgument,
     [](Frame& f) { Step(f).mutable_rows(1)->set_new_blocks(0, kHuge); }},
    {"BlockMissing", Code::kInvalidArgument,
     [](Frame& f) { Step(f).mutable_rows(1)->clear_new_blocks(); }},
    {"BlockExtra", Code::kInvalidArgument,
     [](Frame& f) { Step(f).mutable_rows(1)->add_new_blocks(9); }},
    {"BlockUnasked", Code::kInvalidArgument,
     [](Frame& f) { Step(f).mutable_rows(0)->add_new_blocks(9); }},
    {"BlockOfAnother", Code::kInvalidArgument,
     [](Frame& f) { Step(f).mutable_rows(1)->set_new_blocks(0, 0); }},
    {"BlockSharedWhileWritten", Code::kInvalidArgument,
     [](Frame& f) {
       v1::SequenceOpen& open = *Step(f).add_open();
       open.set_slot(2);
       open.add_cached_blocks(0);
       open.add_cached_token_ids(7);
     }},
    {"CachedBlockOutside", Code::kInvalidArgument,
     [](Frame& f) {
       Step(f).mutable_open(0)->add_cached_blocks(12);
       Step(f).mutable_open(0)->add_cached_token_ids(7);
     }},
    {"CachedBlockWithoutTokens", Code::kInvalidArgument,
     [](Frame& f) { Step(f).mutable_open(0)->add_cached_blocks(8); }},
    {"CachedTokensWithoutBlock", Code::kInvalidArgument,
     [](Frame& f) { Step(f).mutable_open(0)->add_cached_token_ids(7); }},
    {"CachedTokenOutside", Code::kInvalidArgument,
     [](Frame& f) {
       Step(f).mutable_open(0)->add_cached_blocks(8);
       Step(f).mutable_open(0)->add_cached_token_ids(1024);
     }},
    {"CachedBeyondContext", Code::kInvalidArgument,
     [](Frame& f) {
       for (int i = 0; i < 2; ++i) Step(f).mutable_open(0)->add_cached_blocks(8 + i);
       for (int i = 0; i < 41; ++i) Step(f).mutable_open(0)->add_cached_token_ids(7);
     }},
    {"RowsBeforeTheEndOfTheCached", Code::kOutOfRange,
     [](Frame& f) {
       Step(f).mutable_open(0)->add_cached_blocks(8);
       Step(f).mutable_open(0)->add_cached_token_ids(7);
     }},
    {"ClearOutside", Code::kInvalidArgument, [](Frame& f) { Step(f).add_clear_blocks(12); }},
    {"ClearOfABlockInUse", Code::kInvalidArgument, [](Frame& f) { Step(f).add_clear_blocks(0); }},
    {"CopyFromOutside", Code::kInvalidArgument, [](Frame& f) { AddCopy(f, 12, 8); }},
    {"CopyToOutside", Code::kInvalidArgument, [](Frame& f) { AddCopy(f, 0, kHuge); }},
    {"CopyToABlockInUse", Code::kInvalidArgument, [](Frame& f) { AddCopy(f, 8, 0); }},
    {"CopyToItself", Code::kInvalidArgument, [](Frame& f) { AddCopy(f, 8, 8); }},
    {"TwoCopiesToOneBlock", Code::kInvalidArgument,
     [](Frame& f) {
       AddCopy(f, 0, 8);
       AddCopy(f, 9, 8);
     }},
    {"CopyOfACopy", Code::kInvalidArgument,
     [](Frame& f) {
       AddCopy(f, 0, 8);
       AddCopy(f, 8, 9);
     }},
    {"SeveralRowsAhead", Code::kInvalidArgument,
     [](Frame& f) { Step(f).mutable_rows(0)->set_ahead(true); }},
    {"PayloadLong", Code::kInvalidArgument,
     [](Frame& f) { ResizePayload(f, f.payload.values().size() + 1); }},
    {"TimingExtra", Code::kInvalidArgument, [](Frame& f) { Step(f).add_timings(); }},
};

class StageErrorTest : public ::testing::Test {
 protected:
  StageErrorTest() : backend_(MakeCpuBackend({.threads = 1})) {
    auto model = OpenHookedModel("demo2-Q4_K_S.gguf", std::make_shared<ReadHook>());
    EXPECT_TRUE(model.ok()) << model.status();
    model_ = *std::move(model);
    for (int i = 0; i < 64; ++i) tokens_.push_back((i * 53 + 7) % 1024);
  }
  // Two stages after the first step: sequence 1 in slot 0 with 10 positions, 2 in slot 1 with 4.
  std::unique_ptr<StageRow> StartedRow() {
    auto row = std::make_unique<StageRow>(
        backend_.get(), model_,
        StageRow::Options{.splits = {1}, .max_slots = 3, .max_context = 40, .max_step_tokens = 20});
    EXPECT_TRUE(row->Run(StepBuilder(1)
                             .Open(0, 1)
                             .Open(1, 2)
                             .Rows(0, 1, 0, Tokens(0, 10))
                             .Rows(1, 2, 0, Tokens(30, 4))
                             .Build())
                    .ok());
    return row;
  }
  Frame GoodStep() const {
    return StepBuilder(2)
        .Close(1)
        .Open(1, 3)
        .Rows(0, 1, 10, Tokens(10, 5))
        .Logits()
        .Rows(1, 3, 0, Tokens(40, 6))
        .Logits()
        .Build();
  }
  std::span<const int32_t> Tokens(size_t first, size_t count) const {
    return std::span<const int32_t>(tokens_).subspan(first, count);
  }

  std::unique_ptr<Backend> backend_;
  std::shared_ptr<const ModelFile> model_;
  std::vector<int32_t> tokens_;
};

// By stage: without and with a payload.
class StageBadFrameTest : public StageErrorTest, public ::testing::WithParamInterface<int> {};

TEST_P(StageBadFrameTest, ChangesNothing) {
  const size_t stage = GetParam();
  const std::unique_ptr<StageRow> undisturbed = StartedRow();
  Frame good = GoodStep();
  if (stage == 1) good = *(*undisturbed)[0].Run(good);
  const auto expected = (*undisturbed)[stage].Run(good);
  ASSERT_TRUE(expected.ok()) << expected.status();
  ASSERT_FALSE(expected->payload.values().empty());

  for (const BadFrame& bad : kBadFrames) {
    SCOPED_TRACE(bad.name);
    const std::unique_ptr<StageRow> row = StartedRow();
    Frame frame = good;
    bad.spoil(frame);
    const absl::Status status = (*row)[stage].Run(frame).status();
    EXPECT_EQ(status.code(), bad.code) << status;
    EXPECT_FALSE(status.message().empty());
    EXPECT_EQ((*row)[stage].steps(), 1);
    const auto out = (*row)[stage].Run(good);
    ASSERT_TRUE(out.ok()) << out.status();
    EXPECT_TRUE(SameBits(out->payload.values(), expected->payload.values()));
  }
}
INSTANTIATE_TEST_SUITE_P(Stages, StageBadFrameTest, ::testing::Values(0, 1));

TEST_F(StageErrorTest, RowAheadAtOneOfSeveralStages) {
  const std::unique_ptr<StageRow> row = StartedRow();
  ASSERT_TRUE(row->Run(StepBuilder(2).Rows(0, 1, 10, Tokens(10, 1)).Sample().Build()).ok());
  const int32_t zero[] = {0};
  const Frame bad = StepBuilder(3).Rows(0, 1, 11, zero).Ahead().Sample().Build();
  const absl::Status status = (*row)[0].Run(bad).status();
  EXPECT_EQ(status.code(), Code::kInvalidArgument);
  EXPECT_TRUE(absl::StrContains(status.message(), "is not first and last")) << status;
  EXPECT_EQ((*row)[0].steps(), 2);
  EXPECT_TRUE(row->Run(StepBuilder(3).Rows(0, 1, 11, Tokens(11, 1)).Sample().Build()).ok());
}

TEST_F(StageErrorTest, PayloadThatDoesNotMatchItsRows) {
  const std::unique_ptr<StageRow> row = StartedRow();
  const Frame good = GoodStep();
  Frame frame = *(*row)[0].Run(good);
  const size_t size = frame.payload.values().size();
  ASSERT_EQ(size, 11u * model_->params().d_model);
  for (const size_t wrong : {size_t{0}, size - 1, size - model_->params().d_model, size * 2}) {
    Frame bad = frame;
    ResizePayload(bad, wrong);
    EXPECT_EQ((*row)[1].Run(bad).status().code(), Code::kInvalidArgument);
  }
  Frame for_stage_0 = frame;  // the right payload at a stage that takes none
  Step(for_stage_0).set_d_model(0);
  EXPECT_EQ((*row)[1].Run(for_stage_0).status().code(), Code::kFailedPrecondition);
  EXPECT_TRUE((*row)[1].Run(frame).ok());
}

TEST_F(StageErrorTest, PayloadBesideTheFrameMustBeTheOneThatIsDue) {
  StageRow frames(backend_.get(), model_, {.splits = {1}});
  StageRow row(backend_.get(), model_, {.splits = {1}, .channels = true});
  const Frame first = StepBuilder(1).Open(0, 1).Rows(0, 1, 0, Tokens(0, 9)).Logits().Build();
  const Frame frame = *row[0].Run(first);
  const Frame in_frame = *frames[0].Run(first);
  const size_t size = size_t{9} * model_->params().d_model;
  EXPECT_TRUE(frame.payload.values().empty());
  EXPECT_EQ(frame.header.nccl_floats(), size);
  for (const uint64_t wrong : {uint64_t{0}, uint64_t{size - 1}, uint64_t{2 * size}, UINT64_MAX}) {
    Frame bad = frame;
    bad.header.set_nccl_floats(wrong);
    EXPECT_EQ(row[1].Run(bad).status().code(), Code::kInvalidArgument) << wrong;
  }
  EXPECT_EQ(row[1].Run(in_frame).status().code(), Code::kInvalidArgument);
  EXPECT_EQ(frames[1].Run(frame).status().code(), Code::kInvalidArgument);
  EXPECT_EQ(row.channel(0).waiting(), 1u);  // a refused frame has taken nothing
  const auto out = row[1].Run(frame), expected = frames[1].Run(in_frame);
  ASSERT_TRUE(out.ok() && expected.ok()) << out.status() << expected.status();
  EXPECT_TRUE(SameBits(out->payload.values(), expected->payload.values()));
  EXPECT_EQ(out->header.nccl_floats(), 0u);
}

TEST_F(StageErrorTest, RowsAheadThatDoNotFit) {
  const int32_t zero[] = {0, 0};
  const auto ahead = [&](uint32_t slot, uint64_t id, uint32_t start, size_t rows) {
    return StepBuilder(2).Rows(slot, id, start, {zero, rows}).Ahead();
  };
  StageRow row(backend_.get(), model_, {});
  ASSERT_TRUE(row.Run(StepBuilder(1)
                          .Open(0, 1)
                          .Open(1, 2)
                          .Rows(0, 1, 0, Tokens(0, 10))
                          .Sample()
                          .Rows(1, 2, 0, Tokens(30, 4))
                          .Build())
                  .ok());
  const std::vector<std::pair<Frame, Code>> frames = {
      {ahead(0, 1, 10, 2).Build(), Code::kInvalidArgument},  // two rows
      {StepBuilder(2).Rows(0, 1, 10, Tokens(5, 1)).Ahead().Build(), Code::kInvalidArgument},
      {ahead(1, 2, 4, 1).Build(), Code::kInvalidArgument},             // no sample before
      {ahead(2, 3, 0, 1).Build(), Code::kNotFound},                    // not open
      {ahead(2, 3, 0, 1).Open(2, 3).Build(), Code::kInvalidArgument},  // nothing before
      {ahead(0, 9, 10, 1).Build(), Code::kNotFound},                   // another's slot
      {ahead(0, 1, 10, 1).Close(0).Build(), Code::kNotFound},
      {ahead(0, 1, 10, 1).Close(0).Open(0, 1).Build(), Code::kOutOfRange},
      {ahead(0, 1, 11, 1).Build(), Code::kOutOfRange},
  };
  for (const auto& [frame, code] : frames) {
    const absl::Status status = row.Run(frame).status();
    EXPECT_EQ(status.code(), code) << status << frame.header.step().DebugString();
  }
  EXPECT_EQ(row[0].steps(), 1u);
  // Once: the row ahead must sample itself for another one to follow.
  EXPECT_TRUE(row.Run(ahead(0, 1, 10, 1).Build()).ok());
  Frame again = ahead(0, 1, 11, 1).Build();
  again.header.mutable_step()->set_step(3);
  EXPECT_EQ(row.Run(again).status().code(), Code::kInvalidArgument);
}

TEST_F(StageErrorTest, ContextIsTheLimit) {
  StageRow row(backend_.get(), model_, {.max_context = 40});
  Frame frame = StepBuilder(1).Open(0, 1).Rows(0, 1, 0, Tokens(0, 41)).Build();
  EXPECT_EQ(row.Run(frame).status().code(), Code::kOutOfRange);
  EXPECT_TRUE(row.Run(StepBuilder(1).Open(0, 1).Rows(0, 1, 0, Tokens(0, 40)).Build()).ok());
  EXPECT_EQ(row.Run(StepBuilder(2).Rows(0, 1, 40, Tokens(0, 1)).Build()).status().code(),
            Code::kOutOfRange);
}

TEST_F(StageErrorTest, ImpossibleConfigsAreRefused) {
  LayerStore store(backend_.get(), model_, {.prefetch = false});
  const StageConfig good{
      .last_layer = 2, .max_slots = 2, .max_context = 64, .kv_blocks = 4, .max_step_tokens = 8};
  ASSERT_TRUE(Stage::Create(backend_.get(), model_, &store, good).ok());
  const std::vector<std::function<void(StageConfig&)>> spoilers = {
      [](StageConfig& c) { c.stages = 0; },
      [](StageConfig& c) { c.stages = 3; },
      [](StageConfig& c) { c.stage = 1; },
      [](StageConfig& c) { c.stage = -1; },
      [](StageConfig& c) { c.last_layer = 1; },
      [](StageConfig& c) { c.last_layer = 3; },
      [](StageConfig& c) { c.first_layer = 1; },
      [](StageConfig& c) { c.first_layer = -1; },
      [](StageConfig& c) { c.last_layer = 0; },
      [](StageConfig& c) { c.device_input = true; },
      [](StageConfig& c) { c.device_output = true; },
      [](StageConfig& c) { c.max_slots = 0; },
      [](StageConfig& c) { c.max_slots = kMaxSlots + 1; },
      [](StageConfig& c) { c.max_context = 0; },
      [](StageConfig& c) { c.max_context = std::numeric_limits<int>::max(); },
      [](StageConfig& c) { c.kv_blocks = 0; },
      [](StageConfig& c) { c.kv_blocks = -1; },
      [](StageConfig& c) { c.max_step_tokens = 0; },
      [](StageConfig& c) { c.max_step_tokens = kMaxStepTokens + 1; },
  };
  for (size_t i = 0; i < spoilers.size(); ++i) {
    StageConfig config = good;
    spoilers[i](config);
    EXPECT_EQ(Stage::Create(backend_.get(), model_, &store, config).status().code(),
              Code::kInvalidArgument)
        << i;
  }
  StageConfig huge = good;
  huge.kv_blocks = std::numeric_limits<int>::max();
  const absl::Status status = Stage::Create(backend_.get(), model_, &store, huge).status();
  EXPECT_EQ(status.code(), Code::kResourceExhausted) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("bytes"));
}

}  // namespace
}  // namespace stagecoach
