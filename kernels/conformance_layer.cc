#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "fmt/format.h"
#include "kernels/conformance_case.h"
#include "kernels/random_tensor.h"
#include "model/block_decode.h"
#include "model/model_error.h"
#include "model/status_macros.h"

namespace stagecoach {
namespace {

struct ModelVariant {
  std::string name;
  ModelParams params;
  bool biases = false;
};

ModelVariant PlainModel() {
  ModelParams params;
  params.architecture = "llama";
  params.layers = 2;
  params.d_model = 256;
  params.heads = 4;
  params.kv_heads = 2;
  params.key_length = params.value_length = params.rope_dims = 64;
  params.ffn_length = 512;
  params.vocab_size = 325;  // fills no tile
  params.context_length = 128;
  params.norm_epsilon = 1e-5f;
  return {"plain", params, false};
}

// Everything optional that the architecture knows.
ModelVariant RichModel() {
  ModelVariant model = PlainModel();
  model.name = "biases, frequency factors, unequal heads";
  model.biases = true;
  model.params.heads = 8;
  model.params.kv_heads = 2;
  model.params.key_length = 96;
  model.params.value_length = 64;
  model.params.rope_dims = 32;
  model.params.ffn_length = 768;
  model.params.rope_freq_base = 500000;
  model.params.rope_freq_scale = 0.5f;
  for (int i = 0; i < 16; ++i) model.params.rope_freq_factors.push_back(1 + 0.3f * i);
  return model;
}

// A whole model of one tensor type on one backend, and a few sequences in it.
class TinyModel {
 public:
  static constexpr int kSequences = 4;
  static constexpr int kMaxRows = 128;
  static constexpr int kBlocks = 4;  // per sequence

  TinyModel(Backend& backend, const ModelVariant& variant)
      : backend_(backend), params_(variant.params), biases_(variant.biases) {}

  absl::Status Open(TensorType type, KvType kv_type, bool in_parts) {
    RandomSource random(4711);
    const auto build = [&](Unit unit) {
      return BuildUnit(backend_, params_, MakeRandomUnit(random, params_, unit, type, biases_),
                       in_parts);
    };
    STAGECOACH_ASSIGN_OR_RETURN(embedding_, build({Unit::Kind::kEmbedding}));
    for (int i = 0; i < params_.layers; ++i) {
      STAGECOACH_ASSIGN_OR_RETURN(layers_.emplace_back(), build({Unit::Kind::kLayer, i}));
    }
    STAGECOACH_ASSIGN_OR_RETURN(head_, build({Unit::Kind::kHead}));
    STAGECOACH_ASSIGN_OR_RETURN(kv_, backend_.NewKvCache({.layers = params_.layers,
                                                          .kv_heads = params_.kv_heads,
                                                          .key_length = params_.key_length,
                                                          .value_length = params_.value_length,
                                                          .blocks = kSequences * kBlocks,
                                                          .type = kv_type}));
    STAGECOACH_ASSIGN_OR_RETURN(first_, backend_.NewWorkspace(params_, kMaxRows));
    STAGECOACH_ASSIGN_OR_RETURN(second_, backend_.NewWorkspace(params_, kMaxRows));
    for (int i = 0; i < kSequences; ++i) {
      for (int b = 0; b < kBlocks; ++b) blocks_[i].push_back((kBlocks - 1 - b) * kSequences + i);
    }
    return absl::OkStatus();
  }

  // Extends sequence i by counts[i] tokens, all in one step, and appends the logits of each new row
  // to logits[i]. `split`: the second layer and the head run in another workspace.
  absl::Status Step(std::span<const int> counts, bool split,
                    std::vector<std::vector<float>>& logits) {
    std::vector<BatchSequence> sequences;
    std::vector<int32_t> tokens;
    for (size_t i = 0; i < counts.size(); ++i) {
      if (counts[i] == 0) continue;
      sequences.push_back({.first_row = static_cast<int>(tokens.size()),
                           .row_count = counts[i],
                           .start_position = positions_[i],
                           .blocks = blocks_[i]});
      for (int r = 0; r < counts[i]; ++r) tokens.push_back(Token(i, positions_[i] + r));
    }
    const int rows = static_cast<int>(tokens.size());
    const StepBatch batch = {.sequences = sequences, .rows = rows};
    STAGECOACH_RETURN_IF_ERROR(backend_.Embed(*first_, *embedding_, tokens));
    STAGECOACH_RETURN_IF_ERROR(backend_.RunLayer(*first_, *layers_[0], *kv_, 0, batch));
    Workspace* last = first_.get();
    if (split) {
      std::vector<float> residual(static_cast<size_t>(rows) * params_.d_model);
      STAGECOACH_RETURN_IF_ERROR(backend_.GetResidual(*first_, residual));
      STAGECOACH_RETURN_IF_ERROR(backend_.SetResidual(*second_, residual));
      last = second_.get();
    }
    STAGECOACH_RETURN_IF_ERROR(backend_.RunLayer(*last, *layers_[1], *kv_, 1, batch));
    return AppendLogits(*last, counts, rows, logits);
  }

 private:
  int32_t Token(size_t sequence, int position) const {
    return static_cast<int32_t>((sequence * 101 + position * 37 + 5) % params_.vocab_size);
  }

  absl::Status AppendLogits(Workspace& workspace, std::span<const int> counts, int rows,
                            std::vector<std::vector<float>>& logits) {
    std::vector<int32_t> wanted(rows);
    std::iota(wanted.rbegin(), wanted.rend(), 0);  // last row first: rows are named, not counted
    std::vector<float> out(static_cast<size_t>(rows) * params_.vocab_size,
                           std::numeric_limits<float>::quiet_NaN());
    STAGECOACH_RETURN_IF_ERROR(backend_.Head(workspace, *head_, wanted, out));
    int row = 0;
    for (size_t i = 0; i < counts.size(); ++i) {
      for (int r = 0; r < counts[i]; ++r, ++row) {
        const auto begin = out.begin() + ptrdiff_t{rows - 1 - row} * params_.vocab_size;
        logits[i].insert(logits[i].end(), begin, begin + params_.vocab_size);
      }
      positions_[i] += counts[i];
    }
    return absl::OkStatus();
  }

  Backend& backend_;
  const ModelParams params_;
  const bool biases_;
  std::unique_ptr<UnitWeights> embedding_, head_;
  std::vector<std::unique_ptr<UnitWeights>> layers_;
  std::unique_ptr<KvCache> kv_;
  std::unique_ptr<Workspace> first_, second_;
  std::vector<int32_t> blocks_[kSequences];
  int positions_[kSequences] = {};
};

// A schedule: how many tokens each sequence gets in each step. All schedules below feed the same
// tokens: 44, 9, 1 and 35 of them.
using Schedule = std::vector<std::vector<int>>;

Schedule Together() { return {{40, 5, 0, 33}, {1, 1, 1, 1}, {1, 1, 0, 1}, {2, 2, 0, 0}}; }
Schedule Alone() { return {{44}, {0, 9}, {0, 0, 1}, {0, 0, 0, 35}}; }
Schedule Chunks() {
  Schedule schedule = {{7, 1, 1, 1}, {1, 7, 0, 0}, {31, 1, 0, 31}, {5, 0, 0, 0}};
  for (int i = 0; i < 3; ++i) schedule.push_back({0, 0, 0, 1});
  return schedule;
}

ConformanceRun RunSchedule(ModelVariant variant, TensorType type, KvType kv_type, Schedule schedule,
                           bool split, bool in_parts) {
  return [=](Backend& backend) -> absl::StatusOr<std::vector<float>> {
    TinyModel model(backend, variant);
    STAGECOACH_RETURN_IF_ERROR(model.Open(type, kv_type, in_parts));
    std::vector<std::vector<float>> logits(TinyModel::kSequences);
    for (const std::vector<int>& counts : schedule) {
      STAGECOACH_RETURN_IF_ERROR(model.Step(counts, split, logits));
    }
    std::vector<float> all;
    for (const std::vector<float>& rows : logits) all.insert(all.end(), rows.begin(), rows.end());
    return all;
  };
}

// Makes a scale of the last block infinite (in float types: the element NaN).
template <typename Block>
void BreakLastBlock(std::vector<std::byte>& raw) {
  Block block;
  std::byte* last = raw.data() + raw.size() - sizeof(Block);
  memcpy(&block, last, sizeof(Block));
  if constexpr (std::is_same_v<Block, BlockF32>) {
    block.element = std::numeric_limits<float>::quiet_NaN();
  } else if constexpr (Block::kElements == 1) {
    block.bits = 0xffff;  // NaN in both 16-bit formats
  } else if constexpr (requires { block.dmin; }) {
    block.dmin = 0x7c00;
  } else if constexpr (requires { block.m; }) {
    block.m = 0x7c00;
  } else {
    block.d = 0x7c00;
  }
  memcpy(last, &block, sizeof(Block));
}

// Gives {1} if the backend refuses a head whose matrix has one bad scale, as it must.
ConformanceRun RefusesBadScale(TensorType type) {
  return [=](Backend& backend) -> absl::StatusOr<std::vector<float>> {
    const ModelParams params = PlainModel().params;
    RandomSource random(1);
    RandomUnit head = MakeRandomUnit(random, params, {Unit::Kind::kHead}, type, false);
    STAGECOACH_RETURN_IF_ERROR(BuildUnit(backend, params, head).status());
    VisitBlockType(type, [&]<typename Block>() { BreakLastBlock<Block>(head.tensors.back().raw); });
    const absl::Status status = BuildUnit(backend, params, head).status();
    if (GetModelError(status) != ModelError::kCorrupt) {
      return absl::InternalError("a non-finite scale was not refused as corrupt: " +
                                 status.ToString());
    }
    return std::vector<float>{1};
  };
}

}  // namespace

std::vector<ConformanceCase> LayerCases() {
  std::vector<ConformanceCase> cases;
  for (const TensorTypeInfo& info : AllTensorTypes()) {
    const TensorType type = info.type;
    for (const ModelVariant& model : {PlainModel(), RichModel()}) {
      const std::string prefix = fmt::format("Model/{}/{}/", model.name, info.name);
      const auto run = [&](const Schedule& schedule, KvType kv_type, bool split,
                           bool in_parts = false) {
        return RunSchedule(model, type, kv_type, schedule, split, in_parts);
      };
      // Four matrix products deep and more: the errors of one product add up.
      cases.push_back({.name = prefix + "logits",
                       .run = run(Together(), KvType::kF32, false),
                       .tolerance = 2.5 * MatMulTolerance(type)});
      const ConformanceRun together = run(Together(), KvType::kF16, false);
      const auto same = [&](const char* name, const Schedule& schedule, bool split) {
        cases.push_back({.name = prefix + name,
                         .run = run(schedule, KvType::kF16, split),
                         .same_bits_as = together});
      };
      same("sequences alone", Alone(), false);
      same("other chunks", Chunks(), false);
      same("two stages", Together(), true);
      cases.push_back({.name = prefix + "built in parts",
                       .run = run(Together(), KvType::kF16, false, /*in_parts=*/true),
                       .same_bits_as = together});
    }
    cases.push_back({.name = fmt::format("UnitBuilder/{}/refuses a bad scale", info.name),
                     .run = RefusesBadScale(type),
                     .tolerance = 0});
  }
  return cases;
}

}  // namespace stagecoach
