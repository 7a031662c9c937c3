// Splits the layers of a model over workers. Pure and deterministic.
#ifndef STAGECOACH_COORDINATOR_PLANNER_H_
#define STAGECOACH_COORDINATOR_PLANNER_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "model/model_file.h"

namespace stagecoach {

// What the planner knows of a worker. Order of the list = order of the stages.
struct WorkerCapacity {
  std::string worker;
  uint64_t memory_bytes = 0;         // for weights, KV and workspace
  double read_bytes_per_second = 0;  // 0 = unknown: taken as equal to the others
  // At most this much of the stage's weights is resident, the rest streams: bytes, and percent of
  // them. 0 = no limit.
  uint64_t weight_budget_bytes = 0;
  double weight_budget_percent = 0;
  double load_bytes_per_second = 0;  // of weights that stream; 0 = kDefaultLoadBytesPerSecond
  bool gpu = false;
};

// What a layer takes on a GPU beyond the time in which it reads its weights: its kernels wait for
// each other. From steps of one row on an H200 (docs/tuning.md).
inline constexpr double kGpuLayerSeconds = 15e-6;

// A plain solid-state disk.
inline constexpr double kDefaultLoadBytesPerSecond = 1e9;

// The pool of KV blocks that all sequences share: exactly `blocks`, or as much as fits the given
// memory of every worker; if neither is asked for, see DefaultKvBlocks.
struct KvOptions {
  KvType type = KvType::kF16;
  int blocks = 0;
  uint64_t memory_bytes = 0;  // on each worker
  double memory_percent = 0;  // of each worker's memory; only if memory_bytes is 0
};

// Rows of a step unless asked for: a GPU needs many to work at its rate on prompts, a CPU does with
// fewer and would keep those who decode waiting.
inline constexpr int kCpuStepTokens = 256;
inline constexpr int kGpuStepTokens = 512;

struct PlanLimits {
  int max_slots = 0;
  int max_context = 0;      // positions per slot
  int max_step_tokens = 0;  // 0 = kGpuStepTokens if all workers are GPUs, or else kCpuStepTokens
  KvOptions kv = {};
};

// Blocks of the longest sequence: no pool may be smaller.
int KvBlocksPerSequence(const PlanLimits& limits);
// Enough for all slots, but at most for this many sequences of full length: most are shorter, and a
// pool that runs out costs a replay, not an error.
inline constexpr int kDefaultFullSequences = 16;
int DefaultKvBlocks(const PlanLimits& limits);

struct PlanStage {
  std::string worker;
  int first_layer = 0;  // [first_layer, last_layer)
  int last_layer = 0;
  uint64_t weight_bytes = 0;  // embedding and head counted where they are used
  uint64_t kv_bytes = 0;
  uint64_t streamed_bytes = 0;   // of the weights, loaded anew for every step; 0 = all are resident
  double seconds_per_token = 0;  // predicted, decode of one row: resident weights at the worker's
                                 // bandwidth, streamed ones at its load rate, and kGpuLayerSeconds
};

struct Plan {
  std::vector<PlanStage> stages;
  int kv_blocks = 0;        // in every layer of every stage
  int max_step_tokens = 0;  // rows of a step
};

// Contiguous, non-empty ranges that minimise the slowest stage's seconds_per_token within every
// worker's memory. A worker whose weight budget its stage exceeds keeps room for two layers through
// which the others stream; its weights count in memory as the budget. The KV pool asked for is
// kept; one by memory is the smallest over the stages; the default one shrinks as far as memory
// demands. Errors: INVALID_ARGUMENT (no workers, more workers than layers, a pool of less than one
// sequence), RESOURCE_EXHAUSTED naming the bytes needed and available per worker and what would
// help.
absl::StatusOr<Plan> MakePlan(const ModelFile& model, const std::vector<WorkerCapacity>& workers,
                              const PlanLimits& limits);

// All that the planner needs to know of a model, in bytes.
struct ModelSizes {
  std::vector<uint64_t> layers;  // weights of each layer
  uint64_t embedding = 0;        // held by the first stage; a decode step reads one row of it
  uint64_t embedding_row = 0;    //
  uint64_t head = 0;             // held and read by the last stage
  uint64_t kv_position = 0;      // keys and values of one position in one layer
  uint64_t workspace_row = 0;    // estimate: activations of one row of a step
  uint64_t logits_row = 0;       // last stage
  uint64_t load_buffers = 0;     // held while a layer is loaded: its two largest tensors
};
ModelSizes MeasureModel(const ModelFile& model, KvType kv_type = KvType::kF16);

// MakePlan above = MakePlan(MeasureModel(model, limits.kv.type), ...). Among the plans with the
// fastest slowest stage the one with the most equal layer counts wins, then the one with more
// layers in front.
absl::StatusOr<Plan> MakePlan(const ModelSizes& sizes, const std::vector<WorkerCapacity>& workers,
                              const PlanLimits& limits);

// Memory that a stage of [first, last) needs: weights, KV and workspace. Saturates.
uint64_t StageBytes(const ModelSizes& sizes, const PlanLimits& limits, int kv_blocks, int first,
                    int last);

// A table for people: one line per stage, and the KV pool.
std::string FormatPlan(const ModelFile& model, const Plan& plan);

}  // namespace stagecoach

#endif  // STAGECOACH_COORDINATOR_PLANNER_H_
