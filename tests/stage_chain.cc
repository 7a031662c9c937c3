#include "tests/stage_chain.h"

#include <algorithm>
#include <cassert>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <utility>

#include "kernels/device.h"
#include "worker/kv_slots.h"

namespace stagecoach {

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
  const int kv_blocks = options.max_slots * KvBlocksFor(options.max_context);
  chain->slots_.resize(options.max_slots);
  chain->block_users_.resize(kv_blocks);
  for (int i = kv_blocks; i > 0; --i) chain->free_blocks_.push_back(i - 1);
  if (options.block_seed != 0) {
    std::mt19937 random(options.block_seed);
    std::shuffle(chain->free_blocks_.begin(), chain->free_blocks_.end(), random);
  }
  for (int i = 0; i < options.stages; ++i) {
    StageConfig config;
    config.epoch = 1;
    config.stage = i;
    config.stages = options.stages;
    config.first_layer = layers * i / options.stages;
    config.last_layer = layers * (i + 1) / options.stages;
    config.max_slots = options.max_slots;
    config.max_context = options.max_context;
    config.kv_blocks = kv_blocks;
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

int StageChain::OpenSlot() {
  const auto slot =
      std::find_if(slots_.begin(), slots_.end(), [](const Sequence& s) { return !s.open; });
  assert(slot != slots_.end());
  *slot = {.open = true, .id = ++sequences_};
  return static_cast<int>(slot - slots_.begin());
}

int StageChain::Open() {
  const int slot = OpenSlot();
  v1::SequenceOpen& open = *pending_.add_open();
  open.set_slot(static_cast<uint32_t>(slot));
  open.set_sequence_id(slots_[slot].id);
  return slot;
}

uint32_t StageChain::TakeBlock() {
  assert(!free_blocks_.empty());
  const uint32_t block = free_blocks_.back();
  free_blocks_.pop_back();
  ++block_users_[block];
  return block;
}

int StageChain::Fork(int slot, int positions) {
  const Sequence parent = slots_[slot];
  const int child = Open();
  Sequence& sequence = slots_[child];
  sequence.tokens.assign(parent.tokens.begin(), parent.tokens.begin() + positions);
  for (int i = 0; i < KvBlocksFor(positions); ++i) {
    const bool full = (i + 1) * kKvBlockPositions <= positions;
    if (full) {
      sequence.blocks.push_back(parent.blocks[i]);
      ++block_users_[parent.blocks[i]];
      continue;
    }
    sequence.blocks.push_back(TakeBlock());
    v1::BlockCopy& copy = *pending_.add_copies();
    copy.set_from(parent.blocks[i]);
    copy.set_to(sequence.blocks.back());
  }
  v1::SequenceOpen& open = *pending_.mutable_open(pending_.open_size() - 1);
  open.mutable_cached_token_ids()->Add(sequence.tokens.begin(), sequence.tokens.end());
  open.mutable_cached_blocks()->Add(sequence.blocks.begin(), sequence.blocks.end());
  return child;
}

void StageChain::Close(int slot) {
  pending_.add_close(static_cast<uint32_t>(slot));
  for (const uint32_t block : slots_[slot].blocks) {
    if (--block_users_[block] == 0) free_blocks_.push_back(block);
  }
  slots_[slot] = {};
}

void StageChain::AddRows(const ChainRows& added, v1::StepHeader& step) {
  Sequence& sequence = slots_[added.slot];
  v1::SequenceRows& rows = *step.add_rows();
  rows.set_slot(static_cast<uint32_t>(added.slot));
  rows.set_sequence_id(sequence.id);
  rows.set_start_position(static_cast<uint32_t>(sequence.tokens.size()));
  rows.set_row_count(static_cast<uint32_t>(added.tokens.size()));
  rows.set_logits(true);
  step.mutable_token_ids()->Add(added.tokens.begin(), added.tokens.end());
  sequence.tokens.insert(sequence.tokens.end(), added.tokens.begin(), added.tokens.end());
  const size_t needed = KvBlocksFor(static_cast<int>(sequence.tokens.size()));
  while (sequence.blocks.size() < needed) {
    sequence.blocks.push_back(TakeBlock());
    rows.add_new_blocks(sequence.blocks.back());
  }
}

absl::StatusOr<std::vector<std::vector<float>>> StageChain::Step(
    const std::vector<ChainRows>& rows) {
  Frame frame;
  frame.header.set_epoch(1);
  v1::StepHeader& step = *frame.header.mutable_step();
  step.Swap(&pending_);
  step.set_step(++steps_);
  for (const ChainRows& entry : rows) AddRows(entry, step);
  auto result = Run(std::move(frame));
  if (!result.ok()) return result.status();
  const size_t vocab = static_cast<size_t>(model_->params().vocab_size);
  auto values = result->payload.values().begin();
  std::vector<std::vector<float>> logits;
  for (const v1::SequenceResult& r : result->header.result().sequences()) {
    if (r.status_code() != 0) return absl::InternalError(r.status_message());
    const auto end = values + static_cast<std::ptrdiff_t>(r.logits_rows() * vocab);
    logits.emplace_back(values, end);
    values = end;
  }
  return logits;
}

absl::StatusOr<std::vector<std::vector<float>>> StageChain::Logits(
    const std::vector<TokenList>& sequences, int chunk) {
  for (size_t slot = 0; slot < slots_.size(); ++slot) {
    if (slots_[slot].open) Close(static_cast<int>(slot));
  }
  std::vector<int> slots;
  for (size_t s = 0; s < sequences.size(); ++s) slots.push_back(Open());
  std::vector<std::vector<float>> logits(sequences.size());
  for (size_t done = 0;; done += chunk) {
    std::vector<ChainRows> rows;
    std::vector<size_t> of;  // the sequence of each entry of rows
    for (size_t s = 0; s < sequences.size(); ++s) {
      const TokenList& tokens = sequences[s];
      if (done >= tokens.size()) continue;
      const size_t end = std::min(tokens.size(), done + chunk);
      rows.push_back({slots[s], TokenList(tokens.begin() + done, tokens.begin() + end)});
      of.push_back(s);
    }
    if (rows.empty()) return logits;
    auto step = Step(rows);
    if (!step.ok()) return step.status();
    for (size_t i = 0; i < of.size(); ++i) {
      logits[of[i]].insert(logits[of[i]].end(), (*step)[i].begin(), (*step)[i].end());
    }
  }
}

}  // namespace stagecoach
