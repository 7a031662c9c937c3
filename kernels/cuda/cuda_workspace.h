// Residual stream, scratch and step inputs of one stage on the GPU, at addresses that stay.
#ifndef STAGECOACH_KERNELS_CUDA_CUDA_WORKSPACE_H_
#define STAGECOACH_KERNELS_CUDA_CUDA_WORKSPACE_H_

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/quant_matmul.h"
#include "kernels/cuda/rope.h"
#include "kernels/cuda/step_begin.h"
#include "kernels/cuda/token_draw.h"
#include "kernels/cuda/top_logits.h"
#include "model/model_file.h"

namespace stagecoach::cuda {

// Rows that go through the head at once: bounds the logits held on the device.
inline constexpr int kHeadRows = 64;
// Tokens of a step that are picked without the host.
inline constexpr int kMaxPicks = 256;
inline constexpr int kMaxWorkspaceRows = 65535;  // a dimension of a launch

// Memory of a MatmulScratch, for products on the compute stream.
absl::StatusOr<DeviceBuffer<std::byte>> NewMatmulScratch(const CudaDevice& device);

// The int32 inputs of a step, side by side in an array. The host's copies go out while the step
// before is being computed, to the device's own copy of the same slot; from there a step takes them
// when it begins. There is a slot for each step in flight: what waits for one to be free waits for
// a step that was awaited.
class StepInputs {
 public:
  // max_blocks: of all sequences of a step together; more are made room for when they come.
  // rows_per_tile: see RowsPerQueryTile.
  static absl::StatusOr<StepInputs> Create(const CudaDevice& device, int max_rows,
                                           int rows_per_tile, size_t max_blocks);

  int tiles() const { return tile_count_; }  // of the latest batch
  // What the device reads once the step has begun.
  const int32_t* tokens() const { return inputs_.data(); }
  const int32_t* head_rows() const { return head_rows_.data(); }
  RowTable table() const {
    const int32_t* rows = tokens() + max_rows_;
    return {.positions = rows,
            .first = rows + max_rows_,
            .tiles = rows + 2 * max_rows_,
            .blocks = rows + 3 * max_rows_};
  }

  // Before the batch of the same step, with which they go out.
  absl::Status SetTokens(std::span<const int32_t> token_ids);
  // The step begins in the compute stream, with the turns of its positions, ahead of all its other
  // kernels. *moved: the arrays had to grow and are elsewhere now.
  absl::Status SetBatch(const StepBatch& batch, const TurnsOfRows& turns, const TakenRows& taken,
                        bool* moved);
  // In place of SetBatch, in a step without layers.
  absl::Status SendTokens();
  absl::Status SetHeadRows(std::span<const int32_t> rows);

 private:
  struct Slot {
    PinnedBuffer<int32_t> host;   // tokens, positions, first, tiles, blocks
    DeviceBuffer<int32_t> there;  // the same
    Event sent;                   // it is there
    Event taken;                  // and not needed any more
  };
  struct HeadSlot {
    PinnedBuffer<int32_t> host;
    Event taken;
  };
  absl::Status MakeRoom(size_t blocks);
  Slot& Next() { return slots_[next_]; }
  // With the step's turns and taken rows, if it has any.
  absl::Status Send(size_t count, StepBegin begin);

  const CudaDevice* device_ = nullptr;
  int max_rows_ = 0;
  int rows_per_tile_ = 1;
  int tile_count_ = 0;
  std::array<Slot, kStepsInFlight> slots_;
  std::array<HeadSlot, kStepsInFlight> head_slots_;
  int next_ = 0, next_head_ = 0;
  DeviceBuffer<int32_t> inputs_;     // of the step that has begun, as in a slot
  DeviceBuffer<int32_t> head_rows_;  // likewise
};

// The end of a step as the host sees it: what it gives and, once `done` is over, what it gets. The
// device reads and writes the arrays where they are.
struct StepEnd {
  int rows = 0;           // of the step
  int count = 0;          // of them, rows with a pick
  bool all_rows = false;  // these are all
  bool all_greedy = false;
  PinnedBuffer<TokenDraw> draws;  // [kMaxPicks], likewise tokens
  PinnedBuffer<int32_t> tokens;
  PinnedBuffer<uint8_t> finite;  // [max_rows]
  Event done;
};

struct CudaWorkspace {
  // Errors: INVALID_ARGUMENT, RESOURCE_EXHAUSTED.
  static absl::StatusOr<std::unique_ptr<CudaWorkspace>> Create(const CudaDevice& device,
                                                               const ModelParams& params,
                                                               int max_rows);
  explicit CudaWorkspace(const ModelParams& model) : params(model) {}

  const ModelParams params;
  int max_rows = 0;
  StepInputs inputs;
  DeviceBuffer<double> frequencies;     // [rope_dims / 2]
  DeviceBuffer<float2> turns;           // [max_rows][rope_dims / 2] of this step's positions
  DeviceBuffer<float> residual;         // [max_rows][d_model]
  DeviceBuffer<float> q;                // [max_rows][heads][key_length]
  DeviceBuffer<float> k;                // [max_rows][kv_heads][key_length]
  DeviceBuffer<float> v;                // [max_rows][kv_heads][value_length]
  DeviceBuffer<float> attended;         // [max_rows][heads][value_length]
  DeviceBuffer<float> gate;             // [max_rows][ffn_length]; or what SwiGLU makes, in halves
  DeviceBuffer<float> up;               // [max_rows][ffn_length]
  DeviceBuffer<float> partials;         // of split attention
  DeviceBuffer<std::byte> scratch;      // MatmulScratch
  DeviceBuffer<std::byte> activations;  // what the next matrices read, in any form
  DeviceBuffer<float> head_input;       // [kHeadRows][d_model]
  DeviceBuffer<float> logits;           // [kHeadRows][vocab]
  DeviceBuffer<TopKey> top_scratch;     // for kMostTopLogits of kHeadRows rows
  DeviceBuffer<TopKey> top;             // [kHeadRows][kMostTopLogits]
  PinnedBuffer<TopKey> top_out;         // [kHeadRows][kMostTopLogits]
  DeviceBuffer<TokenDraw> draws;        // [kHeadRows]
  PinnedBuffer<TokenDraw> draws_in;     // [kHeadRows]
  DeviceBuffer<uint64_t> unit_sums;     // [kHeadRows][UnitSums]
  PinnedBuffer<uint64_t> unit_sums_out;
  DeviceBuffer<int32_t> drawn;               // [kMaxPicks], of the latest draws
  PinnedBuffer<int32_t> drawn_out;           // [kHeadRows]
  std::array<StepEnd, kStepsInFlight> ends;  // of the steps in flight, in turn:
  int first_end = 0, end_count = 0;
  DeviceBuffer<uint8_t> finite;                 // [max_rows]
  PinnedBuffer<uint8_t> finite_out;             // [max_rows]
  PinnedBuffer<float> residual_in;              // [max_rows][d_model]
  PinnedBuffer<float> out;                      // [max_rows][d_model] or [kHeadRows][vocab]
  Event residual_sent;                          // the device has taken residual_in
  PinnedBuffer<std::atomic<uint32_t>> spoiled;  // [1] ResidualMemory.spoiled

  StepEnd& NextEnd() { return ends[(first_end + end_count) % kStepsInFlight]; }
  TakenRows Taken() const {
    return {.spoiled = reinterpret_cast<const uint32_t*>(spoiled.data()),
            .rows = residual.data(),
            .columns = params.d_model};
  }
  TurnsOfRows Turns() const {
    return {
        .frequencies = frequencies.data(), .pairs = params.rope_dims / 2, .turns = turns.data()};
  }
  MatmulScratch MatmulMemory() const { return {scratch.data()}; }

  int rows = 0;        // of the step under way
  AttentionPlan plan;  // of the step under way
};

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_CUDA_WORKSPACE_H_
