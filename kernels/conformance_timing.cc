#include <algorithm>
#include <chrono>
#include <functional>
#include <memory>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "fmt/format.h"
#include "kernels/conformance.h"
#include "kernels/random_tensor.h"
#include "model/status_macros.h"

namespace stagecoach {
namespace {

// Holds weights and buffers; each call is one run of the case.
using PreparedRun = std::function<absl::Status()>;

struct TimedCase {
  std::string name;
  uint64_t bytes;
  uint64_t flops;
  std::function<absl::StatusOr<PreparedRun>(Backend&)> prepare;
};

uint64_t MatrixBytes(TensorType type, uint64_t rows, uint64_t columns) {
  const TensorTypeInfo& info = GetTensorTypeInfo(type);
  return rows * (columns / info.block_elements) * info.block_bytes;
}

// Everything that a run uses; shared by the copies of its std::function.
struct RunState {
  ModelParams params;
  std::unique_ptr<UnitWeights> weights;
  std::unique_ptr<Workspace> workspace;
  std::unique_ptr<KvCache> kv;
  std::vector<float> residual, output, logits;
  std::vector<int32_t> rows;
  std::vector<std::vector<int32_t>> blocks;
  std::vector<BatchSequence> sequences;
};

// --- One product of prepared weights, as the output head: norm and n x k matrix.

constexpr int kMatMulN = 4096;
constexpr int kMatMulK = 4096;

absl::StatusOr<PreparedRun> PrepareMatMul(Backend& backend, TensorType type, int rows) {
  auto state = std::make_shared<RunState>();
  ModelParams& params = state->params;
  params.d_model = kMatMulK;
  params.vocab_size = kMatMulN;
  params.layers = params.heads = params.kv_heads = 1;
  params.key_length = params.value_length = params.rope_dims = 64;
  params.ffn_length = 256;
  params.norm_epsilon = 1e-5f;
  RandomSource random(1);
  STAGECOACH_ASSIGN_OR_RETURN(
      state->weights,
      BuildUnit(backend, params,
                MakeRandomUnit(random, params, {Unit::Kind::kHead}, type, /*biases=*/false)));
  STAGECOACH_ASSIGN_OR_RETURN(state->workspace, backend.NewWorkspace(params, rows));
  state->residual = RandomFloats(random, static_cast<size_t>(rows) * kMatMulK);
  state->logits.resize(static_cast<size_t>(rows) * kMatMulN);
  state->rows.resize(rows);
  std::iota(state->rows.begin(), state->rows.end(), 0);
  STAGECOACH_RETURN_IF_ERROR(backend.SetResidual(*state->workspace, state->residual));
  return PreparedRun([state, &backend] {
    return backend.Head(*state->workspace, *state->weights, state->rows, state->logits);
  });
}

// --- One layer of a model of about one thousand million parameters: decode steps of several
// sequences, or one chunk of a prompt.

ModelParams LayerParams() {
  ModelParams params;
  params.layers = 1;
  params.d_model = 2048;
  params.heads = 32;
  params.kv_heads = 4;
  params.key_length = params.value_length = params.rope_dims = 64;
  params.ffn_length = 5632;
  params.vocab_size = 32000;
  params.norm_epsilon = 1e-5f;
  return params;
}

struct LayerStep {
  int sequences;
  int rows;   // of each sequence
  int prior;  // positions already in the KV
};

uint64_t LayerElements(const ModelParams& p) {
  const uint64_t attention = uint64_t(p.d_model) * p.heads * (p.key_length + p.value_length) +
                             uint64_t(p.d_model) * p.kv_heads * (p.key_length + p.value_length);
  return attention + 3 * uint64_t(p.d_model) * p.ffn_length;
}

absl::StatusOr<PreparedRun> PrepareLayer(Backend& backend, TensorType type, LayerStep step) {
  auto state = std::make_shared<RunState>();
  state->params = LayerParams();
  const int rows = step.sequences * step.rows;
  RandomSource random(2);
  STAGECOACH_ASSIGN_OR_RETURN(
      state->weights,
      BuildUnit(backend, state->params,
                MakeRandomUnit(random, state->params, {Unit::Kind::kLayer}, type, false)));
  STAGECOACH_ASSIGN_OR_RETURN(state->workspace, backend.NewWorkspace(state->params, rows));
  const int blocks_each = (step.prior + step.rows + kKvBlockPositions - 1) / kKvBlockPositions;
  STAGECOACH_ASSIGN_OR_RETURN(state->kv,
                              backend.NewKvCache({.layers = 1,
                                                  .kv_heads = state->params.kv_heads,
                                                  .key_length = state->params.key_length,
                                                  .value_length = state->params.value_length,
                                                  .blocks = step.sequences * blocks_each}));
  for (int i = 0; i < step.sequences; ++i) {
    state->blocks.emplace_back(blocks_each);
    std::iota(state->blocks[i].begin(), state->blocks[i].end(), i * blocks_each);
  }
  for (int i = 0; i < step.sequences; ++i) {
    state->sequences.push_back({.first_row = i * step.rows,
                                .row_count = step.rows,
                                .start_position = step.prior,
                                .blocks = state->blocks[i]});
  }
  state->residual = RandomFloats(random, static_cast<size_t>(rows) * state->params.d_model);
  state->output.resize(state->residual.size());
  return PreparedRun([state, &backend, rows]() -> absl::Status {
    // The layer adds to the residual stream, which would grow without bound over many runs.
    STAGECOACH_RETURN_IF_ERROR(backend.SetResidual(*state->workspace, state->residual));
    STAGECOACH_RETURN_IF_ERROR(backend.RunLayer(*state->workspace, *state->weights, *state->kv, 0,
                                                {.sequences = state->sequences, .rows = rows}));
    return backend.GetResidual(*state->workspace, state->output);
  });
}

std::vector<TimedCase> TimedCases() {
  std::vector<TimedCase> cases;
  for (const TensorTypeInfo& info : AllTensorTypes()) {
    for (const int rows : {1, 2, 4, 8, 16, 32, 128}) {
      cases.push_back(
          {.name = fmt::format("MatMul/{}/n={},k={}/rows={}", info.name, kMatMulN, kMatMulK, rows),
           .bytes = MatrixBytes(info.type, kMatMulN, kMatMulK),
           .flops = uint64_t{2} * kMatMulN * kMatMulK * rows,
           .prepare = [type = info.type, rows](Backend& backend) {
             return PrepareMatMul(backend, type, rows);
           }});
    }
  }
  const ModelParams params = LayerParams();
  for (const TensorType type : {TensorType::kQ4_K, TensorType::kQ8_0, TensorType::kF16}) {
    for (const LayerStep step : {LayerStep{1, 1, 0}, LayerStep{1, 1, 2048}, LayerStep{8, 1, 512},
                                 LayerStep{32, 1, 512}, LayerStep{1, 128, 0}}) {
      const uint64_t rows = uint64_t(step.sequences) * step.rows;
      const uint64_t kv_row = uint64_t(params.kv_heads) * (params.key_length + params.value_length);
      cases.push_back(
          {.name = fmt::format("Layer/{}/sequences={},rows={},prior={}",
                               GetTensorTypeInfo(type).name, step.sequences, step.rows, step.prior),
           .bytes = MatrixBytes(type, 1, LayerElements(params)) +
                    step.sequences * (step.prior + step.rows) * kv_row * 2,
           .flops = 2 * LayerElements(params) * rows,
           .prepare = [type, step](Backend& backend) {
             return PrepareLayer(backend, type, step);
           }});
    }
  }
  return cases;
}

absl::StatusOr<double> MedianSeconds(const PreparedRun& run, double at_least) {
  using Clock = std::chrono::steady_clock;
  STAGECOACH_RETURN_IF_ERROR(run());  // warm-up
  std::vector<double> seconds;
  const Clock::time_point start = Clock::now();
  double elapsed = 0;
  do {
    const Clock::time_point before = Clock::now();
    STAGECOACH_RETURN_IF_ERROR(run());
    const Clock::time_point after = Clock::now();
    seconds.push_back(std::chrono::duration<double>(after - before).count());
    elapsed = std::chrono::duration<double>(after - start).count();
  } while (elapsed < at_least);
  const auto middle = seconds.begin() + static_cast<ptrdiff_t>(seconds.size() / 2);
  std::nth_element(seconds.begin(), middle, seconds.end());
  return *middle;
}

}  // namespace

std::vector<TimingResult> TimeConformance(Backend& backend, const TimingOptions& options) {
  std::vector<TimingResult> results;
  for (const TimedCase& test : TimedCases()) {
    if (test.name.find(options.filter) == std::string::npos) continue;
    TimingResult result{.name = test.name, .bytes = test.bytes, .flops = test.flops};
    const auto timed = [&]() -> absl::StatusOr<double> {
      STAGECOACH_ASSIGN_OR_RETURN(const PreparedRun run, test.prepare(backend));
      return MedianSeconds(run, options.seconds_per_case);
    }();
    if (timed.ok()) {
      result.seconds = *timed;
    } else {
      result.error = timed.status().ToString();
    }
    results.push_back(std::move(result));
  }
  return results;
}

}  // namespace stagecoach
