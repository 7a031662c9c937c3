// The seam between the pipeline and a device. A backend keeps weights in its own layout, owns KV
// caches and workspaces, and runs whole layers, so that it may fuse operations and capture graphs.
//
// Numerics contract (every backend): the bits of a row's result depend on the model file, the
// backend kind, its kernel revision and the tokens up to that row's position; never on the other
// rows of the batch, the chunking, the thread count or the stage split. Hence every sum over
// columns has an order fixed by the weight's shape alone, and attention walks the KV in tiles of
// whole blocks, merged in order.
#ifndef STAGECOACH_KERNELS_BACKEND_H_
#define STAGECOACH_KERNELS_BACKEND_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/host_memory.h"
#include "kernels/op_timer.h"
#include "kernels/sampling.h"
#include "kernels/weight_bounds.h"
#include "model/model_file.h"

namespace stagecoach {

// Positions in one KV block, and in one tile of attention.
inline constexpr int kKvBlockPositions = 32;
// Blocks that hold `positions` positions.
constexpr int KvBlocksFor(int positions) {
  return (positions + kKvBlockPositions - 1) / kKvBlockPositions;
}

struct BackendInfo {
  std::string kind;             // "cpu", "cuda", "reference"
  std::string kernel_revision;  // changes whenever result bits may change
  std::string description;      // "AVX2, 2 threads"
  uint64_t memory_bytes = 0;    // usable for weights, KV and workspace together
  std::string device_uuid;      // of a GPU; the same in every process that uses it
  bool own_memory = false;      // apart from the host's: buffers of the host take nothing of it
};

// Parts of a tensor begin at rows that are multiples of this.
inline constexpr int kPartRows = 128;
// A builder of a backend with own_memory holds the memory of so many parts at most.
inline constexpr int kHeldParts = 2;

// Whole rows of a tensor, as in the file.
struct TensorPart {
  uint64_t first_row = 0;
  std::span<const std::byte> raw;
  bool checked = false;  // its weights are known to be finite and within Backend::BoundsOf
  // What `raw` lies in. Null: `raw` is needed only during the call.
  std::shared_ptr<const HostMemory> memory;
};

// What has come into a backend's own memory from the host's.
struct UploadStats {
  uint64_t bytes = 0;
  double busy_seconds = 0;  // during which the device was copying
};

// kQ8_0: runs of 32 values of one head at one position (the last run may be shorter) as int8 with a
// half scale each: value = scale * quant.
enum class KvType { kF16, kF32, kQ8_0 };

// The KV of one stage: `blocks` blocks of kKvBlockPositions positions in each of `layers` layers.
struct KvShape {
  int layers = 0;
  int kv_heads = 0;
  int key_length = 0;
  int value_length = 0;
  int blocks = 0;
  KvType type = KvType::kF16;
};
uint64_t KvBytes(const KvShape& shape);  // checked: saturates at UINT64_MAX
// Keys and values of one position in one layer.
uint64_t KvPositionBytes(KvType type, int kv_heads, int key_length, int value_length);

struct KvBlockCopy {
  int32_t from = 0;
  int32_t to = 0;
};

class KvCache {
 public:
  virtual ~KvCache() = default;
};

// The weights of one unit in the backend's layout. Immutable; usable from any thread.
class UnitWeights {
 public:
  virtual ~UnitWeights() = default;
  virtual uint64_t bytes() const = 0;  // held in the backend's memory
};

// Takes the tensors of one unit in file order of use and makes UnitWeights. Not thread-safe; one
// builder per unit, builders of different units may work at the same time.
class UnitBuilder {
 public:
  virtual ~UnitBuilder() = default;
  // The parts of one tensor come in the order of its rows, all before another tensor's. The memory
  // of a part may be held on to by backends with own_memory, until kHeldParts further ones have
  // come, or Finish returns, or the builder is destroyed; it is let go only inside of these calls.
  // Errors: kCorrupt for non-finite block scales, kUnsupported for weights out of bounds,
  // RESOURCE_EXHAUSTED.
  virtual absl::Status AddPart(TensorRole role, const TensorInfo& tensor,
                               const TensorPart& part) = 0;
  // A whole tensor; `raw` is needed only during the call.
  absl::Status Add(TensorRole role, const TensorInfo& tensor, std::span<const std::byte> raw) {
    return AddPart(role, tensor, {.raw = raw});
  }
  // All of the unit's tensors have been added. Call once.
  virtual absl::StatusOr<std::unique_ptr<UnitWeights>> Finish() = 0;
};

// Rows of one sequence within a step.
struct BatchSequence {
  int first_row = 0;       // rows [first_row, first_row + row_count) of the activation matrix
  int row_count = 0;       // >= 1
  int start_position = 0;  // position of the first row = positions already in the KV
  // KV block of positions 32*i ..; covers all rows. Sequences may share blocks that none of them
  // writes in this step.
  std::span<const int32_t> blocks;
};

struct StepBatch {
  std::span<const BatchSequence> sequences;  // disjoint, in row order, covering [0, rows)
  int rows = 0;
};

// Residual stream and scratch of one stage. One step at a time.
class Workspace {
 public:
  virtual ~Workspace() = default;
};

// Steps of a workspace whose ends were enqueued and not awaited yet.
inline constexpr int kStepsInFlight = 2;

// Where a workspace's residual stream lies, for transports that move it without the host.
struct ResidualMemory {
  float* data = nullptr;   // [max_rows][d_model]; stays as long as the workspace. Null: not offered
  void* stream = nullptr;  // the cudaStream_t of the workspace's work; null: the host's memory
  // Any thread sets it to 1 when rows that are to be taken (TakeResidual) will not be what they
  // should: no row of such a step that begins on the device after that is finite. Null: not
  // offered.
  std::atomic<uint32_t>* spoiled = nullptr;
  int device = 0;  // CUDA index
};

// All calls on one Workspace come from one thread at a time. Sizes are checked by the caller
// (Stage); a mismatch there is our own bug. Errors: RESOURCE_EXHAUSTED, INTERNAL for device faults.
class Backend {
 public:
  virtual ~Backend() = default;
  virtual BackendInfo info() const = 0;

  // Refuses at load what could not run: kUnsupportedType / kBadShape naming the tensor.
  virtual absl::Status CheckTensor(TensorRole role, const TensorInfo& tensor) const = 0;
  // What weights of that type must keep to.
  virtual WeightBounds BoundsOf(TensorType) const { return {}; }
  // What the tensor will add to UnitWeights::bytes(); by default its bytes in the file.
  virtual uint64_t ResidentBytes(TensorRole role, const TensorInfo& tensor) const;
  virtual std::unique_ptr<UnitBuilder> NewUnitBuilder(const ModelParams& params,
                                                      const Unit& unit) = 0;
  // Memory for parts, direct if the backend knows such memory; by default ordinary pages. Must not
  // be asked for in a step. RESOURCE_EXHAUSTED: NewPageMemory may still have some.
  virtual absl::StatusOr<std::shared_ptr<HostMemory>> NewHostMemory(size_t bytes);
  virtual UploadStats uploads() const { return {}; }
  virtual absl::StatusOr<std::unique_ptr<KvCache>> NewKvCache(const KvShape& shape) = 0;
  virtual absl::StatusOr<std::unique_ptr<Workspace>> NewWorkspace(const ModelParams& params,
                                                                  int max_rows) = 0;

  // --- One step of a stage: Embed or SetResidual, RunLayer for each layer, all with the same
  // batch, then GetResidual, Head, ... or an Enqueue...; a backend may put its work off until then.
  // The residual stream is float32 [rows][d_model]. A token id may be PickOf a draw of the latest
  // EnqueuePicks; any token if nothing was picked.
  virtual absl::Status Embed(Workspace& workspace, const UnitWeights& embedding,
                             std::span<const int32_t> token_ids) = 0;
  virtual absl::Status SetResidual(Workspace& workspace, std::span<const float> residual) = 0;
  // kv_layer: index of this layer within the stage's KvCache.
  virtual absl::Status RunLayer(Workspace& workspace, const UnitWeights& layer, KvCache& kv,
                                int kv_layer, const StepBatch& batch) = 0;
  virtual absl::Status GetResidual(Workspace& workspace, std::span<float> residual) = 0;
  // Instead of SetResidual and GetResidual, where residual_memory().data is not null: the rows lie
  // there already, or will when the stream comes to what is put into it from now on; or they stay
  // there, all work on them has ended, and finite[row] is whether all values of the row are finite.
  virtual ResidualMemory residual_memory(Workspace&) { return {}; }
  virtual absl::Status TakeResidual(Workspace& workspace, int rows);
  virtual absl::Status LeaveResidual(Workspace& workspace, std::span<uint8_t> finite);
  // logits: [rows.size()][vocab], for the residual rows named in `rows`.
  virtual absl::Status Head(Workspace& workspace, const UnitWeights& head,
                            std::span<const int32_t> rows, std::span<float> logits) = 0;
  // Optional, for devices from which all logits are dear: the `count` best of each row instead, 1
  // to MaxTopLogits() of them (0: not offered), at most the vocabulary. top: [rows.size()][count],
  // as SampleFromTop wants them. totals: empty, or [rows.size()], as SampleFromBest wants them.
  virtual int MaxTopLogits() const { return 0; }
  virtual absl::Status HeadTop(Workspace& workspace, const UnitWeights& head,
                               std::span<const int32_t> rows, int count, std::span<TopLogit> top,
                               std::span<uint64_t> totals);
  // Optional, too: what the rows' draws choose. tokens: [rows.size()]; -1 if a logit of the row is
  // not finite.
  virtual bool DrawsTokens() const { return false; }
  virtual absl::Status HeadDraw(Workspace& workspace, const UnitWeights& head,
                                std::span<const int32_t> rows, std::span<const TokenDraw> draws,
                                std::span<int32_t> tokens);

  // Optional, too: the end of a step, in place of those above, that is not waited for, so that the
  // next step is with the device when this one ends. At most kStepsInFlight steps may be enqueued
  // and not awaited; they are awaited in order.
  // Rows that EnqueuePicks takes at most. 0: no such end is offered; else EnqueueResidual is, too,
  // where residual_memory has a stream.
  virtual int MaxPicks() const { return 0; }
  // What their draws pick, for rows that come each once and in order.
  virtual absl::Status EnqueuePicks(Workspace& workspace, const UnitWeights& head,
                                    std::span<const int32_t> rows,
                                    std::span<const TokenDraw> draws);
  // As LeaveResidual: the rows lie there when the stream comes to what is put into it after this.
  virtual absl::Status EnqueueResidual(Workspace& workspace);
  // Whether AwaitEnd would return at once.
  virtual bool EndReady(Workspace& workspace);
  // tokens: as many as the draws, as HeadDraw; finite: for each row of the step, as LeaveResidual.
  virtual absl::Status AwaitEnd(Workspace& workspace, std::span<int32_t> tokens,
                                std::span<uint8_t> finite);

  // --- KV between steps, all layers of the cache, ordered with the steps around them.
  // Keys and values of each `from` to its `to`, bit for bit. No `to` occurs twice or as a `from`.
  virtual absl::Status CopyKvBlocks(KvCache& kv, std::span<const KvBlockCopy> copies) = 0;
  // All keys and values of the blocks become zero: what is not finite must not stay, for kernels
  // may read a tile's unused positions and multiply them by zero.
  virtual absl::Status ClearKvBlocks(KvCache& kv, std::span<const int32_t> blocks) = 0;

  // --- Single operations, for the conformance suite and `bench kernels`. Host memory in and out.
  // While `timer` is not null, each of them repeats its kernels on what it was given until the
  // timer has enough: from cold caches, without copies, repacking and the conversion of a product's
  // activations. What comes out is then unspecified. UNIMPLEMENTED where this is not offered.
  virtual absl::Status SetOpTimer(OpTimer* timer);
  // y[rows][n] = x[rows][k] * w[n][k]^T.
  virtual absl::Status MatMul(const TensorInfo& tensor, std::span<const std::byte> raw,
                              std::span<const float> x, int rows, std::span<float> y) = 0;
  virtual absl::Status RmsNorm(std::span<const float> x, int rows, std::span<const float> weight,
                               float epsilon, std::span<float> y) = 0;
  // x: [rows][heads][head_dim], rotated in place at positions[row]; pairs (2i, 2i+1) of the first
  // params.rope_dims dims, as the `llama` architecture stores them.
  virtual absl::Status Rope(const ModelParams& params, std::span<float> x, int heads, int head_dim,
                            std::span<const int32_t> positions) = 0;
  // out = silu(gate) * up, elementwise.
  virtual absl::Status SwiGlu(std::span<const float> gate, std::span<const float> up,
                              std::span<float> out) = 0;
  // Causal attention of one step after storing its keys and values:
  // q [rows][heads][key_length], k [rows][kv_heads][key_length], v [rows][kv_heads][value_length],
  // out [rows][heads][value_length]; scale 1/sqrt(key_length).
  virtual absl::Status Attention(const ModelParams& params, std::span<const float> q,
                                 std::span<const float> k, std::span<const float> v, KvCache& kv,
                                 int kv_layer, const StepBatch& batch, std::span<float> out) = 0;
};

// False if any value is NaN or infinite.
bool AllFinite(std::span<const float> values);

}  // namespace stagecoach

#endif  // STAGECOACH_KERNELS_BACKEND_H_
