#include "kernels/cpu/cpu_workspace.h"

#include <algorithm>

#include <fmt/format.h>

#include "model/status_macros.h"

namespace stagecoach::cpu {
namespace {

// Positions whose rotations are ready before the first step; more are computed when needed.
constexpr int kInitialPositions = 4096;

}  // namespace

absl::StatusOr<QuantBuffer> QuantBuffer::Create(int rows, int columns) {
  const size_t blocks = (static_cast<size_t>(columns) + kActivationBlock - 1) / kActivationBlock;
  QuantBuffer buffer;
  STAGECOACH_ASSIGN_OR_RETURN(buffer.quants,
                              AlignedBuffer<int8_t>::Create(rows * blocks * kActivationBlock));
  STAGECOACH_ASSIGN_OR_RETURN(buffer.scales, AlignedBuffer<ActivationScale>::Create(rows * blocks));
  return buffer;
}

absl::StatusOr<std::unique_ptr<CpuWorkspace>> CpuWorkspace::Create(const ModelParams& params,
                                                                   int max_rows) {
  if (max_rows < 1) return absl::InvalidArgumentError("a workspace needs at least one row");
  if (params.heads / params.kv_heads > kMaxTaskQueries) {
    return absl::InvalidArgumentError(
        fmt::format("{} query heads per KV head: the CPU backend takes at most {}",
                    params.heads / params.kv_heads, kMaxTaskQueries));
  }
  auto workspace = std::make_unique<CpuWorkspace>(params);
  workspace->max_rows = max_rows;
  workspace->chunks.reserve(max_rows);
  workspace->rope.Grow(std::min(params.context_length, kInitialPositions));
  const int attended = params.heads * params.value_length;
  const struct {
    AlignedBuffer<float>* buffer;
    int columns;
  } buffers[] = {{&workspace->residual, params.d_model},
                 {&workspace->normed, params.d_model},
                 {&workspace->q, params.heads * params.key_length},
                 {&workspace->k, params.kv_heads * params.key_length},
                 {&workspace->v, params.kv_heads * params.value_length},
                 {&workspace->attended, attended},
                 {&workspace->gate, params.ffn_length},
                 {&workspace->up, params.ffn_length}};
  for (const auto& [buffer, columns] : buffers) {
    STAGECOACH_ASSIGN_OR_RETURN(
        *buffer, AlignedBuffer<float>::Create(static_cast<size_t>(max_rows) * columns));
  }
  STAGECOACH_ASSIGN_OR_RETURN(workspace->input,
                              QuantBuffer::Create(max_rows, std::max(params.d_model, attended)));
  STAGECOACH_ASSIGN_OR_RETURN(workspace->rest, QuantBuffer::Create(max_rows, params.d_model));
  STAGECOACH_ASSIGN_OR_RETURN(workspace->hidden, QuantBuffer::Create(max_rows, params.ffn_length));
  return workspace;
}

}  // namespace stagecoach::cpu
