// Arbitrary bytes as a frame for a stage: never a crash, and after any refusal a good frame runs.
//
// The first byte says how far to help the input past the first checks (epoch, step, payload size),
// so that the deeper ones are reached as well, and which stage runs it; the rest is one message of
// a StageLink. A stage that is first and last has run a step before, behind which rows may go
// ahead.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cpu/cpu_backend.h"
#include "model/model_file.h"
#include "worker/layer_store.h"
#include "worker/link/frame.h"
#include "worker/stage.h"

namespace stagecoach {
namespace {

constexpr int kStepTokens = 8;

void Require(bool ok, const absl::Status& status) {
  if (ok) return;
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  std::abort();
}

// One of two stages of the two-layer model, or the only one, with the weights loaded once for all
// inputs.
class Target {
 public:
  Target(int stage, int stages)
      : stage_number_(stage), stages_(stages), backend_(MakeCpuBackend({.threads = 1})) {
    const char* const model = std::getenv("STAGECOACH_FUZZ_MODEL");
    auto file = ModelFile::Open(model != nullptr ? model : "tests/data/demo2-Q4_K_S.gguf");
    Require(file.ok(), file.status());
    model_ = *std::move(file);
    store_ = std::make_unique<LayerStore>(backend_.get(), model_, LayerStoreOptions{});
    store_->Assign(StageUnits(model_->params(), stage, LastLayer()));
  }

  void Run(Frame frame, uint8_t help) {
    auto stage = Stage::Create(backend_.get(), model_, store_.get(),
                               {.epoch = 1,
                                .stage = stage_number_,
                                .stages = stages_,
                                .first_layer = stage_number_,
                                .last_layer = LastLayer(),
                                .max_slots = 2,
                                .max_context = 48,
                                .kv_blocks = 6,
                                .max_step_tokens = kStepTokens});
    Require(stage.ok(), stage.status());
    if (stages_ == 1) {
      const auto before = (*stage)->Run(Good(1, /*slot=*/0, /*block=*/5));
      Require(before.ok(), before.status());
    }
    if (help & 1) frame.header.set_epoch(1);
    if (frame.header.has_step()) Help(frame, help);
    const auto out = (*stage)->Run(frame);
    const uint64_t next = out.ok() ? frame.header.step().step() + 1 : First();
    const auto after = (*stage)->Run(Good(next, /*slot=*/1, /*block=*/0));
    // Only sequences the input itself opened may stand in the way of the good frame.
    Require(out.ok() || after.ok(), after.status());
  }

 private:
  int LastLayer() const { return stages_ == 1 ? 2 : stage_number_ + 1; }
  uint64_t First() const { return stages_ == 1 ? 2 : 1; }  // step of an input
  int Columns() const { return stage_number_ == 0 ? 0 : model_->params().d_model; }

  void Help(Frame& frame, uint8_t help) const {
    v1::StepHeader& step = *frame.header.mutable_step();
    if (help & 2) step.set_step(First());
    if (!(help & 4)) return;
    step.set_d_model(Columns());
    step.clear_timings();
    if (stage_number_ == 1) step.add_timings();
    const size_t rows = std::min<size_t>(step.token_ids_size(), kStepTokens);
    std::vector<float> payload(frame.payload.values().begin(), frame.payload.values().end());
    payload.resize(rows * Columns(), 0.5f);
    frame.payload = Payload(std::move(payload));
  }

  Frame Good(uint64_t number, int slot, int block) const {
    Frame frame;
    frame.header.set_epoch(1);
    v1::StepHeader& step = *frame.header.mutable_step();
    step.set_step(number);
    step.set_d_model(Columns());
    if (stage_number_ == 1) step.add_timings();
    step.add_open()->set_slot(slot);
    v1::SequenceRows& rows = *step.add_rows();
    rows.set_slot(slot);
    rows.set_row_count(1);
    rows.add_new_blocks(block);
    rows.set_sample(true);
    step.add_token_ids(3);
    frame.payload = Payload(std::vector<float>(Columns(), 0.25f));
    return frame;
  }

  const int stage_number_;
  const int stages_;
  const std::unique_ptr<Backend> backend_;
  std::shared_ptr<const ModelFile> model_;
  std::unique_ptr<LayerStore> store_;
};

}  // namespace
}  // namespace stagecoach

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace stagecoach;  // NOLINT: the entry point is outside the namespace
  static Target* const targets[] = {new Target(0, 2), new Target(1, 2), new Target(0, 1)};
  if (size == 0) return 0;
  // A copy: the codec keeps its message alive by an owner.
  const auto message = std::make_shared<std::vector<std::byte>>(size - 1);
  for (size_t i = 1; i < size; ++i) (*message)[i - 1] = static_cast<std::byte>(data[i]);
  auto frame = DecodeFrame(*message, message, 1 << 20);
  if (frame.ok()) targets[(data[0] >> 3) % 3]->Run(*std::move(frame), data[0]);
  return 0;
}
