// For tests: stages of a small model in a row, and the frames that drive them.
#ifndef STAGECOACH_WORKER_STAGE_FIXTURE_H_
#define STAGECOACH_WORKER_STAGE_FIXTURE_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/backend.h"
#include "model/model_file.h"
#include "worker/hooked_file.h"
#include "worker/kv_slots.h"
#include "worker/layer_store.h"
#include "worker/link/frame.h"
#include "worker/stage.h"

namespace stagecoach {

inline constexpr uint64_t kTestEpoch = 5;

// Slot s takes the blocks from s * kTestSlotBlocks on, in order, unless a test says otherwise.
inline constexpr int kTestSlotBlocks = 4;

// Builds the frame of one step for stage 0.
class StepBuilder {
 public:
  explicit StepBuilder(uint64_t step) {
    frame_.header.set_epoch(kTestEpoch);
    header().set_step(step);
  }
  StepBuilder& Close(uint32_t slot) {
    header().add_close(slot);
    return *this;
  }
  // `id` is the sequence's, here and below.
  StepBuilder& Open(uint32_t slot, uint64_t id, const v1::SamplingParams& sampling = {},
                    uint32_t prompt_tokens = 0) {
    v1::SequenceOpen& open = *header().add_open();
    open.set_slot(slot);
    open.set_sequence_id(id);
    *open.mutable_sampling() = sampling;
    open.set_prompt_tokens(prompt_tokens);
    return *this;
  }
  // KV that the sequence opened last begins with.
  StepBuilder& Cached(std::initializer_list<uint32_t> blocks, std::span<const int32_t> tokens) {
    v1::SequenceOpen& open = *header().mutable_open(header().open_size() - 1);
    open.mutable_cached_blocks()->Add(blocks.begin(), blocks.end());
    open.mutable_cached_token_ids()->Add(tokens.begin(), tokens.end());
    return *this;
  }
  StepBuilder& Clear(uint32_t block) {
    header().add_clear_blocks(block);
    return *this;
  }
  StepBuilder& Copy(uint32_t from, uint32_t to) {
    v1::BlockCopy& copy = *header().add_copies();
    copy.set_from(from);
    copy.set_to(to);
    return *this;
  }
  StepBuilder& Rows(uint32_t slot, uint64_t id, uint32_t start, std::span<const int32_t> tokens) {
    v1::SequenceRows& rows = *header().add_rows();
    rows.set_slot(slot);
    rows.set_sequence_id(id);
    rows.set_start_position(start);
    rows.set_row_count(static_cast<uint32_t>(tokens.size()));
    const int end = static_cast<int>(start + tokens.size());
    for (int i = KvBlocksFor(static_cast<int>(start)); i < KvBlocksFor(end); ++i) {
      rows.add_new_blocks(slot * kTestSlotBlocks + i);
    }
    header().mutable_token_ids()->Add(tokens.begin(), tokens.end());
    return *this;
  }
  // Other blocks for the rows added last.
  StepBuilder& Blocks(std::initializer_list<uint32_t> blocks) {
    last_rows().clear_new_blocks();
    last_rows().mutable_new_blocks()->Add(blocks.begin(), blocks.end());
    return *this;
  }
  // What the rows added last shall return.
  StepBuilder& Sample() {
    last_rows().set_sample(true);
    return *this;
  }
  StepBuilder& Ahead() {
    last_rows().set_ahead(true);
    return *this;
  }
  StepBuilder& Logits() {
    last_rows().set_logits(true);
    return *this;
  }
  StepBuilder& Targets(std::span<const int32_t> targets) {
    last_rows().set_logprobs(true);
    last_rows().mutable_targets()->Add(targets.begin(), targets.end());
    return *this;
  }
  Frame Build() const { return frame_; }

 private:
  v1::StepHeader& header() { return *frame_.header.mutable_step(); }
  v1::SequenceRows& last_rows() { return *header().mutable_rows(header().rows_size() - 1); }
  Frame frame_;
};

// Both ends of a channel in one thread: payloads wait in a queue.
class QueueChannel : public DeviceChannel {
 public:
  QueueChannel(const ChannelMemory& from, const ChannelMemory& to) : from_(from), to_(to) {}
  size_t waiting() const { return payloads_.size(); }
  absl::Status AwaitReady() override { return absl::OkStatus(); }
  absl::Status Send(size_t floats) override {
    payloads_.emplace_back(from_.data, from_.data + floats);
    return absl::OkStatus();
  }
  absl::Status Receive(size_t floats) override {
    if (payloads_.empty()) return absl::UnavailableError("nothing was sent");
    if (payloads_.front().size() != floats) return absl::UnavailableError("of another size");
    std::copy(payloads_.front().begin(), payloads_.front().end(), to_.data);
    payloads_.pop_front();
    ++received_;
    return absl::OkStatus();
  }
  absl::StatusOr<uint64_t> Received() override {
    if (!broken.ok()) return broken;
    return received_ - late;
  }
  absl::Status AwaitReceived() override {
    ++awaited;
    return broken;
  }
  absl::Status broken;  // what the receiving end says of it
  uint64_t late = 0;    // payloads that have not come yet, as far as is told
  int awaited = 0;      // calls
  void Cancel() override {}

 private:
  const ChannelMemory from_, to_;
  std::deque<std::vector<float>> payloads_;
  uint64_t received_ = 0;
};

// Stages that together hold the whole model, cut at the layers `splits`.
class StageRow {
 public:
  struct Options {
    std::vector<int> splits;
    int max_slots = 4;
    int max_context = 96;
    int max_step_tokens = 64;
    bool prefetch = true;
    bool channels = false;  // activations go beside the frames
  };
  StageRow(Backend* backend, std::shared_ptr<const ModelFile> model, const Options& options) {
    std::vector<int> bounds = {0};
    bounds.insert(bounds.end(), options.splits.begin(), options.splits.end());
    bounds.push_back(model->params().layers);
    for (size_t i = 0; i + 1 < bounds.size(); ++i) {
      stores_.push_back(std::make_unique<LayerStore>(
          backend, model, LayerStoreOptions{.prefetch = options.prefetch}));
      stores_.back()->Assign(StageUnits(model->params(), bounds[i], bounds[i + 1]));
      auto stage = Stage::Create(backend, model, stores_.back().get(),
                                 {.epoch = kTestEpoch,
                                  .stage = static_cast<int>(i),
                                  .stages = static_cast<int>(bounds.size()) - 1,
                                  .first_layer = bounds[i],
                                  .last_layer = bounds[i + 1],
                                  .max_slots = options.max_slots,
                                  .max_context = options.max_context,
                                  .kv_blocks = options.max_slots * kTestSlotBlocks,
                                  .max_step_tokens = options.max_step_tokens,
                                  .device_input = options.channels && i > 0,
                                  .device_output = options.channels && i + 2 < bounds.size()});
      EXPECT_TRUE(stage.ok()) << stage.status();
      stages_.push_back(*std::move(stage));
    }
    if (options.channels) Connect();
  }
  Stage& operator[](size_t i) { return *stages_[i]; }
  QueueChannel& channel(size_t i) { return *channels_[i]; }  // from stage i on

  // Through all stages, or those from `first` on.
  absl::StatusOr<Frame> Run(Frame frame, size_t first = 0) {
    for (size_t i = first; i < stages_.size(); ++i) {
      absl::StatusOr<Frame> next = stages_[i]->Run(frame);
      if (!next.ok()) return next.status();
      frame = *std::move(next);
    }
    return frame;
  }

 private:
  void Connect() {
    for (size_t i = 0; i + 1 < stages_.size(); ++i) {
      const auto from = stages_[i]->ChannelMemoryOfResidual();
      const auto to = stages_[i + 1]->ChannelMemoryOfResidual();
      EXPECT_TRUE(from.ok() && to.ok()) << from.status() << to.status();
      channels_.push_back(std::make_unique<QueueChannel>(*from, *to));
    }
    for (size_t i = 0; i < stages_.size(); ++i) {
      stages_[i]->SetChannels(i > 0 ? channels_[i - 1].get() : nullptr,
                              i < channels_.size() ? channels_[i].get() : nullptr);
    }
  }

  std::vector<std::unique_ptr<QueueChannel>> channels_;  // outlive the stages, as do these:
  std::vector<std::unique_ptr<LayerStore>> stores_;
  std::vector<std::unique_ptr<Stage>> stages_;
};

inline bool SameBits(std::span<const float> a, std::span<const float> b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size_bytes()) == 0;
}

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_STAGE_FIXTURE_H_
