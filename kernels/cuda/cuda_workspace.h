// Residual stream, scratch and step inputs of one stage on the GPU, at addresses that stay.
#ifndef STAGECOACH_KERNELS_CUDA_CUDA_WORKSPACE_H_
#define STAGECOACH_KERNELS_CUDA_CUDA_WORKSPACE_H_

#include <array>
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

// The int32 inputs of a step, side by side in an array on the host and in one on the device. There
// is an array on the host for each step in flight: what waits for one to be free waits for a step
// that was awaited.
class StepInputs {
 public:
  // max_blocks: of all sequences of a step together; more are made room for when they come.
  // rows_per_tile: see RowsPerQueryTile.
  static absl::StatusOr<StepInputs> Create(const CudaDevice& device, int max_rows,
                                           int rows_per_tile, size_t max_blocks);

  int tiles() const { return tile_count_; }  // of the latest batch
  // What the device will read, once the uploads below have been ordered before it.
  const int32_t* tokens() const { return device_array_.data() + batch_.first; }
  const int32_t* head_rows() const { return device_array_.data() + head_rows_.first; }
  RowTable table() const {
    const int32_t* rows = tokens() + max_rows_;
    return {.positions = rows,
            .first = rows + max_rows_,
            .tiles = rows + 2 * max_rows_,
            .blocks = rows + 3 * max_rows_};
  }

  // Before the batch of the same step, with which they go out.
  absl::Status SetTokens(std::span<const int32_t> token_ids);
  // Goes out on the compute stream, with the turns of its positions, ahead of all kernels of the
  // step. *moved: the arrays had to grow and are elsewhere now.
  absl::Status SetBatch(const StepBatch& batch, const TurnsOfRows& turns, bool* moved);
  // In place of SetBatch, in a step without layers.
  absl::Status SendTokens();
  absl::Status SetHeadRows(std::span<const int32_t> rows);

 private:
  // A part of the arrays that goes out at once.
  struct Part {
    size_t first = 0;
    std::array<Event, kStepsInFlight> sent;  // the device has taken it from that host array
    int next = 0;                            // the host array that it goes out from next
  };
  absl::Status MakeRoom(size_t blocks);
  absl::Status AwaitFree(const Part& part) const;  // its part of the next host array
  int32_t* Host(const Part& part) { return host_[part.next].data() + part.first; }
  absl::Status NoteSent(Part& part);  // by what is in the compute stream now

  const CudaDevice* device_ = nullptr;
  int max_rows_ = 0;
  int rows_per_tile_ = 1;
  int tile_count_ = 0;
  // Head rows, tokens, positions, first, tiles, blocks.
  std::array<PinnedBuffer<int32_t>, kStepsInFlight> host_;
  DeviceBuffer<int32_t> device_array_;  // the same
  Part head_rows_, batch_;              // all but the head rows
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
  DeviceBuffer<uint8_t> finite;      // [max_rows]
  PinnedBuffer<uint8_t> finite_out;  // [max_rows]
  PinnedBuffer<float> residual_in;   // [max_rows][d_model]
  PinnedBuffer<float> out;           // [max_rows][d_model] or [kHeadRows][vocab]
  Event residual_sent;               // the device has taken residual_in

  StepEnd& NextEnd() { return ends[(first_end + end_count) % kStepsInFlight]; }
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
