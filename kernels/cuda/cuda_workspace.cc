#include "kernels/cuda/cuda_workspace.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <new>
#include <vector>

#include "fmt/format.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/quant_matmul.h"
#include "model/status_macros.h"

namespace stagecoach::cuda {
namespace {

// Enough to split 2000 (row, chunk) pairs of 32 heads of 128 values.
constexpr size_t kPartialFloats = size_t{8} << 20;
// Blocks of a step that there is room for from the start.
constexpr size_t kInitialBlocks = 16384;

size_t FixedInputs(int max_rows) { return 4 * static_cast<size_t>(max_rows); }

int BlocksOf(const BatchSequence& sequence) {
  return (sequence.start_position + sequence.row_count + kKvBlockPositions - 1) / kKvBlockPositions;
}

}  // namespace

absl::StatusOr<StepInputs> StepInputs::Create(const CudaDevice& device, int max_rows,
                                              int rows_per_tile, size_t max_blocks) {
  StepInputs inputs;
  inputs.device_ = &device;
  inputs.max_rows_ = max_rows;
  inputs.rows_per_tile_ = rows_per_tile;
  const size_t size = FixedInputs(max_rows) + max_blocks;
  for (Slot& slot : inputs.slots_) {
    STAGECOACH_ASSIGN_OR_RETURN(slot.host, device.NewPinnedBuffer<int32_t>(size));
    STAGECOACH_ASSIGN_OR_RETURN(slot.there, device.NewBuffer<int32_t>(size, device.inputs()));
    STAGECOACH_ASSIGN_OR_RETURN(slot.sent, device.NewEvent());
    STAGECOACH_ASSIGN_OR_RETURN(slot.taken, device.NewEvent());
  }
  for (HeadSlot& slot : inputs.head_slots_) {
    STAGECOACH_ASSIGN_OR_RETURN(slot.host, device.NewPinnedBuffer<int32_t>(max_rows));
    STAGECOACH_ASSIGN_OR_RETURN(slot.taken, device.NewEvent());
  }
  STAGECOACH_ASSIGN_OR_RETURN(inputs.inputs_, device.NewBuffer<int32_t>(size));
  STAGECOACH_ASSIGN_OR_RETURN(inputs.head_rows_, device.NewBuffer<int32_t>(max_rows));
  return inputs;
}

absl::Status StepInputs::Send(size_t count, StepBegin begin) {
  Slot& slot = Next();
  next_ = (next_ + 1) % kStepsInFlight;
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(slot.there.data(), slot.host.data(),
                                                  count * sizeof(int32_t), cudaMemcpyHostToDevice,
                                                  device_->inputs()));
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaEventRecord(slot.sent.get(), device_->inputs()));
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaStreamWaitEvent(device_->compute(), slot.sent.get()));
  begin.from = slot.there.data();
  begin.to = inputs_.data();
  begin.words = static_cast<int>(count);
  begin.positions = slot.there.data() + max_rows_;
  STAGECOACH_RETURN_IF_CUDA_ERROR(BeginStep(begin, device_->compute()));
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaEventRecord(slot.taken.get(), device_->compute()));
  return absl::OkStatus();
}

absl::Status StepInputs::SetTokens(std::span<const int32_t> token_ids) {
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaEventSynchronize(Next().taken.get()));
  std::ranges::copy(token_ids, Next().host.data());
  return absl::OkStatus();
}

absl::Status StepInputs::SendTokens() { return Send(max_rows_, {}); }

absl::Status StepInputs::SetHeadRows(std::span<const int32_t> rows) {
  HeadSlot& slot = head_slots_[next_head_];
  next_head_ = (next_head_ + 1) % kStepsInFlight;
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaEventSynchronize(slot.taken.get()));
  std::ranges::copy(rows, slot.host.data());
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(head_rows_.data(), slot.host.data(),
                                                  rows.size_bytes(), cudaMemcpyHostToDevice,
                                                  device_->compute()));
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaEventRecord(slot.taken.get(), device_->compute()));
  return absl::OkStatus();
}

// The arrays as they were are freed, so all that they were sent for must be over.
absl::Status StepInputs::MakeRoom(size_t blocks) {
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(device_->compute()));
  STAGECOACH_ASSIGN_OR_RETURN(StepInputs larger,
                              Create(*device_, max_rows_, rows_per_tile_, 2 * blocks));
  std::memcpy(larger.Next().host.data(), Next().host.data(),
              max_rows_ * sizeof(int32_t));  // the tokens
  *this = std::move(larger);
  return absl::OkStatus();
}

absl::Status StepInputs::SetBatch(const StepBatch& batch, const TurnsOfRows& turns,
                                  const TakenRows& taken, bool* moved) {
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaEventSynchronize(Next().taken.get()));
  size_t blocks = 0;
  for (const BatchSequence& sequence : batch.sequences) blocks += BlocksOf(sequence);
  *moved = FixedInputs(max_rows_) + blocks > inputs_.size();
  if (*moved) STAGECOACH_RETURN_IF_ERROR(MakeRoom(blocks));
  int32_t* const positions = Next().host.data() + max_rows_;
  int32_t* const first = positions + max_rows_;
  int32_t* const tiles = first + max_rows_;
  int32_t* const table = tiles + max_rows_;
  int32_t used = 0;
  tile_count_ = 0;
  for (const BatchSequence& sequence : batch.sequences) {
    for (int i = 0; i < sequence.row_count; ++i) {
      positions[sequence.first_row + i] = sequence.start_position + i;
      first[sequence.first_row + i] = used;
    }
    for (int i = 0; i < sequence.row_count; i += rows_per_tile_) {
      tiles[tile_count_++] =
          PackQueryTile(sequence.first_row + i, std::min(rows_per_tile_, sequence.row_count - i));
    }
    std::ranges::copy(sequence.blocks.first(BlocksOf(sequence)), table + used);
    used += BlocksOf(sequence);
  }
  return Send(FixedInputs(max_rows_) + used, {.rows = batch.rows, .turns = turns, .taken = taken});
}

absl::StatusOr<DeviceBuffer<std::byte>> NewMatmulScratch(const CudaDevice& device) {
  STAGECOACH_ASSIGN_OR_RETURN(auto scratch, device.NewBuffer<std::byte>(kMatmulScratchBytes));
  STAGECOACH_RETURN_IF_CUDA_ERROR(
      cudaMemsetAsync(scratch.data(), 0, kMatmulScratchBytes, device.compute()));
  return scratch;
}

absl::StatusOr<std::unique_ptr<CudaWorkspace>> CudaWorkspace::Create(const CudaDevice& device,
                                                                     const ModelParams& params,
                                                                     int max_rows) {
  if (max_rows < 1 || max_rows > kMaxWorkspaceRows) {
    return absl::InvalidArgumentError(fmt::format(
        "{} rows per step: the CUDA backend takes 1 to {}", max_rows, kMaxWorkspaceRows));
  }
  auto workspace = std::make_unique<CudaWorkspace>(params);
  workspace->max_rows = max_rows;
  STAGECOACH_ASSIGN_OR_RETURN(
      workspace->inputs,
      StepInputs::Create(device, max_rows, RowsPerQueryTile(params.heads / params.kv_heads),
                         kInitialBlocks));
  const size_t attended = static_cast<size_t>(params.heads) * params.value_length;
  const struct {
    DeviceBuffer<float>* array;
    size_t rows, columns;
  } arrays[] = {
      {&workspace->residual, size_t(max_rows), size_t(params.d_model)},
      {&workspace->q, size_t(max_rows), size_t(params.heads) * params.key_length},
      {&workspace->k, size_t(max_rows), size_t(params.kv_heads) * params.key_length},
      {&workspace->v, size_t(max_rows), size_t(params.kv_heads) * params.value_length},
      {&workspace->attended, size_t(max_rows), attended},
      {&workspace->gate, size_t(max_rows), size_t(params.ffn_length)},
      {&workspace->up, size_t(max_rows), size_t(params.ffn_length)},
      {&workspace->partials, 1, kPartialFloats},
      {&workspace->head_input, kHeadRows, size_t(params.d_model)},
      {&workspace->logits, kHeadRows, size_t(params.vocab_size)},
  };
  for (const auto& [array, rows, columns] : arrays) {
    STAGECOACH_ASSIGN_OR_RETURN(*array, device.NewBuffer<float>(rows * columns));
  }
  STAGECOACH_ASSIGN_OR_RETURN(workspace->scratch, NewMatmulScratch(device));
  const int widest = std::max({params.d_model, static_cast<int>(attended), params.ffn_length});
  STAGECOACH_ASSIGN_OR_RETURN(
      workspace->activations,
      device.NewBuffer<std::byte>(
          std::max(ActivationBytes(max_rows, widest), ActivationBytes(kHeadRows, params.d_model))));
  const size_t tops = size_t{kHeadRows} * kMostTopLogits;
  STAGECOACH_ASSIGN_OR_RETURN(workspace->top, device.NewBuffer<TopKey>(tops));
  STAGECOACH_ASSIGN_OR_RETURN(workspace->top_out, device.NewPinnedBuffer<TopKey>(tops));
  STAGECOACH_ASSIGN_OR_RETURN(
      workspace->top_scratch,
      device.NewBuffer<TopKey>(TopScratchKeys(kHeadRows, params.vocab_size, kMostTopLogits)));
  STAGECOACH_ASSIGN_OR_RETURN(workspace->draws, device.NewBuffer<TokenDraw>(kHeadRows));
  STAGECOACH_ASSIGN_OR_RETURN(workspace->draws_in, device.NewPinnedBuffer<TokenDraw>(kHeadRows));
  const size_t sums = kHeadRows * static_cast<size_t>(UnitSums(params.vocab_size));
  STAGECOACH_ASSIGN_OR_RETURN(workspace->unit_sums, device.NewBuffer<uint64_t>(sums));
  STAGECOACH_ASSIGN_OR_RETURN(workspace->unit_sums_out, device.NewPinnedBuffer<uint64_t>(sums));
  STAGECOACH_ASSIGN_OR_RETURN(workspace->drawn, device.NewBuffer<int32_t>(kMaxPicks));
  STAGECOACH_ASSIGN_OR_RETURN(workspace->drawn_out, device.NewPinnedBuffer<int32_t>(kHeadRows));
  STAGECOACH_ASSIGN_OR_RETURN(workspace->finite, device.NewBuffer<uint8_t>(max_rows));
  STAGECOACH_ASSIGN_OR_RETURN(workspace->finite_out, device.NewPinnedBuffer<uint8_t>(max_rows));
  STAGECOACH_ASSIGN_OR_RETURN(workspace->spoiled, device.NewPinnedBuffer<std::atomic<uint32_t>>(1));
  static_assert(std::atomic<uint32_t>::is_always_lock_free);
  new (workspace->spoiled.data()) std::atomic<uint32_t>(0);
  for (StepEnd& end : workspace->ends) {
    STAGECOACH_ASSIGN_OR_RETURN(end.draws, device.NewPinnedBuffer<TokenDraw>(kMaxPicks));
    STAGECOACH_ASSIGN_OR_RETURN(end.tokens, device.NewPinnedBuffer<int32_t>(kMaxPicks));
    STAGECOACH_ASSIGN_OR_RETURN(end.finite, device.NewPinnedBuffer<uint8_t>(max_rows));
    STAGECOACH_ASSIGN_OR_RETURN(end.done, device.NewEvent());
  }
  const size_t residuals = static_cast<size_t>(max_rows) * params.d_model;
  STAGECOACH_ASSIGN_OR_RETURN(workspace->residual_in, device.NewPinnedBuffer<float>(residuals));
  STAGECOACH_ASSIGN_OR_RETURN(
      workspace->out, device.NewPinnedBuffer<float>(
                          std::max(residuals, static_cast<size_t>(kHeadRows) * params.vocab_size)));
  STAGECOACH_ASSIGN_OR_RETURN(workspace->residual_sent, device.NewEvent());
  const std::vector<double> frequencies = RopeFrequencies(params);
  STAGECOACH_ASSIGN_OR_RETURN(workspace->turns,
                              device.NewBuffer<float2>(max_rows * frequencies.size()));
  STAGECOACH_ASSIGN_OR_RETURN(workspace->frequencies, device.NewBuffer<double>(frequencies.size()));
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(workspace->frequencies.data(), frequencies.data(),
                                                  frequencies.size() * sizeof(double),
                                                  cudaMemcpyHostToDevice, device.compute()));
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(device.compute()));
  return workspace;
}

}  // namespace stagecoach::cuda
