#include "kernels/model_runner.h"

#include <cstddef>
#include <numeric>
#include <utility>

#include "fmt/format.h"
#include "model/status_macros.h"

namespace stagecoach {

absl::StatusOr<std::unique_ptr<UnitWeights>> LoadUnit(Backend& backend, const ModelFile& model,
                                                      const Unit& unit) {
  const std::unique_ptr<UnitBuilder> builder = backend.NewUnitBuilder(model.params(), unit);
  std::vector<std::byte> raw;
  for (const UnitTensor& part : model.UnitTensors(unit)) {
    STAGECOACH_RETURN_IF_ERROR(backend.CheckTensor(part.role, *part.tensor));
    raw.resize(part.tensor->bytes);
    STAGECOACH_RETURN_IF_ERROR(
        ReadFully(model.file(part.tensor->file_index), part.tensor->offset, raw));
    STAGECOACH_RETURN_IF_ERROR(builder->Add(part.role, *part.tensor, raw));
  }
  return builder->Finish();
}

absl::StatusOr<std::unique_ptr<ModelRunner>> ModelRunner::Open(Backend& backend,
                                                               const std::string& path,
                                                               int max_positions, int max_rows) {
  std::unique_ptr<ModelRunner> runner(new ModelRunner);
  runner->backend_ = &backend;
  runner->max_positions_ = max_positions;
  runner->max_rows_ = max_rows;
  STAGECOACH_ASSIGN_OR_RETURN(runner->model_, ModelFile::Open(path));
  const ModelParams& params = runner->model_->params();
  for (const Unit& unit : StageUnits(params, 0, params.layers)) {
    STAGECOACH_ASSIGN_OR_RETURN(std::unique_ptr<UnitWeights> weights,
                                LoadUnit(backend, *runner->model_, unit));
    switch (unit.kind) {
      case Unit::Kind::kEmbedding:
        runner->embedding_ = std::move(weights);
        break;
      case Unit::Kind::kLayer:
        runner->layers_.push_back(std::move(weights));
        break;
      case Unit::Kind::kHead:
        runner->head_ = std::move(weights);
        break;
    }
  }
  const int blocks = (max_positions + kKvBlockPositions - 1) / kKvBlockPositions;
  runner->blocks_.resize(blocks);
  std::iota(runner->blocks_.rbegin(), runner->blocks_.rend(), 0);
  STAGECOACH_ASSIGN_OR_RETURN(runner->kv_, backend.NewKvCache({.layers = params.layers,
                                                               .kv_heads = params.kv_heads,
                                                               .key_length = params.key_length,
                                                               .value_length = params.value_length,
                                                               .blocks = blocks}));
  STAGECOACH_ASSIGN_OR_RETURN(runner->workspace_, backend.NewWorkspace(params, max_rows));
  return runner;
}

absl::StatusOr<std::vector<float>> ModelRunner::Run(std::span<const int32_t> tokens) {
  const int rows = static_cast<int>(tokens.size());
  if (rows == 0 || rows > max_rows_ || rows > max_positions_ - position_) {
    return absl::InvalidArgumentError(
        fmt::format("{} tokens after position {} do not fit {} rows and {} positions", rows,
                    position_, max_rows_, max_positions_));
  }
  STAGECOACH_RETURN_IF_ERROR(backend_->Embed(*workspace_, *embedding_, tokens));
  const BatchSequence sequence = {
      .first_row = 0, .row_count = rows, .start_position = position_, .blocks = blocks_};
  const StepBatch batch = {.sequences = {&sequence, 1}, .rows = rows};
  for (size_t i = 0; i < layers_.size(); ++i) {
    STAGECOACH_RETURN_IF_ERROR(
        backend_->RunLayer(*workspace_, *layers_[i], *kv_, static_cast<int>(i), batch));
  }
  std::vector<int32_t> all_rows(rows);
  std::iota(all_rows.begin(), all_rows.end(), 0);
  std::vector<float> logits(tokens.size() * params().vocab_size);
  STAGECOACH_RETURN_IF_ERROR(backend_->Head(*workspace_, *head_, all_rows, logits));
  position_ += rows;
  return logits;
}

}  // namespace stagecoach
