// A chain of stages called one after the other in this process: what a pipeline computes, without
// scheduler, links or threads of its own. For suites that compare logits.
#ifndef STAGECOACH_TESTS_STAGE_CHAIN_H_
#define STAGECOACH_TESTS_STAGE_CHAIN_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "model/model_file.h"
#include "worker/layer_store.h"
#include "worker/stage.h"

namespace stagecoach {

// The device that suites run on: STAGECOACH_TEST_DEVICE in the environment, else the CPU.
std::string TestDevice();

struct StageChainOptions {
  int stages = 1;
  std::string device = TestDevice();
  int threads = 1;
  std::string isa = "auto";
  int max_slots = 8;
  int max_context = 512;
  int max_step_tokens = 512;
  KvType kv_type = KvType::kF16;
  LayerStoreOptions store;
};

using TokenList = std::vector<int32_t>;

class StageChain {
 public:
  static absl::StatusOr<std::unique_ptr<StageChain>> Create(const std::string& model_path,
                                                            const StageChainOptions& options);

  // Logits [tokens][vocab] of every sequence. All sequences run together: each step takes up to
  // `chunk` tokens of each. At most max_slots sequences.
  absl::StatusOr<std::vector<std::vector<float>>> Logits(const std::vector<TokenList>& sequences,
                                                         int chunk);

  const LayerStore& store(int stage) const { return *stores_[stage]; }
  const ModelFile& model() const { return *model_; }

 private:
  StageChain() = default;
  absl::StatusOr<Frame> Run(Frame frame);

  std::shared_ptr<const ModelFile> model_;
  std::unique_ptr<Backend> backend_;
  std::vector<std::unique_ptr<LayerStore>> stores_;
  std::vector<std::unique_ptr<Stage>> stages_;
  uint64_t steps_ = 0;
  uint64_t sequences_ = 0;
  std::vector<uint32_t> open_slots_;
};

// tests/data/<name>; STAGECOACH_SOURCE_DIR in the environment says where tests/ is if it has moved
// since the build.
std::string TestDataPath(const std::string& name);
std::string ReadTestFile(const std::string& path);
// float32 little-endian file.
std::vector<float> ReadFloats(const std::string& path);

}  // namespace stagecoach

#endif  // STAGECOACH_TESTS_STAGE_CHAIN_H_
