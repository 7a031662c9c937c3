#include "tests/stage_chain.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <utility>

#include "kernels/device.h"

namespace stagecoach {

std::string TestDataPath(const std::string& name) {
  const char* const moved = std::getenv("STAGECOACH_SOURCE_DIR");
  return std::string(moved != nullptr ? moved : STAGECOACH_SOURCE_DIR) + "/tests/data/" + name;
}

std::string TestDevice() {
  const char* const device = std::getenv("STAGECOACH_TEST_DEVICE");
  return device != nullptr ? device : "cpu";
}

std::string ReadTestFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(in), {});
}

std::vector<float> ReadFloats(const std::string& path) {
  const std::string bytes = ReadTestFile(path);
  std::vector<float> values(bytes.size() / sizeof(float));
  std::memcpy(values.data(), bytes.data(), values.size() * sizeof(float));
  return values;
}

absl::StatusOr<std::unique_ptr<StageChain>> StageChain::Create(const std::string& model_path,
                                                               const StageChainOptions& options) {
  std::unique_ptr<StageChain> chain(new StageChain());
  auto model = ModelFile::Open(model_path);
  if (!model.ok()) return model.status();
  chain->model_ = *model;
  auto backend = OpenDevice(options.device, {.threads = options.threads, .isa = options.isa});
  if (!backend.ok()) return backend.status();
  chain->backend_ = *std::move(backend);
  const int layers = chain->model_->params().layers;
  for (int i = 0; i < options.stages; ++i) {
    StageConfig config;
    config.epoch = 1;
    config.stage = i;
    config.stages = options.stages;
    config.first_layer = layers * i / options.stages;
    config.last_layer = layers * (i + 1) / options.stages;
    config.max_slots = options.max_slots;
    config.max_context = options.max_context;
    config.max_step_tokens = options.max_step_tokens;
    config.kv_type = options.kv_type;
    auto store = std::make_unique<LayerStore>(chain->backend_.get(), chain->model_, options.store);
    store->Assign(StageUnits(chain->model_->params(), config.first_layer, config.last_layer));
    auto stage = Stage::Create(chain->backend_.get(), chain->model_, store.get(), config);
    if (!stage.ok()) return stage.status();
    chain->stores_.push_back(std::move(store));
    chain->stages_.push_back(std::move(*stage));
  }
  return chain;
}

absl::StatusOr<Frame> StageChain::Run(Frame frame) {
  for (const auto& stage : stages_) {
    auto next = stage->Run(frame);
    if (!next.ok()) return next.status();
    frame = std::move(*next);
  }
  return frame;
}

absl::StatusOr<std::vector<std::vector<float>>> StageChain::Logits(
    const std::vector<TokenList>& sequences, int chunk) {
  std::vector<std::vector<float>> logits(sequences.size());
  std::vector<size_t> done(sequences.size(), 0);
  const uint64_t first_id = sequences_ + 1;
  sequences_ += sequences.size();
  const size_t vocab = static_cast<size_t>(model_->params().vocab_size);
  for (bool first = true;; first = false) {
    Frame frame;
    frame.header.set_epoch(1);
    v1::StepHeader& step = *frame.header.mutable_step();
    if (first) {
      for (const uint32_t slot : open_slots_) step.add_close(slot);
      open_slots_.clear();
    }
    for (size_t s = 0; s < sequences.size(); ++s) {
      const TokenList& tokens = sequences[s];
      if (first) {
        v1::SequenceOpen& open = *step.add_open();
        open.set_slot(static_cast<uint32_t>(s));
        open.set_sequence_id(first_id + s);
        open.set_prompt_tokens(static_cast<uint32_t>(tokens.size()));
        open_slots_.push_back(static_cast<uint32_t>(s));
      }
      const size_t count = std::min(tokens.size() - done[s], static_cast<size_t>(chunk));
      if (count == 0) continue;
      v1::SequenceRows& rows = *step.add_rows();
      rows.set_slot(static_cast<uint32_t>(s));
      rows.set_sequence_id(first_id + s);
      rows.set_start_position(static_cast<uint32_t>(done[s]));
      rows.set_row_count(static_cast<uint32_t>(count));
      rows.set_logits(true);
      for (size_t i = 0; i < count; ++i) step.add_token_ids(tokens[done[s] + i]);
      done[s] += count;
    }
    if (step.rows().empty()) return logits;
    step.set_step(++steps_);
    auto result = Run(std::move(frame));
    if (!result.ok()) return result.status();
    const std::span<const float> values = result->payload.values();
    size_t at = 0;
    for (const v1::SequenceResult& r : result->header.result().sequences()) {
      if (r.status_code() != 0) return absl::InternalError(r.status_message());
      const size_t count = r.logits_rows() * vocab;
      std::vector<float>& out = logits[r.sequence_id() - first_id];
      out.insert(out.end(), values.begin() + static_cast<std::ptrdiff_t>(at),
                 values.begin() + static_cast<std::ptrdiff_t>(at + count));
      at += count;
    }
  }
}

}  // namespace stagecoach
