#include "kernels/cuda/cuda_backend.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "fmt/format.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/cuda_kv_cache.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/cuda_weights.h"
#include "kernels/cuda/cuda_workspace.h"
#include "kernels/cuda/device_peaks.h"
#include "kernels/cuda/finite_rows.h"
#include "kernels/cuda/head_choices.h"
#include "kernels/cuda/kernel_timer.h"
#include "kernels/cuda/layer_ops.h"
#include "kernels/cuda/quant_matmul.h"
#include "kernels/cuda/rope.h"
#include "kernels/cuda/step_runner.h"
#include "kernels/cuda/uploader.h"
#include "kernels/cuda/weight_bounds.h"
#include "kernels/tensor_check.h"
#include "model/model_error.h"
#include "model/status_macros.h"

namespace stagecoach {
namespace cuda {
namespace {

// The GPU's generation is part of it: what a matrix product adds at once differs between them.
constexpr char kKernelRevision[] = "cuda-10";

struct StageWorkspace final : Workspace {
  StageWorkspace(const CudaDevice& device, std::unique_ptr<CudaWorkspace> allocated, bool graphs)
      : buffers(std::move(allocated)), runner(device, *buffers, graphs) {}
  const std::unique_ptr<CudaWorkspace> buffers;
  StepRunner runner;
};

// The objects that this backend made itself.
StageWorkspace& Own(Workspace& workspace) { return static_cast<StageWorkspace&>(workspace); }
CudaKvCache& Own(KvCache& kv) { return static_cast<CudaKvCache&>(kv); }
const std::shared_ptr<const UnitStorage>& Own(const UnitWeights& weights) {
  return static_cast<const CudaUnitWeights&>(weights).storage();
}

class CudaBackend final : public Backend {
 public:
  CudaBackend(std::unique_ptr<CudaDevice> device, std::unique_ptr<Uploader> uploader, bool graphs)
      : device_(std::move(device)), uploader_(std::move(uploader)), graphs_(graphs) {}

  BackendInfo info() const override {
    return {.kind = "cuda",
            .kernel_revision = fmt::format("{}-sm{}", kKernelRevision, device_->major()),
            .description =
                fmt::format("{}, {} multiprocessors{}", device_->name(), device_->multiprocessors(),
                            device_->kernels() == KernelSet::kPlain ? ", plain kernels" : ""),
            .memory_bytes = device_->memory_bytes() -
                            std::min(device_->memory_bytes(), uploader_->device_bytes()),
            .device_uuid = device_->uuid(),
            .own_memory = true};
  }

  absl::Status CheckTensor(TensorRole role, const TensorInfo& tensor) const override;
  WeightBounds BoundsOf(TensorType type) const override { return BoundsOfTiles(type); }
  uint64_t ResidentBytes(TensorRole role, const TensorInfo& tensor) const override {
    return DeviceBytes(role, tensor);
  }
  std::unique_ptr<UnitBuilder> NewUnitBuilder(const ModelParams&, const Unit&) override {
    return std::make_unique<CudaUnitBuilder>(*device_, *uploader_);
  }
  absl::StatusOr<std::shared_ptr<HostMemory>> NewHostMemory(size_t bytes) override {
    STAGECOACH_RETURN_IF_ERROR(device_->MakeCurrent());
    return device_->NewPinnedMemory(bytes);
  }
  UploadStats uploads() const override {
    return device_->MakeCurrent().ok() ? uploader_->stats() : UploadStats();
  }
  absl::StatusOr<std::unique_ptr<KvCache>> NewKvCache(const KvShape& shape) override {
    STAGECOACH_RETURN_IF_ERROR(device_->MakeCurrent());
    return CudaKvCache::Create(*device_, shape);
  }
  absl::StatusOr<std::unique_ptr<Workspace>> NewWorkspace(const ModelParams& params,
                                                          int max_rows) override;

  absl::Status Embed(Workspace& workspace, const UnitWeights& embedding,
                     std::span<const int32_t> token_ids) override {
    STAGECOACH_RETURN_IF_ERROR(device_->MakeCurrent());
    return Own(workspace).runner.Embed(Own(embedding), token_ids);
  }
  absl::Status SetResidual(Workspace& workspace, std::span<const float> residual) override {
    STAGECOACH_RETURN_IF_ERROR(device_->MakeCurrent());
    return Own(workspace).runner.SetResidual(residual);
  }
  absl::Status RunLayer(Workspace& workspace, const UnitWeights& layer, KvCache& kv, int kv_layer,
                        const StepBatch& batch) override {
    STAGECOACH_RETURN_IF_ERROR(device_->MakeCurrent());
    return Own(workspace).runner.RunLayer(Own(layer), Own(kv).layer(kv_layer), batch);
  }
  absl::Status GetResidual(Workspace& workspace, std::span<float> residual) override;
  ResidualMemory residual_memory(Workspace& workspace) override {
    return {.data = Own(workspace).buffers->residual.data(),
            .stream = device_->compute(),
            .spoiled = Own(workspace).buffers->spoiled.data(),
            .device = device_->index()};
  }
  absl::Status TakeResidual(Workspace& workspace, int rows) override {
    Own(workspace).runner.TakeResidual(rows);
    return absl::OkStatus();
  }
  absl::Status LeaveResidual(Workspace& workspace, std::span<uint8_t> finite) override;
  absl::Status Head(Workspace& workspace, const UnitWeights& head, std::span<const int32_t> rows,
                    std::span<float> logits) override;

  int MaxTopLogits() const override { return kMostTopLogits; }
  absl::Status HeadTop(Workspace& workspace, const UnitWeights& head, std::span<const int32_t> rows,
                       int count, std::span<TopLogit> top, std::span<uint64_t> totals) override;
  bool DrawsTokens() const override { return true; }
  absl::Status HeadDraw(Workspace& workspace, const UnitWeights& head,
                        std::span<const int32_t> rows, std::span<const TokenDraw> draws,
                        std::span<int32_t> tokens) override;

  int MaxPicks() const override { return kMaxPicks; }
  absl::Status EnqueuePicks(Workspace& workspace, const UnitWeights& head,
                            std::span<const int32_t> rows,
                            std::span<const TokenDraw> draws) override;
  absl::Status EnqueueResidual(Workspace& workspace) override;
  bool EndReady(Workspace& workspace) override {
    return !device_->MakeCurrent().ok() || StepEndReady(*Own(workspace).buffers);
  }
  absl::Status AwaitEnd(Workspace& workspace, std::span<int32_t> tokens,
                        std::span<uint8_t> finite) override {
    STAGECOACH_RETURN_IF_ERROR(device_->MakeCurrent());
    return AwaitStepEnd(*Own(workspace).buffers, tokens, finite);
  }

  absl::Status CopyKvBlocks(KvCache& kv, std::span<const KvBlockCopy> copies) override;
  absl::Status ClearKvBlocks(KvCache& kv, std::span<const int32_t> blocks) override;

  absl::Status SetOpTimer(OpTimer* timer) override {
    timer_ = timer;
    return absl::OkStatus();
  }
  absl::Status MatMul(const TensorInfo& tensor, std::span<const std::byte> raw,
                      std::span<const float> x, int rows, std::span<float> y) override;
  absl::Status RmsNorm(std::span<const float> x, int rows, std::span<const float> weight,
                       float epsilon, std::span<float> y) override;
  absl::Status Rope(const ModelParams& params, std::span<float> x, int heads, int head_dim,
                    std::span<const int32_t> positions) override;
  absl::Status SwiGlu(std::span<const float> gate, std::span<const float> up,
                      std::span<float> out) override;
  absl::Status Attention(const ModelParams& params, std::span<const float> q,
                         std::span<const float> k, std::span<const float> v, KvCache& kv,
                         int kv_layer, const StepBatch& batch, std::span<float> out) override;

  const CudaDevice& device() const { return *device_; }
  absl::StatusOr<double> MeasureCopyRate() {
    STAGECOACH_RETURN_IF_ERROR(device_->MakeCurrent());
    return uploader_->MeasureCopyRate();
  }

 private:
  template <typename Consume>
  absl::Status RunHead(StageWorkspace& own, const UnitWeights& head, std::span<const int32_t> rows,
                       const Consume& consume);
  // For single operations: copies to and from pageable memory, in the order of the compute stream.
  template <typename T>
  absl::StatusOr<DeviceBuffer<T>> ToDevice(std::span<const T> values);
  template <typename T>
  absl::Status ToHost(const DeviceBuffer<T>& from, std::span<T> values);
  // The kernels of a single operation: once, or as the timer wants.
  absl::Status LaunchOp(const Launch& launch);

  const std::unique_ptr<CudaDevice> device_;
  const std::unique_ptr<Uploader> uploader_;  // synchronises itself
  const bool graphs_;
  OpTimer* timer_ = nullptr;
};

absl::Status CudaBackend::CheckTensor(TensorRole role, const TensorInfo& tensor) const {
  STAGECOACH_RETURN_IF_ERROR(CheckTensorShape(role, tensor));
  if (IsVectorRole(role) || role == TensorRole::kTokenEmbedding || Uploader::FitsPieces(tensor)) {
    return absl::OkStatus();
  }
  return MakeModelError(ModelError::kBadShape,
                        fmt::format("tensor {}: rows of {} columns are too long for the CUDA "
                                    "backend",
                                    tensor.name, tensor.columns()));
}

absl::StatusOr<std::unique_ptr<Workspace>> CudaBackend::NewWorkspace(const ModelParams& params,
                                                                     int max_rows) {
  STAGECOACH_RETURN_IF_ERROR(device_->MakeCurrent());
  STAGECOACH_ASSIGN_OR_RETURN(auto buffers, CudaWorkspace::Create(*device_, params, max_rows));
  return std::make_unique<StageWorkspace>(*device_, std::move(buffers), graphs_);
}

absl::Status CudaBackend::GetResidual(Workspace& workspace, std::span<float> residual) {
  STAGECOACH_RETURN_IF_ERROR(device_->MakeCurrent());
  StageWorkspace& own = Own(workspace);
  STAGECOACH_RETURN_IF_ERROR(own.runner.Flush());
  float* const pinned = own.buffers->out.data();
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(pinned, own.buffers->residual.data(),
                                                  residual.size_bytes(), cudaMemcpyDeviceToHost,
                                                  device_->compute()));
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(device_->compute()));
  std::memcpy(residual.data(), pinned, residual.size_bytes());
  return absl::OkStatus();
}

absl::Status CudaBackend::LeaveResidual(Workspace& workspace, std::span<uint8_t> finite) {
  STAGECOACH_RETURN_IF_ERROR(device_->MakeCurrent());
  STAGECOACH_RETURN_IF_ERROR(Own(workspace).runner.Flush());
  CudaWorkspace& buffers = *Own(workspace).buffers;
  STAGECOACH_RETURN_IF_CUDA_ERROR(
      FindFiniteRows(buffers.residual.data(), static_cast<int>(finite.size()),
                     buffers.params.d_model, buffers.finite.data(), device_->compute()));
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(buffers.finite_out.data(), buffers.finite.data(),
                                                  finite.size(), cudaMemcpyDeviceToHost,
                                                  device_->compute()));
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(device_->compute()));
  std::copy_n(buffers.finite_out.data(), finite.size(), finite.begin());
  return absl::OkStatus();
}

// Leaves the logits of a few rows at a time in the workspace; consume(first, count) takes those of
// rows [first, first + count) from there.
template <typename Consume>
absl::Status CudaBackend::RunHead(StageWorkspace& own, const UnitWeights& head,
                                  std::span<const int32_t> rows, const Consume& consume) {
  STAGECOACH_RETURN_IF_ERROR(device_->MakeCurrent());
  STAGECOACH_RETURN_IF_ERROR(own.runner.Flush());
  STAGECOACH_RETURN_IF_ERROR(Own(head)->AwaitUpload());
  CudaWorkspace& buffers = *own.buffers;
  const size_t most = std::min(kHeadRows, buffers.max_rows);
  for (size_t first = 0; first < rows.size(); first += most) {
    const size_t count = std::min(most, rows.size() - first);
    STAGECOACH_RETURN_IF_ERROR(buffers.inputs.SetHeadRows(rows.subspan(first, count)));
    STAGECOACH_RETURN_IF_ERROR(
        EnqueueGather(buffers, /*first=*/0, static_cast<int>(count), device_->compute()));
    const absl::Status enqueued = EnqueueHead(buffers, *Own(head), buffers.head_input.data(),
                                              static_cast<int>(count), device_->compute());
    Own(head)->NoteUse();
    STAGECOACH_RETURN_IF_ERROR(enqueued);
    STAGECOACH_RETURN_IF_ERROR(consume(first, count));
  }
  return absl::OkStatus();
}

absl::Status CudaBackend::Head(Workspace& workspace, const UnitWeights& head,
                               std::span<const int32_t> rows, std::span<float> logits) {
  CudaWorkspace& buffers = *Own(workspace).buffers;
  const size_t vocab = buffers.params.vocab_size;
  return RunHead(Own(workspace), head, rows, [&](size_t first, size_t count) -> absl::Status {
    const size_t bytes = count * vocab * sizeof(float);
    STAGECOACH_RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(buffers.out.data(), buffers.logits.data(),
                                                    bytes, cudaMemcpyDeviceToHost,
                                                    device_->compute()));
    STAGECOACH_RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(device_->compute()));
    std::memcpy(logits.data() + first * vocab, buffers.out.data(), bytes);
    return absl::OkStatus();
  });
}

absl::Status CudaBackend::HeadTop(Workspace& workspace, const UnitWeights& head,
                                  std::span<const int32_t> rows, int count, std::span<TopLogit> top,
                                  std::span<uint64_t> totals) {
  StageWorkspace& own = Own(workspace);
  return RunHead(own, head, rows, [&](size_t first, size_t row_count) {
    return TakeTop(*own.buffers, count, top.subspan(first * count, row_count * count),
                   totals.empty() ? totals : totals.subspan(first, row_count), device_->compute());
  });
}

absl::Status CudaBackend::HeadDraw(Workspace& workspace, const UnitWeights& head,
                                   std::span<const int32_t> rows, std::span<const TokenDraw> draws,
                                   std::span<int32_t> tokens) {
  StageWorkspace& own = Own(workspace);
  return RunHead(own, head, rows, [&](size_t first, size_t count) {
    return TakeDraws(*own.buffers, draws.subspan(first, count), tokens.subspan(first, count),
                     device_->compute());
  });
}

absl::Status CudaBackend::EnqueuePicks(Workspace& workspace, const UnitWeights& head,
                                       std::span<const int32_t> rows,
                                       std::span<const TokenDraw> draws) {
  STAGECOACH_RETURN_IF_ERROR(device_->MakeCurrent());
  StageWorkspace& own = Own(workspace);
  STAGECOACH_RETURN_IF_ERROR(BeginStepEnd(*own.buffers, rows, draws));
  STAGECOACH_RETURN_IF_ERROR(own.runner.Flush());
  STAGECOACH_RETURN_IF_ERROR(Own(head)->AwaitUpload());
  const absl::Status enqueued = EnqueuePicking(*own.buffers, *Own(head), device_->compute());
  Own(head)->NoteUse();
  STAGECOACH_RETURN_IF_ERROR(enqueued);
  return EnqueueStepEnd(*own.buffers, device_->compute());
}

absl::Status CudaBackend::EnqueueResidual(Workspace& workspace) {
  STAGECOACH_RETURN_IF_ERROR(device_->MakeCurrent());
  StageWorkspace& own = Own(workspace);
  STAGECOACH_RETURN_IF_ERROR(BeginStepEnd(*own.buffers, /*rows=*/{}, /*draws=*/{}));
  STAGECOACH_RETURN_IF_ERROR(own.runner.Flush());
  return EnqueueStepEnd(*own.buffers, device_->compute());
}

absl::Status CudaBackend::CopyKvBlocks(KvCache& kv, std::span<const KvBlockCopy> copies) {
  STAGECOACH_RETURN_IF_ERROR(device_->MakeCurrent());
  for (const KvBlockCopy& copy : copies) {
    STAGECOACH_RETURN_IF_CUDA_ERROR(Own(kv).CopyBlock(copy.from, copy.to, device_->compute()));
  }
  return absl::OkStatus();
}

absl::Status CudaBackend::ClearKvBlocks(KvCache& kv, std::span<const int32_t> blocks) {
  STAGECOACH_RETURN_IF_ERROR(device_->MakeCurrent());
  for (const int32_t block : blocks) {
    STAGECOACH_RETURN_IF_CUDA_ERROR(Own(kv).ClearBlock(block, device_->compute()));
  }
  return absl::OkStatus();
}

template <typename T>
absl::StatusOr<DeviceBuffer<T>> CudaBackend::ToDevice(std::span<const T> values) {
  STAGECOACH_ASSIGN_OR_RETURN(DeviceBuffer<T> array, device_->NewBuffer<T>(values.size()));
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(array.data(), values.data(), values.size_bytes(),
                                                  cudaMemcpyHostToDevice, device_->compute()));
  return array;
}

template <typename T>
absl::Status CudaBackend::ToHost(const DeviceBuffer<T>& from, std::span<T> values) {
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(values.data(), from.data(), values.size_bytes(),
                                                  cudaMemcpyDeviceToHost, device_->compute()));
  STAGECOACH_RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(device_->compute()));
  return absl::OkStatus();
}

absl::Status CudaBackend::LaunchOp(const Launch& launch) {
  if (timer_ != nullptr) return TimeColdLaunches(*device_, launch, *timer_);
  STAGECOACH_RETURN_IF_CUDA_ERROR(launch());
  return absl::OkStatus();
}

absl::Status CudaBackend::MatMul(const TensorInfo& tensor, std::span<const std::byte> raw,
                                 std::span<const float> x, int rows, std::span<float> y) {
  CudaUnitBuilder builder(*device_, *uploader_);
  STAGECOACH_RETURN_IF_ERROR(CheckTensor(TensorRole::kOutput, tensor));
  STAGECOACH_RETURN_IF_ERROR(builder.Add(TensorRole::kOutput, tensor, raw));
  STAGECOACH_ASSIGN_OR_RETURN(const std::unique_ptr<UnitWeights> weights, builder.Finish());
  STAGECOACH_RETURN_IF_ERROR(Own(*weights)->AwaitUpload());
  const PackedMatrix& matrix = Own(*weights)->matrix(TensorRole::kOutput);
  STAGECOACH_ASSIGN_OR_RETURN(const DeviceBuffer<float> in, ToDevice(x));
  STAGECOACH_ASSIGN_OR_RETURN(const DeviceBuffer<float> out, device_->NewBuffer<float>(y.size()));
  STAGECOACH_ASSIGN_OR_RETURN(const DeviceBuffer<std::byte> memory,
                              device_->NewBuffer<std::byte>(ActivationBytes(rows, matrix.k)));
  const Activations activations =
      LayOutActivations(memory.data(), FormFor(tensor.type), rows, matrix.k);
  STAGECOACH_RETURN_IF_CUDA_ERROR(LaunchConvert(in.data(), activations, device_->compute()));
  STAGECOACH_ASSIGN_OR_RETURN(const auto scratch, NewMatmulScratch(*device_));
  const MatmulTerm term[] = {{.weights = matrix, .y = out.data(), .y_stride = matrix.n}};
  STAGECOACH_RETURN_IF_ERROR(LaunchOp(
      [&] { return LaunchMatmul(term, activations, device_->compute(), {scratch.data()}); }));
  return ToHost(out, y);
}

absl::Status CudaBackend::RmsNorm(std::span<const float> x, int rows, std::span<const float> weight,
                                  float epsilon, std::span<float> y) {
  STAGECOACH_RETURN_IF_ERROR(device_->MakeCurrent());
  STAGECOACH_ASSIGN_OR_RETURN(const DeviceBuffer<float> in, ToDevice(x));
  STAGECOACH_ASSIGN_OR_RETURN(const DeviceBuffer<float> scale, ToDevice(weight));
  STAGECOACH_ASSIGN_OR_RETURN(const DeviceBuffer<float> out, device_->NewBuffer<float>(y.size()));
  const Activations normed =
      LayOutActivations(out.data(), ActivationForm::kFloat, rows, static_cast<int>(weight.size()));
  STAGECOACH_RETURN_IF_ERROR(LaunchOp(
      [&] { return LaunchRmsNorm(in.data(), scale.data(), epsilon, normed, device_->compute()); }));
  return ToHost(out, y);
}

absl::Status CudaBackend::Rope(const ModelParams& params, std::span<float> x, int heads,
                               int head_dim, std::span<const int32_t> positions) {
  STAGECOACH_RETURN_IF_ERROR(device_->MakeCurrent());
  const std::vector<double> frequencies = RopeFrequencies(params);
  const int pairs = static_cast<int>(frequencies.size()), rows = static_cast<int>(positions.size());
  STAGECOACH_ASSIGN_OR_RETURN(const auto angles, ToDevice(std::span<const double>(frequencies)));
  STAGECOACH_ASSIGN_OR_RETURN(const auto places, ToDevice(positions));
  STAGECOACH_ASSIGN_OR_RETURN(const auto values, ToDevice(std::span<const float>(x)));
  STAGECOACH_ASSIGN_OR_RETURN(const auto turns,
                              device_->NewBuffer<float2>(frequencies.size() * positions.size()));
  const StepBegin begin = {
      .positions = places.data(),
      .rows = rows,
      .turns = {.frequencies = angles.data(), .pairs = pairs, .turns = turns.data()}};
  STAGECOACH_RETURN_IF_CUDA_ERROR(BeginStep(begin, device_->compute()));
  STAGECOACH_RETURN_IF_ERROR(LaunchOp([&] {
    return cuda::Rope(turns.data(), pairs, rows, heads, head_dim, values.data(),
                      device_->compute());
  }));
  return ToHost(values, x);
}

absl::Status CudaBackend::SwiGlu(std::span<const float> gate, std::span<const float> up,
                                 std::span<float> out) {
  STAGECOACH_RETURN_IF_ERROR(device_->MakeCurrent());
  STAGECOACH_ASSIGN_OR_RETURN(const DeviceBuffer<float> gates, ToDevice(gate));
  STAGECOACH_ASSIGN_OR_RETURN(const DeviceBuffer<float> ups, ToDevice(up));
  STAGECOACH_ASSIGN_OR_RETURN(const DeviceBuffer<float> result,
                              device_->NewBuffer<float>(out.size()));
  const int count = static_cast<int>(out.size());
  const Activations row =
      LayOutActivations(result.data(), ActivationForm::kFloat, /*rows=*/1, count);
  STAGECOACH_RETURN_IF_ERROR(LaunchOp(
      [&] { return LaunchSwiGlu(gates.data(), ups.data(), count, row, device_->compute()); }));
  return ToHost(result, out);
}

absl::Status CudaBackend::Attention(const ModelParams& params, std::span<const float> q,
                                    std::span<const float> k, std::span<const float> v, KvCache& kv,
                                    int kv_layer, const StepBatch& batch, std::span<float> out) {
  STAGECOACH_RETURN_IF_ERROR(device_->MakeCurrent());
  const KvLayout layout = Own(kv).layer(kv_layer);
  size_t blocks = 0;
  int last_position = 0;
  for (const BatchSequence& sequence : batch.sequences) {
    blocks += sequence.blocks.size();
    last_position = std::max(last_position, sequence.start_position + sequence.row_count - 1);
  }
  STAGECOACH_ASSIGN_OR_RETURN(
      StepInputs inputs,
      StepInputs::Create(*device_, batch.rows, RowsPerQueryTile(params.heads / params.kv_heads),
                         blocks));
  bool moved = false;
  STAGECOACH_RETURN_IF_ERROR(inputs.SetBatch(batch, /*turns=*/{}, /*taken=*/{}, &moved));
  STAGECOACH_ASSIGN_OR_RETURN(const DeviceBuffer<float> queries, ToDevice(q));
  STAGECOACH_ASSIGN_OR_RETURN(const DeviceBuffer<float> keys, ToDevice(k));
  STAGECOACH_ASSIGN_OR_RETURN(const DeviceBuffer<float> values, ToDevice(v));
  STAGECOACH_ASSIGN_OR_RETURN(const DeviceBuffer<float> result,
                              device_->NewBuffer<float>(out.size()));
  const AttentionPlan plan =
      PlanAttention({.rows = batch.rows,
                     .sequences = static_cast<int>(batch.sequences.size()),
                     .tiles = inputs.tiles(),
                     .last_position = last_position},
                    params.heads, layout, device_->traits(), /*scratch_floats=*/SIZE_MAX);
  const bool needs_scratch = plan.merge == AttentionPlan::Merge::kScratch;
  STAGECOACH_ASSIGN_OR_RETURN(
      const DeviceBuffer<float> scratch,
      device_->NewBuffer<float>(
          needs_scratch ? PartialFloats(plan.rows, plan.heads, plan.chunks, params.value_length)
                        : 0));
  const AttentionInputs in = {.q = queries.data(), .k = keys.data(), .v = values.data()};
  const Activations attended = LayOutActivations(result.data(), ActivationForm::kFloat, batch.rows,
                                                 params.heads * params.value_length);
  STAGECOACH_RETURN_IF_ERROR(LaunchOp([&] {
    return StoreAndAttend(plan, inputs.table(), in, layout, scratch.data(), attended,
                          device_->compute());
  }));
  return ToHost(result, out);
}

}  // namespace
}  // namespace cuda

absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(const CudaOptions& options) {
  if (options.on_device_fault) cuda::SetDeviceFaultHandler(options.on_device_fault);
  STAGECOACH_ASSIGN_OR_RETURN(std::unique_ptr<cuda::CudaDevice> device,
                              cuda::CudaDevice::Open(options.device));
  STAGECOACH_ASSIGN_OR_RETURN(std::unique_ptr<cuda::Uploader> uploader,
                              cuda::Uploader::Create(*device));
  return std::make_unique<cuda::CudaBackend>(std::move(device), std::move(uploader),
                                             options.graphs);
}

absl::StatusOr<double> MeasureCudaReadBandwidth(Backend& backend) {
  return cuda::MeasureReadBandwidth(static_cast<cuda::CudaBackend&>(backend).device());
}

absl::StatusOr<double> MeasureCudaCopyRate(Backend& backend) {
  return static_cast<cuda::CudaBackend&>(backend).MeasureCopyRate();
}

absl::StatusOr<CudaTensorPeaks> MeasureCudaTensorPeaks(Backend& backend) {
  const cuda::CudaDevice& device = static_cast<cuda::CudaBackend&>(backend).device();
  CudaTensorPeaks peaks;
  STAGECOACH_ASSIGN_OR_RETURN(peaks.int8, MeasureTensorPeak(device, cuda::PeakInput::kInt8));
  STAGECOACH_ASSIGN_OR_RETURN(peaks.half, MeasureTensorPeak(device, cuda::PeakInput::kHalf));
  return peaks;
}

}  // namespace stagecoach
