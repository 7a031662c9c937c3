#include "kernels/cpu/cpu_backend.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <thread>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cpu/cpu_kv_cache.h"
#include "kernels/cpu/cpu_weights.h"
#include "kernels/cpu/cpu_workspace.h"
#include "kernels/cpu/layer_ops.h"
#include "kernels/cpu/pack.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/tensor_check.h"
#include "model/status_macros.h"

namespace stagecoach {
namespace cpu {
namespace {

constexpr int kMaxThreads = 1024;
// What is read and written to empty the caches: as much as they hold, within bounds.
constexpr size_t kLeastFlushBytes = size_t{64} << 20, kMostFlushBytes = size_t{512} << 20;

int ChooseThreads(int wanted) {
  if (wanted > 0) return std::min(wanted, kMaxThreads);
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// Physical memory, or the limit of the control group if that is lower.
uint64_t MemoryBytes() {
  const long pages = sysconf(_SC_PHYS_PAGES);
  const long page_bytes = sysconf(_SC_PAGESIZE);
  uint64_t bytes = pages > 0 && page_bytes > 0 ? static_cast<uint64_t>(pages) * page_bytes : 0;
  uint64_t limit = 0;
  // "max" in place of a number: no limit.
  if (std::ifstream("/sys/fs/cgroup/memory.max") >> limit && limit > 0) {
    bytes = bytes == 0 ? limit : std::min(bytes, limit);
  }
  return bytes;
}

class CpuBackend : public Backend {
 public:
  explicit CpuBackend(const CpuOptions& options)
      : kernels_(&KernelsFor(options.isa)), pool_(ChooseThreads(options.threads)) {}

  BackendInfo info() const override {
    return {"cpu", "cpu-1",
            fmt::format("{}, {} thread{}", kernels_->name, pool_.threads(),
                        pool_.threads() == 1 ? "" : "s"),
            MemoryBytes()};
  }

  absl::Status CheckTensor(TensorRole role, const TensorInfo& tensor) const override {
    return CheckTensorShape(role, tensor);
  }
  uint64_t ResidentBytes(TensorRole role, const TensorInfo& tensor) const override {
    return PackedBytes(role, tensor);
  }
  std::unique_ptr<UnitBuilder> NewUnitBuilder(const ModelParams&, const Unit&) override {
    return std::make_unique<CpuUnitBuilder>();
  }
  absl::StatusOr<std::unique_ptr<KvCache>> NewKvCache(const KvShape& shape) override {
    return CpuKvCache::Create(shape);
  }
  absl::StatusOr<std::unique_ptr<Workspace>> NewWorkspace(const ModelParams& params,
                                                          int max_rows) override {
    return CpuWorkspace::Create(params, max_rows);
  }

  absl::Status Embed(Workspace& workspace, const UnitWeights& embedding,
                     std::span<const int32_t> token_ids) override {
    CpuWorkspace& ws = static_cast<CpuWorkspace&>(workspace);
    ws.rows = static_cast<int>(token_ids.size());
    return static_cast<const CpuUnitWeights&>(embedding).LookUp(token_ids, ws.residual.data());
  }
  absl::Status SetResidual(Workspace& workspace, std::span<const float> residual) override {
    CpuWorkspace& ws = static_cast<CpuWorkspace&>(workspace);
    ws.rows = static_cast<int>(residual.size()) / ws.params.d_model;
    std::copy(residual.begin(), residual.end(), ws.residual.data());
    return absl::OkStatus();
  }
  absl::Status GetResidual(Workspace& workspace, std::span<float> residual) override {
    const CpuWorkspace& ws = static_cast<CpuWorkspace&>(workspace);
    std::copy_n(ws.residual.data(), residual.size(), residual.begin());
    return absl::OkStatus();
  }
  ResidualMemory residual_memory(Workspace& workspace) override {
    return {.data = static_cast<CpuWorkspace&>(workspace).residual.data()};
  }
  absl::Status TakeResidual(Workspace& workspace, int rows) override {
    static_cast<CpuWorkspace&>(workspace).rows = rows;
    return absl::OkStatus();
  }
  absl::Status LeaveResidual(Workspace& workspace, std::span<uint8_t> finite) override {
    const CpuWorkspace& ws = static_cast<CpuWorkspace&>(workspace);
    const size_t columns = ws.params.d_model;
    for (size_t row = 0; row < finite.size(); ++row) {
      finite[row] = AllFinite({ws.residual.data() + row * columns, columns});
    }
    return absl::OkStatus();
  }
  absl::Status RunLayer(Workspace& workspace, const UnitWeights& layer, KvCache& kv, int kv_layer,
                        const StepBatch& batch) override {
    CpuWorkspace& ws = static_cast<CpuWorkspace&>(workspace);
    const CpuUnitWeights& weights = static_cast<const CpuUnitWeights&>(layer);
    ws.rows = batch.rows;
    RunAttention(ws, weights, static_cast<CpuKvCache&>(kv), kv_layer, batch);
    RunFeedForward(ws, weights);
    return absl::OkStatus();
  }
  absl::Status Head(Workspace& workspace, const UnitWeights& head, std::span<const int32_t> rows,
                    std::span<float> logits) override;

  absl::Status CopyKvBlocks(KvCache& kv, std::span<const KvBlockCopy> copies) override {
    for (const KvBlockCopy& copy : copies) {
      static_cast<CpuKvCache&>(kv).CopyBlock(copy.from, copy.to);
    }
    return absl::OkStatus();
  }
  absl::Status ClearKvBlocks(KvCache& kv, std::span<const int32_t> blocks) override {
    for (const int32_t block : blocks) static_cast<CpuKvCache&>(kv).ClearBlock(block);
    return absl::OkStatus();
  }

  absl::Status SetOpTimer(OpTimer* timer) override {
    timer_ = timer;
    return absl::OkStatus();
  }
  absl::Status MatMul(const TensorInfo& tensor, std::span<const std::byte> raw,
                      std::span<const float> x, int rows, std::span<float> y) override;
  absl::Status RmsNorm(std::span<const float> x, int rows, std::span<const float> weight,
                       float epsilon, std::span<float> y) override {
    RunOp([&] {
      Ops().Norm(x.data(), rows, static_cast<int>(weight.size()), weight.data(), epsilon, {},
                 y.data(), nullptr);
    });
    return absl::OkStatus();
  }
  absl::Status Rope(const ModelParams& params, std::span<float> x, int heads, int head_dim,
                    std::span<const int32_t> positions) override {
    RopeTable table(params);
    for (const int32_t position : positions) table.Grow(position + 1);
    RunOp([&] {
      float* row = x.data();
      for (const int32_t position : positions) {
        table.Rotate(*kernels_, row, heads, head_dim, position);
        row += static_cast<ptrdiff_t>(heads) * head_dim;
      }
    });
    return absl::OkStatus();
  }
  absl::Status SwiGlu(std::span<const float> gate, std::span<const float> up,
                      std::span<float> out) override {
    RunOp([&] {
      kernels_->swiglu(gate.data(), up.data(), static_cast<int>(out.size()), out.data());
    });
    return absl::OkStatus();
  }
  absl::Status Attention(const ModelParams& params, std::span<const float> q,
                         std::span<const float> k, std::span<const float> v, KvCache& kv,
                         int kv_layer, const StepBatch& batch, std::span<float> out) override;

 private:
  LayerOps Ops() { return LayerOps(kernels_, &pool_); }
  // A single operation's loops: once, or as the timer wants.
  template <typename Run>
  void RunOp(const Run& run);
  void RunAttention(CpuWorkspace& ws, const CpuUnitWeights& weights, CpuKvCache& kv, int kv_layer,
                    const StepBatch& batch);
  void RunFeedForward(CpuWorkspace& ws, const CpuUnitWeights& weights);

  const CpuKernels* const kernels_;
  ThreadPool pool_;  // synchronises itself
  OpTimer* timer_ = nullptr;
};

template <typename Run>
void CpuBackend::RunOp(const Run& run) {
  if (timer_ == nullptr) return run();
  using Clock = std::chrono::steady_clock;
  const long cache_bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);  // 0 or less: not known
  const size_t flush_bytes = std::clamp<size_t>(2 * static_cast<size_t>(std::max(cache_bytes, 0L)),
                                                kLeastFlushBytes, kMostFlushBytes);
  std::vector<uint64_t> flush(flush_bytes / sizeof(uint64_t), 1);
  run();
  while (!timer_->Enough()) {
    for (uint64_t& word : flush) ++word;  // pushes everything else out of the caches
    const Clock::time_point start = Clock::now();
    run();
    timer_->Add(std::chrono::duration<double>(Clock::now() - start).count());
  }
}

void CpuBackend::RunAttention(CpuWorkspace& ws, const CpuUnitWeights& weights, CpuKvCache& kv,
                              int kv_layer, const StepBatch& batch) {
  const LayerOps ops = Ops();
  const ModelParams& params = ws.params;
  const MatrixView& wq = weights.matrix(TensorRole::kAttnQ);
  const MatrixView& wk = weights.matrix(TensorRole::kAttnK);
  const MatrixView& wv = weights.matrix(TensorRole::kAttnV);
  const MatrixView& wo = weights.matrix(TensorRole::kAttnOutput);

  const MatrixView* const qkv[] = {&wq, &wk, &wv};
  ops.Norm(ws.residual.data(), ws.rows, params.d_model, weights.vector(TensorRole::kAttnNorm),
           params.norm_epsilon, FormsFor(qkv), ws.normed.data(), &ws.input);
  const Projection projections[] = {
      {&wq, weights.vector(TensorRole::kAttnQBias), ws.q.data(), false},
      {&wk, weights.vector(TensorRole::kAttnKBias), ws.k.data(), false},
      {&wv, weights.vector(TensorRole::kAttnVBias), ws.v.data(), false}};
  ops.Project(ws.input.View(ws.normed.data(), ws.rows, params.d_model), projections);

  int positions = 0;
  for (const BatchSequence& sequence : batch.sequences) {
    positions = std::max(positions, sequence.start_position + sequence.row_count);
  }
  ws.rope.Grow(positions);
  ops.StoreKv(&ws.rope, params.heads, batch, ws.q.data(), ws.k.data(), ws.v.data(), kv, kv_layer);
  ops.Attend(params.heads, batch, ws.q.data(), kv, kv_layer, &ws.chunks, ws.attended.data());

  const MatrixView* const output[] = {&wo};
  if (FormsFor(output).quants) ops.Quantize(ws.attended.data(), ws.rows, wo.columns, ws.input);
  const Projection back[] = {
      {&wo, weights.vector(TensorRole::kAttnOutputBias), ws.residual.data(), true}};
  ops.Project(ws.input.View(ws.attended.data(), ws.rows, wo.columns), back);
}

void CpuBackend::RunFeedForward(CpuWorkspace& ws, const CpuUnitWeights& weights) {
  const LayerOps ops = Ops();
  const ModelParams& params = ws.params;
  const MatrixView& gate = weights.matrix(TensorRole::kFfnGate);
  const MatrixView& up = weights.matrix(TensorRole::kFfnUp);
  const MatrixView& down = weights.matrix(TensorRole::kFfnDown);

  const MatrixView* const inward[] = {&gate, &up};
  ops.Norm(ws.residual.data(), ws.rows, params.d_model, weights.vector(TensorRole::kFfnNorm),
           params.norm_epsilon, FormsFor(inward), ws.normed.data(), &ws.input);
  const MatrixView* const outward[] = {&down};
  ops.GatedProject(ws.input.View(ws.normed.data(), ws.rows, params.d_model), gate, up,
                   FormsFor(outward), ws.gate.data(), ws.up.data(), ws.hidden);
  const Projection back[] = {{&down, nullptr, ws.residual.data(), true}};
  ops.Project(ws.hidden.View(ws.gate.data(), ws.rows, params.ffn_length), back);
}

absl::Status CpuBackend::Head(Workspace& workspace, const UnitWeights& head,
                              std::span<const int32_t> rows, std::span<float> logits) {
  CpuWorkspace& ws = static_cast<CpuWorkspace&>(workspace);
  const CpuUnitWeights& weights = static_cast<const CpuUnitWeights&>(head);
  const ModelParams& params = ws.params;
  const LayerOps ops = Ops();
  const MatrixView& output = weights.matrix(TensorRole::kOutput);
  const ptrdiff_t columns = params.d_model;
  for (size_t i = 0; i < rows.size(); ++i) {
    float* normed = ws.normed.data() + i * columns;
    kernels_->rms_norm(ws.residual.data() + rows[i] * columns, params.d_model,
                       weights.vector(TensorRole::kOutputNorm), params.norm_epsilon, normed);
  }
  const int count = static_cast<int>(rows.size());
  const ActivationView x = ws.input.View(ws.normed.data(), count, params.d_model);
  if (IsFloatType(output.type)) {
    const Projection projection[] = {{&output, nullptr, logits.data(), false}};
    ops.Project(x, projection);
  } else {
    // Nothing after the head evens its errors out: with one pass of int8 they were half of the
    // error of the logits.
    ops.Quantize(ws.normed.data(), count, params.d_model, ws.input);
    ops.ProjectPrecisely(x, output, ws.rest, logits.data());
  }
  return absl::OkStatus();
}

absl::Status CpuBackend::MatMul(const TensorInfo& tensor, std::span<const std::byte> raw,
                                std::span<const float> x, int rows, std::span<float> y) {
  STAGECOACH_RETURN_IF_ERROR(CheckTensorShape(TensorRole::kOutput, tensor));
  STAGECOACH_RETURN_IF_ERROR(CheckTensorData(tensor, raw));
  const int columns = static_cast<int>(tensor.columns());
  STAGECOACH_ASSIGN_OR_RETURN(
      const PackedMatrix matrix,
      PackedMatrix::Pack(tensor.type, static_cast<int>(tensor.rows()), columns, raw));
  STAGECOACH_ASSIGN_OR_RETURN(const QuantBuffer quants, QuantBuffer::Create(rows, columns));
  const LayerOps ops = Ops();
  if (!IsFloatType(tensor.type)) ops.Quantize(x.data(), rows, columns, quants);
  const Projection projection[] = {{&matrix.view(), nullptr, y.data(), false}};
  RunOp([&] { ops.Project(quants.View(x.data(), rows, columns), projection); });
  return absl::OkStatus();
}

absl::Status CpuBackend::Attention(const ModelParams& params, std::span<const float> q,
                                   std::span<const float> k, std::span<const float> v, KvCache& kv,
                                   int kv_layer, const StepBatch& batch, std::span<float> out) {
  const CpuKvCache& cache = static_cast<const CpuKvCache&>(kv);
  const LayerOps ops = Ops();
  std::vector<RowChunk> chunks;
  RunOp([&] {
    // Without rotation nothing is written to q and k.
    ops.StoreKv(nullptr, params.heads, batch, const_cast<float*>(q.data()),
                const_cast<float*>(k.data()), v.data(), cache, kv_layer);
    ops.Attend(params.heads, batch, q.data(), cache, kv_layer, &chunks, out.data());
  });
  return absl::OkStatus();
}

}  // namespace
}  // namespace cpu

std::unique_ptr<Backend> MakeCpuBackend(const CpuOptions& options) {
  return std::make_unique<cpu::CpuBackend>(options);
}

}  // namespace stagecoach
