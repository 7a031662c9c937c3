// Runs a whole model on one backend in one place: no stages, no scheduler, no concurrency. The
// shortest way from tokens to logits, for tests and measurements of backends.
#ifndef STAGECOACH_KERNELS_MODEL_RUNNER_H_
#define STAGECOACH_KERNELS_MODEL_RUNNER_H_

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace stagecoach {

// Reads the tensors of `unit` and builds its weights. Errors: those of reading and of UnitBuilder.
absl::StatusOr<std::unique_ptr<UnitWeights>> LoadUnit(Backend& backend, const ModelFile& model,
                                                      const Unit& unit);

// One sequence at a time. Not thread-safe. `backend` must outlive the runner.
class ModelRunner {
 public:
  // max_positions: the longest sequence; max_rows: the longest chunk.
  static absl::StatusOr<std::unique_ptr<ModelRunner>> Open(Backend& backend,
                                                           const std::string& path,
                                                           int max_positions, int max_rows);

  const ModelParams& params() const { return model_->params(); }

  // Forgets the sequence.
  void Reset() { position_ = 0; }
  // Extends the sequence by at most max_rows tokens in one step.
  // Returns their logits, [tokens.size()][vocab].
  absl::StatusOr<std::vector<float>> Run(std::span<const int32_t> tokens);

 private:
  ModelRunner() = default;

  Backend* backend_ = nullptr;
  std::shared_ptr<const ModelFile> model_;
  std::unique_ptr<UnitWeights> embedding_, head_;
  std::vector<std::unique_ptr<UnitWeights>> layers_;
  std::unique_ptr<KvCache> kv_;
  std::unique_ptr<Workspace> workspace_;
  std::vector<int32_t> blocks_;  // in descending order, so that position and place differ
  int max_positions_ = 0;
  int max_rows_ = 0;
  int position_ = 0;  // tokens already in the KV
};

}  // namespace stagecoach

#endif  // STAGECOACH_KERNELS_MODEL_RUNNER_H_
