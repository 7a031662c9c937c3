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
  uint32_t block_seed = 0;  // not 0: KV blocks are handed out in a random order
  LayerStoreOptions store;
};

using TokenList = std::vector<int32_t>;

struct ChainRows {
  int slot = 0;
  TokenList tokens;  // that follow those of the slot's sequence
};

class StageChain {
 public:
  static absl::StatusOr<std::unique_ptr<StageChain>> Create(const std::string& model_path,
                                                            const StageChainOptions& options);

  // Sequences open, fork and close in front of the rows of the next step. A closed sequence's
  // blocks are the first to be handed out again. At most max_slots are open at once.
  int Open();  // returns the slot
  // A new sequence that begins with the first `positions` tokens of another and shares their KV;
  // a block that is not full is copied.
  int Fork(int slot, int positions);
  void Close(int slot);
  // One step. Returns the logits [tokens][vocab] of each entry.
  absl::StatusOr<std::vector<std::vector<float>>> Step(const std::vector<ChainRows>& rows);

  // Logits [tokens][vocab] of every sequence. All sequences run together: each step takes up to
  // `chunk` tokens of each. At most max_slots sequences. Closes those that are open before, and
  // leaves these open, in slots 0, 1 ...
  absl::StatusOr<std::vector<std::vector<float>>> Logits(const std::vector<TokenList>& sequences,
                                                         int chunk);

  const LayerStore& store(int stage) const { return *stores_[stage]; }
  const ModelFile& model() const { return *model_; }

 private:
  struct Sequence {
    bool open = false;
    uint64_t id = 0;
    TokenList tokens;
    std::vector<uint32_t> blocks;
  };

  StageChain() = default;
  absl::StatusOr<Frame> Run(Frame frame);
  int OpenSlot();  // not told to the stages
  uint32_t TakeBlock();
  void AddRows(const ChainRows& rows, v1::StepHeader& step);

  std::shared_ptr<const ModelFile> model_;
  std::unique_ptr<Backend> backend_;
  std::vector<std::unique_ptr<LayerStore>> stores_;
  std::vector<std::unique_ptr<Stage>> stages_;
  uint64_t steps_ = 0;
  uint64_t sequences_ = 0;
  std::vector<Sequence> slots_;
  std::vector<uint32_t> free_blocks_;  // handed out from the back
  std::vector<int> block_users_;
  v1::StepHeader pending_;  // what comes in front of the next step's rows
};

std::string ReadTestFile(const std::string& path);
// float32 little-endian file.
std::vector<float> ReadFloats(const std::string& path);

}  // namespace stagecoach

#endif  // STAGECOACH_TESTS_STAGE_CHAIN_H_
