// The stages of a model in this process, driven step by step: no scheduler, no link, no socket.
#ifndef STAGECOACH_TOOLS_LOCAL_STAGE_H_
#define STAGECOACH_TOOLS_LOCAL_STAGE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "model/model_file.h"
#include "worker/layer_store.h"
#include "worker/stage.h"

namespace stagecoach {

struct LocalStageOptions {
  int stages = 1;              // of equally many layers, each with its own layer store
  std::string device = "cpu";  // see OpenDevice
  int threads = 1;
  int max_context = 0;
  int max_step_tokens = 0;
  KvType kv_type = KvType::kF16;
  LayerStoreOptions store;
};

// OpenDevice for a flag: whatever is wrong with the device is INVALID_ARGUMENT.
absl::StatusOr<std::unique_ptr<Backend>> OpenDeviceFlag(const std::string& device, int threads);

// One sequence at a time. Not thread-safe.
class LocalStages {
 public:
  // Starts loading weights, if options.store says so. Errors: those of OpenDeviceFlag
  // and Stage::Create.
  static absl::StatusOr<std::unique_ptr<LocalStages>> Create(std::shared_ptr<const ModelFile> model,
                                                             const LocalStageOptions& options);

  // Begins a sequence with these tokens, or goes on with the current one; returns the greedily
  // chosen next token.
  absl::StatusOr<int32_t> Begin(std::span<const int32_t> token_ids);
  absl::StatusOr<int32_t> Continue(std::span<const int32_t> token_ids);

  LayerStore& store(int stage) { return *members_[stage].store; }
  Backend& backend() { return *backend_; }
  double compute_seconds() const;  // of all stages, waits for weights excluded

 private:
  struct Member {
    std::unique_ptr<LayerStore> store;
    std::unique_ptr<Stage> stage;
  };
  absl::StatusOr<int32_t> Step(std::span<const int32_t> token_ids, bool open);

  std::unique_ptr<Backend> backend_;
  std::vector<Member> members_;
  uint64_t sequence_ = 0;
  uint64_t steps_ = 0;
  size_t position_ = 0;
};

// Token ids that are spread over the vocabulary, beyond its first few special ones.
std::vector<int32_t> MakeTestPrompt(const ModelParams& params, int length);

}  // namespace stagecoach

#endif  // STAGECOACH_TOOLS_LOCAL_STAGE_H_
