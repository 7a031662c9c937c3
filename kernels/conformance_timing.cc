#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "fmt/format.h"
#include "kernels/compare.h"
#include "kernels/conformance.h"
#include "kernels/conformance_case.h"
#include "kernels/op_timer.h"
#include "kernels/random_tensor.h"
#include "kernels/reference/reference_backend.h"
#include "model/status_macros.h"

namespace stagecoach {
namespace {

// One operation with its inputs. `run` is what the backend is asked, `expected` what it must answer
// within `tolerance`.
struct TimedCase {
  TimingResult result;  // what is known before
  ConformanceRun run;
  std::function<absl::StatusOr<std::vector<float>>()> expected;
  double tolerance = 0;
  double typical = 0;
};

constexpr double kElementwiseTolerance = 1e-5;  // sums of thousands, elsewhere than in the table

std::vector<float> Unwritten(size_t count) {
  return std::vector<float>(count, std::numeric_limits<float>::quiet_NaN());
}

class Timing {
 public:
  Timing(Backend& backend, const TimingOptions& options,
         const std::function<void(const TimingResult&)>& consume)
      : backend_(backend), options_(options), consume_(consume) {}

  void MatMul(TensorType type, const MatrixShape& shape);
  void RmsNorm(int columns, int rows);
  void SwiGlu(int columns, int rows);
  void Rope(int heads, int head_dim, int rows);
  void Attention(KvType type, int sequences, int rows, int prior);

  bool Wants(const std::string& op) const { return op.find(options_.filter) != std::string::npos; }
  bool WantsType(std::string_view type) const {
    return options_.types.empty() ||
           std::ranges::find(options_.types, type) != options_.types.end();
  }

 private:
  void Finish(TimedCase test);
  absl::Status Check(const TimedCase& test);
  // What the reference says to the same question.
  std::function<absl::StatusOr<std::vector<float>>()> Reference(const ConformanceRun& run) {
    return [this, run] { return run(*reference_); };
  }

  Backend& backend_;
  const TimingOptions& options_;
  const std::function<void(const TimingResult&)>& consume_;
  const std::unique_ptr<Backend> reference_ = MakeReferenceBackend();
};

absl::Status Timing::Check(const TimedCase& test) {
  STAGECOACH_ASSIGN_OR_RETURN(const std::vector<float> actual, test.run(backend_));
  STAGECOACH_ASSIGN_OR_RETURN(const std::vector<float> expected, test.expected());
  const Comparison comparison = Compare(actual, expected, test.typical);
  if (comparison.Within(test.tolerance)) return absl::OkStatus();
  return absl::DataLossError(
      fmt::format("WRONG: {}; tolerance {:.1e}", ToString(comparison), test.tolerance));
}

void Timing::Finish(TimedCase test) {
  TimingResult& result = test.result;
  absl::Status status = Check(test);
  if (status.ok()) {
    OpTimer timer(options_.seconds_per_case);
    status = backend_.SetOpTimer(&timer);
    if (status.ok()) status = test.run(backend_).status();
    backend_.SetOpTimer(nullptr).IgnoreError();
    result.seconds = timer.MedianSeconds();
  }
  if (!status.ok()) result.error = std::string(status.message());
  consume_(result);
}

// The rows of the activations repeat, so that the reference need not compute all of them.
constexpr int kOwnRows = 3;

void Timing::MatMul(TensorType type, const MatrixShape& shape) {
  const TensorTypeInfo& info = GetTensorTypeInfo(type);
  RandomSource random(static_cast<uint64_t>(type) + 1);
  const RandomTensor weight =
      MakeRandomMatrix(random, "weight", type, shape.n, shape.k, 1 / std::sqrt(shape.k));
  const std::vector<float> own = RandomFloats(random, size_t{kOwnRows} * shape.k);
  std::vector<float> own_y = Unwritten(size_t{kOwnRows} * shape.n);
  const absl::Status known = reference_->MatMul(weight.info, weight.raw, own, kOwnRows, own_y);
  for (const int rows : options_.rows) {
    const auto repeat = [rows](const std::vector<float>& of, int columns) {
      std::vector<float> all(static_cast<size_t>(rows) * columns);
      for (size_t i = 0; i < all.size(); ++i) all[i] = of[i % of.size()];
      return all;
    };
    const std::vector<float> x = repeat(own, shape.k);
    TimedCase test;
    test.result = {.op = "MatMul",
                   .type = std::string(info.name),
                   .shape = fmt::format("n={} k={}", shape.n, shape.k),
                   .rows = rows,
                   .bytes = backend_.ResidentBytes(TensorRole::kOutput, weight.info),
                   .flops = uint64_t{2} * shape.n * shape.k * rows,
                   .int8 = info.block_elements > 1};
    test.run = [&](Backend& backend) -> absl::StatusOr<std::vector<float>> {
      std::vector<float> y = Unwritten(static_cast<size_t>(rows) * shape.n);
      STAGECOACH_RETURN_IF_ERROR(backend.MatMul(weight.info, weight.raw, x, rows, y));
      return y;
    };
    test.expected = [&]() -> absl::StatusOr<std::vector<float>> {
      if (!known.ok()) return known;
      return repeat(own_y, shape.n);
    };
    test.tolerance = MatMulTolerance(type);
    test.typical = 1;
    Finish(std::move(test));
  }
}

void Timing::RmsNorm(int columns, int rows) {
  RandomSource random(1);
  const size_t count = static_cast<size_t>(rows) * columns;
  const std::vector<float> weight = RandomFloats(random, columns), x = RandomFloats(random, count);
  TimedCase test;
  test.result = {.op = "RmsNorm",
                 .shape = fmt::format("columns={}", columns),
                 .rows = rows,
                 .bytes = (2 * count + columns) * sizeof(float)};
  test.run = [&](Backend& backend) -> absl::StatusOr<std::vector<float>> {
    std::vector<float> y = Unwritten(count);
    STAGECOACH_RETURN_IF_ERROR(backend.RmsNorm(x, rows, weight, 1e-5f, y));
    return y;
  };
  test.expected = Reference(test.run);
  test.tolerance = kElementwiseTolerance;
  Finish(std::move(test));
}

void Timing::SwiGlu(int columns, int rows) {
  RandomSource random(1);
  const size_t count = static_cast<size_t>(rows) * columns;
  const std::vector<float> gate = RandomFloats(random, count), up = RandomFloats(random, count);
  TimedCase test;
  test.result = {.op = "SwiGlu",
                 .shape = fmt::format("columns={}", columns),
                 .rows = rows,
                 .bytes = 3 * count * sizeof(float)};
  test.run = [&](Backend& backend) -> absl::StatusOr<std::vector<float>> {
    std::vector<float> out = Unwritten(count);
    STAGECOACH_RETURN_IF_ERROR(backend.SwiGlu(gate, up, out));
    return out;
  };
  test.expected = Reference(test.run);
  test.tolerance = kElementwiseTolerance;
  Finish(std::move(test));
}

void Timing::Rope(int heads, int head_dim, int rows) {
  RandomSource random(1);
  const size_t count = static_cast<size_t>(rows) * heads * head_dim;
  const std::vector<float> before = RandomFloats(random, count);
  ModelParams params;
  params.heads = params.kv_heads = heads;
  params.key_length = params.value_length = params.rope_dims = head_dim;
  params.rope_freq_base = 500000;
  params.rope_freq_scale = 1;
  std::vector<int32_t> positions(rows);
  for (int i = 0; i < rows; ++i) positions[i] = i * 7;
  TimedCase test;
  test.result = {.op = "Rope",
                 .shape = fmt::format("heads={} dim={}", heads, head_dim),
                 .rows = rows,
                 .bytes = 2 * count * sizeof(float)};
  test.run = [&](Backend& backend) -> absl::StatusOr<std::vector<float>> {
    std::vector<float> x = before;
    STAGECOACH_RETURN_IF_ERROR(backend.Rope(params, x, heads, head_dim, positions));
    return x;
  };
  test.expected = Reference(test.run);
  test.tolerance = kElementwiseTolerance;
  Finish(std::move(test));
}

// --- Attention of heads as in Llama-3-8B.

ModelParams AttentionParams() {
  ModelParams params;
  params.heads = 32;
  params.kv_heads = 8;
  params.key_length = params.value_length = params.rope_dims = 128;
  params.d_model = params.heads * params.value_length;
  return params;
}

// Keys and values of a few blocks are stored, and copied to all others: attention itself would
// take the reference too long over a long context.
constexpr int kStoredBlocks = 3;

void Timing::Attention(KvType type, int sequences, int rows, int prior) {
  const ModelParams params = AttentionParams();
  const int all_rows = sequences * rows;
  const size_t query = size_t(params.heads) * params.key_length;
  const size_t key = size_t(params.kv_heads) * params.key_length;
  const int blocks_each = KvBlocksFor(prior + rows);
  const int stored_rows = std::min(kStoredBlocks, blocks_each) * kKvBlockPositions;
  RandomSource random(1);
  const size_t most = std::max(all_rows, stored_rows);
  const std::vector<float> q = RandomFloats(random, most * query),
                           k = RandomFloats(random, most * key),
                           v = RandomFloats(random, most * key);
  std::vector<int32_t> blocks(static_cast<size_t>(sequences) * blocks_each);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<int32_t>(i);
  std::vector<BatchSequence> batch;
  for (int i = 0; i < sequences; ++i) {
    batch.push_back({.first_row = i * rows,
                     .row_count = rows,
                     .start_position = prior,
                     .blocks = std::span(blocks).subspan(size_t(i) * blocks_each, blocks_each)});
  }
  const KvShape shape = {.layers = 1,
                         .kv_heads = params.kv_heads,
                         .key_length = params.key_length,
                         .value_length = params.value_length,
                         .blocks = static_cast<int>(blocks.size()),
                         .type = type};
  const auto prepare = [&](Backend& backend) -> absl::StatusOr<std::unique_ptr<KvCache>> {
    STAGECOACH_ASSIGN_OR_RETURN(std::unique_ptr<KvCache> kv, backend.NewKvCache(shape));
    const BatchSequence first = {.row_count = stored_rows, .blocks = batch[0].blocks};
    std::vector<float> out = Unwritten(stored_rows * query);
    STAGECOACH_RETURN_IF_ERROR(backend.Attention(
        params, std::span(q).first(stored_rows * query), std::span(k).first(stored_rows * key),
        std::span(v).first(stored_rows * key), *kv, 0,
        {.sequences = {&first, 1}, .rows = stored_rows}, out));
    std::vector<KvBlockCopy> copies;
    for (int i = kStoredBlocks; i < shape.blocks; ++i) copies.push_back({i % kStoredBlocks, i});
    STAGECOACH_RETURN_IF_ERROR(backend.CopyKvBlocks(*kv, copies));
    return kv;
  };
  std::map<Backend*, std::unique_ptr<KvCache>> caches;
  TimedCase test;
  const uint64_t seen = uint64_t(all_rows) * prior + uint64_t(sequences) * rows * (rows + 1) / 2;
  test.result = {
      .op = "Attention",
      .type = KvTypeName(type),
      .shape = fmt::format("{} x {} after {}", sequences, rows, prior),
      .rows = all_rows,
      .bytes = uint64_t(sequences) * (prior + rows) *
               KvPositionBytes(type, params.kv_heads, params.key_length, params.value_length),
      .flops = 2 * seen * params.heads * (params.key_length + params.value_length)};
  test.run = [&](Backend& backend) -> absl::StatusOr<std::vector<float>> {
    std::unique_ptr<KvCache>& kv = caches[&backend];  // there already when the timer is set
    if (kv == nullptr) {
      STAGECOACH_ASSIGN_OR_RETURN(kv, prepare(backend));
    }
    std::vector<float> out = Unwritten(all_rows * query);
    STAGECOACH_RETURN_IF_ERROR(backend.Attention(
        params, std::span(q).first(all_rows * query), std::span(k).first(all_rows * key),
        std::span(v).first(all_rows * key), *kv, 0, {.sequences = batch, .rows = all_rows}, out));
    return out;
  };
  test.expected = Reference(test.run);
  test.tolerance = AttentionTolerance(type);
  Finish(std::move(test));
}

}  // namespace

void TimeConformance(Backend& backend, const TimingOptions& options,
                     const std::function<void(const TimingResult&)>& consume) {
  Timing timing(backend, options, consume);
  for (const TensorTypeInfo& info : AllTensorTypes()) {
    if (!timing.Wants("MatMul") || !timing.WantsType(info.name)) continue;
    for (const MatrixShape& shape : options.shapes) timing.MatMul(info.type, shape);
  }
  for (const int rows : options.rows) {
    if (timing.Wants("RmsNorm")) timing.RmsNorm(4096, rows);
    if (timing.Wants("SwiGlu")) timing.SwiGlu(14336, rows);
    if (timing.Wants("Rope")) timing.Rope(32, 128, rows);
  }
  for (const KvType type : {KvType::kF16, KvType::kF32, KvType::kQ8_0}) {
    if (!timing.Wants("Attention") || !timing.WantsType(KvTypeName(type))) continue;
    for (const int prior : {512, 4096}) timing.Attention(type, 1, 1, prior);
    for (const int sequences : {8, 32}) timing.Attention(type, sequences, 1, 1024);
    timing.Attention(type, 1, 512, 0);
  }
}

}  // namespace stagecoach
