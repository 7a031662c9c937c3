#include "coordinator/planner.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <optional>

#include "absl/status/status.h"
#include "fmt/format.h"

namespace stagecoach {
namespace {

constexpr int kHeadRows = 32;  // rows of logits held at once
// Taken when no worker knows its bandwidth: only ratios matter for the split.
constexpr double kDefaultBytesPerSecond = 10e9;

uint64_t Add(uint64_t a, uint64_t b) {
  uint64_t sum;
  return __builtin_add_overflow(a, b, &sum) ? UINT64_MAX : sum;
}

uint64_t Mul(uint64_t a, uint64_t b) {
  uint64_t product;
  return __builtin_mul_overflow(a, b, &product) ? UINT64_MAX : product;
}

uint64_t WeightBytes(const ModelSizes& sizes, int first, int last) {
  uint64_t bytes = 0;
  for (int layer = first; layer < last; ++layer) bytes = Add(bytes, sizes.layers[layer]);
  if (first == 0) bytes = Add(bytes, sizes.embedding);
  if (last == static_cast<int>(sizes.layers.size())) bytes = Add(bytes, sizes.head);
  return bytes;
}

// Keys and values of one block in one layer.
uint64_t BlockBytes(const ModelSizes& sizes) { return Mul(sizes.kv_position, kKvBlockPositions); }

uint64_t WorkspaceBytes(const ModelSizes& sizes, const PlanLimits& limits, bool has_head) {
  uint64_t bytes = Mul(sizes.workspace_row, limits.max_step_tokens);
  if (has_head) {
    bytes = Add(bytes, Mul(sizes.logits_row, std::min(limits.max_step_tokens, kHeadRows)));
  }
  return bytes;
}

bool IsSpeed(double value) { return std::isfinite(value) && value > 0; }

// Bandwidth of each worker; unknown ones are the mean of the known.
std::vector<double> Bandwidths(const std::vector<WorkerCapacity>& workers) {
  double sum = 0;
  int count = 0;
  for (const WorkerCapacity& worker : workers) {
    if (!IsSpeed(worker.read_bytes_per_second)) continue;
    sum += worker.read_bytes_per_second;
    ++count;
  }
  const double mean = count > 0 ? sum / count : kDefaultBytesPerSecond;
  std::vector<double> result;
  for (const WorkerCapacity& worker : workers) {
    result.push_back(IsSpeed(worker.read_bytes_per_second) ? worker.read_bytes_per_second : mean);
  }
  return result;
}

// Of a stage with `weights` bytes; UINT64_MAX if there is no limit.
uint64_t WeightBudget(const WorkerCapacity& worker, uint64_t weights) {
  uint64_t budget = worker.weight_budget_bytes > 0 ? worker.weight_budget_bytes : UINT64_MAX;
  const double percent = worker.weight_budget_percent;
  if (percent > 0 && percent < 100) {
    budget = std::min(budget, static_cast<uint64_t>(static_cast<double>(weights) * percent / 100));
  }
  return budget;
}

// One planning problem, with prefix sums so that a range costs O(1).
class Problem {
 public:
  Problem(const ModelSizes& sizes, const std::vector<WorkerCapacity>& workers,
          const PlanLimits& limits, int kv_blocks, bool ignore_memory = false)
      : sizes_(sizes),
        workers_(workers),
        bandwidths_(Bandwidths(workers)),
        layers_(static_cast<int>(sizes.layers.size())),
        layer_kv_(Mul(BlockBytes(sizes), kv_blocks)),
        workspace_(WorkspaceBytes(sizes, limits, false)),
        head_workspace_(WorkspaceBytes(sizes, limits, true)),
        ignore_memory_(ignore_memory),
        prefix_(1, 0) {
    for (uint64_t bytes : sizes.layers) {
      prefix_.push_back(Add(prefix_.back(), bytes));
      largest_layer_ = std::max(largest_layer_, bytes);
    }
  }

  // Where each worker's range starts, and `layers` at the end; nullopt if nothing fits.
  std::optional<std::vector<int>> Solve() const {
    const double slowest = FastestSlowestStage();
    if (std::isinf(slowest)) return std::nullopt;
    return MostEqual(slowest);
  }

  // Seconds that one decode row takes on worker `w` with layers [first, last).
  double Seconds(int w, int first, int last) const {
    double bytes = static_cast<double>(prefix_[last] - prefix_[first]);
    if (first == 0) bytes += static_cast<double>(sizes_.embedding_row);
    if (last == layers_) bytes += static_cast<double>(sizes_.head);
    const auto streamed = static_cast<double>(StreamedBytes(w, first, last));
    const double load_rate = workers_[w].load_bytes_per_second;
    return (bytes - std::min(bytes, streamed)) / bandwidths_[w] +
           streamed / (IsSpeed(load_rate) ? load_rate : kDefaultLoadBytesPerSecond) +
           (workers_[w].gpu ? (last - first) * kGpuLayerSeconds : 0);
  }

  // What worker `w` loads anew for every step with layers [first, last): all that does not fit its
  // budget beside the window through which it streams.
  uint64_t StreamedBytes(int w, int first, int last) const {
    const uint64_t weights = Weights(first, last);
    const uint64_t budget = WeightBudget(workers_[w], weights);
    if (weights <= budget) return 0;
    const uint64_t window = WindowBytes(first, last, largest_layer_, 0);
    return weights - (budget - std::min(budget, window));
  }

  // What worker `w` needs for layers [first, last).
  uint64_t Bytes(int w, int first, int last) const {
    const uint64_t weights = Weights(first, last);
    const uint64_t kv = Mul(layer_kv_, last - first);
    return Add(Add(std::min(weights, WeightBudget(workers_[w], weights)), kv),
               last == layers_ ? head_workspace_ : workspace_);
  }

  uint64_t largest_layer() const { return largest_layer_; }

  // Whether the weight budget of worker `w` suffices to stream layers [first, last): whatever of
  // embedding and head stays, and two of the largest of the rest.
  bool CanStream(int w, int first, int last) const {
    const uint64_t weights = Weights(first, last);
    const uint64_t budget = WeightBudget(workers_[w], weights);
    if (weights <= budget) return true;
    const uint64_t embedding = first == 0 ? sizes_.embedding : 0;
    const uint64_t head = last == layers_ ? sizes_.head : 0;
    for (const bool keep_embedding : {true, false}) {
      for (const bool keep_head : {true, false}) {
        const uint64_t kept = Add(keep_embedding ? embedding : 0, keep_head ? head : 0);
        const uint64_t largest =
            std::max({largest_layer_, keep_embedding ? 0 : embedding, keep_head ? 0 : head});
        const uint64_t largest_kept =
            std::max(keep_embedding ? embedding : 0, keep_head ? head : 0);
        if (Add(kept, WindowBytes(first, last, largest, largest_kept)) <= budget) return true;
      }
    }
    return false;
  }

 private:
  static constexpr double kInfinity = std::numeric_limits<double>::infinity();

  // Seconds, or infinity if the range does not fit the worker.
  double Cost(int w, int first, int last) const {
    const bool fits =
        Bytes(w, first, last) <= workers_[w].memory_bytes && CanStream(w, first, last);
    return fits || ignore_memory_ ? Seconds(w, first, last) : kInfinity;
  }

  // What the units of [first, last) stream through if the largest has `largest` bytes: two of them
  // and the buffers of a load, an eighth more because a backend's layout may be larger. A unit that
  // is kept needs a buffer only once.
  uint64_t WindowBytes(int first, int last, uint64_t largest, uint64_t largest_kept) const {
    const uint64_t units = Mul(std::min(2, last - first), largest);
    const uint64_t buffers = largest > largest_layer_ ? largest : sizes_.load_buffers;
    return std::max(Add(Add(units, units / 8), buffers), largest_kept);
  }

  uint64_t Weights(int first, int last) const {
    uint64_t bytes = prefix_[last] - prefix_[first];
    if (first == 0) bytes = Add(bytes, sizes_.embedding);
    if (last == layers_) bytes = Add(bytes, sizes_.head);
    return bytes;
  }

  double FastestSlowestStage() const {
    // best[j]: slowest of the workers so far when they hold layers [0, j).
    std::vector<double> best(layers_ + 1, kInfinity);
    best[0] = 0;
    const int n = static_cast<int>(workers_.size());
    for (int w = 0; w < n; ++w) {
      std::vector<double> next(layers_ + 1, kInfinity);
      const int last_end = layers_ - (n - 1 - w);  // one layer at least for each later worker
      for (int last = w + 1; last <= last_end; ++last) {
        for (int first = w; first < last; ++first) {
          if (std::isinf(best[first])) continue;
          next[last] = std::min(next[last], std::max(best[first], Cost(w, first, last)));
        }
      }
      best = std::move(next);
    }
    return best[layers_];
  }

  // Minimises the sum of squared layer counts among plans with no stage slower than `slowest`.
  std::vector<int> MostEqual(double slowest) const {
    constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
    const int n = static_cast<int>(workers_.size());
    // squares[w][first]: least sum of squares for workers w.. holding layers [first, layers).
    std::vector<std::vector<int64_t>> squares(n + 1, std::vector<int64_t>(layers_ + 1, kNever));
    std::vector<std::vector<int>> end(n, std::vector<int>(layers_ + 1, 0));
    squares[n][layers_] = 0;
    for (int w = n - 1; w >= 0; --w) {
      for (int first = w; first < layers_; ++first) {
        for (int last = first + 1; last <= layers_ - (n - 1 - w); ++last) {
          if (squares[w + 1][last] == kNever || !(Cost(w, first, last) <= slowest)) continue;
          const int64_t count = last - first;
          const int64_t sum = count * count + squares[w + 1][last];
          if (sum > squares[w][first]) continue;  // on a tie the longer range in front wins
          squares[w][first] = sum;
          end[w][first] = last;
        }
      }
    }
    std::vector<int> bounds = {0};
    for (int w = 0; w < n; ++w) bounds.push_back(end[w][bounds.back()]);
    return bounds;
  }

  const ModelSizes& sizes_;
  const std::vector<WorkerCapacity>& workers_;
  const std::vector<double> bandwidths_;
  const int layers_;
  const uint64_t layer_kv_, workspace_, head_workspace_;
  const bool ignore_memory_;
  std::vector<uint64_t> prefix_;  // [layers + 1] bytes of layers [0, i)
  uint64_t largest_layer_ = 0;
};

// The largest value in [1, limit) for which `fits` holds, given that it holds up to some value; 0
// if for none.
template <typename Fits>
int LargestThatFits(int limit, Fits fits) {
  int low = 0, high = limit;  // fits(low) or low == 0; not fits(high)
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    (fits(middle) ? low : high) = middle;
  }
  return low;
}

std::string Mebibytes(uint64_t bytes) {
  return fmt::format("{} bytes ({:.1f} MiB)", bytes, static_cast<double>(bytes) / (1 << 20));
}

std::string WhatWouldHelp(const ModelSizes& sizes, const std::vector<WorkerCapacity>& workers,
                          const PlanLimits& limits, int kv_blocks) {
  const auto fits = [&](int blocks) {
    return Problem(sizes, workers, limits, blocks).Solve().has_value();
  };
  const int blocks = LargestThatFits(kv_blocks, fits);
  if (blocks == 0) {
    return "a smaller KV pool alone is not enough; more workers or more memory per worker help";
  }
  std::string help = fmt::format("it fits with a context of {} positions",
                                 static_cast<int64_t>(blocks) * kKvBlockPositions);
  if (blocks >= KvBlocksPerSequence(limits))
    help = fmt::format("it fits with {} KV blocks", blocks);
  return help + "; more workers, more memory per worker or a smaller --kv-type help too";
}

absl::Status Refusal(const ModelSizes& sizes, const std::vector<WorkerCapacity>& workers,
                     const PlanLimits& limits, int kv_blocks) {
  // What each worker would need if layers were split by speed alone.
  const Problem problem(sizes, workers, limits, kv_blocks, /*ignore_memory=*/true);
  const std::vector<int> bounds = *problem.Solve();
  std::string message = "the model does not fit the workers' memory:";
  uint64_t needed = 0, available = 0;
  for (size_t w = 0; w < workers.size(); ++w) {
    const uint64_t bytes = problem.Bytes(static_cast<int>(w), bounds[w], bounds[w + 1]);
    needed = Add(needed, bytes);
    available = Add(available, workers[w].memory_bytes);
    message +=
        fmt::format(" {} needs {} for layers [{}, {}) and has {};", workers[w].worker,
                    Mebibytes(bytes), bounds[w], bounds[w + 1], Mebibytes(workers[w].memory_bytes));
    if (problem.CanStream(static_cast<int>(w), bounds[w], bounds[w + 1])) continue;
    message += fmt::format(" its weight budget is too small for two layers (the largest has {});",
                           Mebibytes(problem.largest_layer()));
  }
  const uint64_t kv = Mul(Mul(BlockBytes(sizes), kv_blocks), sizes.layers.size());
  message += fmt::format(
      " together {} needed, {} available; KV of {} blocks of {} positions is {}; ",
      Mebibytes(needed), Mebibytes(available), kv_blocks, kKvBlockPositions, Mebibytes(kv));
  return absl::ResourceExhaustedError(message + WhatWouldHelp(sizes, workers, limits, kv_blocks));
}

// The share of a worker's memory that KV may take.
uint64_t KvMemory(const PlanLimits& limits, const WorkerCapacity& worker) {
  if (limits.kv.memory_bytes > 0) return limits.kv.memory_bytes;
  return static_cast<uint64_t>(static_cast<double>(worker.memory_bytes) * limits.kv.memory_percent /
                               100);
}

// The most blocks that every stage has room for within its worker's share for KV.
int BlocksInMemory(const ModelSizes& sizes, const std::vector<WorkerCapacity>& workers,
                   const PlanLimits& limits, const std::vector<int>& bounds) {
  const Problem problem(sizes, workers, limits, /*kv_blocks=*/0);
  uint64_t blocks = INT32_MAX;
  for (size_t w = 0; w < workers.size(); ++w) {
    const uint64_t taken = problem.Bytes(static_cast<int>(w), bounds[w], bounds[w + 1]);
    const uint64_t memory = workers[w].memory_bytes;
    const uint64_t room = std::min(memory - std::min(memory, taken), KvMemory(limits, workers[w]));
    const uint64_t block = Mul(BlockBytes(sizes), bounds[w + 1] - bounds[w]);
    blocks = std::min(blocks, room / std::max<uint64_t>(block, 1));
  }
  return static_cast<int>(blocks);
}

struct Split {
  std::vector<int> bounds;
  int kv_blocks;
};

// See MakePlan for the pool.
absl::StatusOr<Split> SplitLayers(const ModelSizes& sizes,
                                  const std::vector<WorkerCapacity>& workers,
                                  const PlanLimits& limits) {
  const auto solve = [&](int blocks) { return Problem(sizes, workers, limits, blocks).Solve(); };
  const int least = KvBlocksPerSequence(limits);
  const bool by_memory = limits.kv.memory_bytes > 0 || limits.kv.memory_percent > 0;
  if (limits.kv.blocks == 0 && by_memory) {
    const std::optional<std::vector<int>> bounds = solve(least);
    if (!bounds) return Refusal(sizes, workers, limits, least);
    const int blocks = BlocksInMemory(sizes, workers, limits, *bounds);
    if (blocks >= least) return Split{*bounds, blocks};
    return absl::ResourceExhaustedError(fmt::format(
        "the memory for KV holds {} blocks, and one sequence of {} positions takes {}; a larger "
        "--kv-memory, a shorter --context or a smaller --kv-type would help",
        blocks, limits.max_context, least));
  }
  int blocks = limits.kv.blocks > 0 ? limits.kv.blocks : DefaultKvBlocks(limits);
  std::optional<std::vector<int>> bounds = solve(blocks);
  if (!bounds && limits.kv.blocks == 0) {
    const int most = LargestThatFits(blocks, [&](int tried) { return solve(tried).has_value(); });
    blocks = std::max(most, least);
    bounds = solve(blocks);
  }
  if (!bounds) return Refusal(sizes, workers, limits, blocks);
  return Split{*std::move(bounds), blocks};
}

absl::Status CheckArguments(const ModelSizes& sizes, const std::vector<WorkerCapacity>& workers,
                            const PlanLimits& limits) {
  if (workers.empty()) return absl::InvalidArgumentError("there are no workers to plan over");
  if (workers.size() > sizes.layers.size()) {
    return absl::InvalidArgumentError(
        fmt::format("{} workers for {} layers: every stage needs a layer; leave out {} workers",
                    workers.size(), sizes.layers.size(), workers.size() - sizes.layers.size()));
  }
  if (limits.max_slots < 1 || limits.max_context < 1 || limits.max_step_tokens < 0) {
    return absl::InvalidArgumentError(
        fmt::format("slots ({}) and context ({}) must be at least 1, step tokens ({}) not negative",
                    limits.max_slots, limits.max_context, limits.max_step_tokens));
  }
  if (limits.kv.blocks != 0 && limits.kv.blocks < KvBlocksPerSequence(limits)) {
    return absl::InvalidArgumentError(fmt::format(
        "{} KV blocks hold less than one sequence of {} positions, which takes {}: ask for more "
        "--kv-blocks or a shorter --context",
        limits.kv.blocks, limits.max_context, KvBlocksPerSequence(limits)));
  }
  return absl::OkStatus();
}

int DefaultStepTokens(const std::vector<WorkerCapacity>& workers) {
  const bool gpus = std::ranges::all_of(workers, &WorkerCapacity::gpu);
  return gpus ? kGpuStepTokens : kCpuStepTokens;
}

}  // namespace

int KvBlocksPerSequence(const PlanLimits& limits) {
  return static_cast<int>((int64_t{limits.max_context} + kKvBlockPositions - 1) /
                          kKvBlockPositions);
}

int DefaultKvBlocks(const PlanLimits& limits) {
  const int64_t blocks =
      int64_t{KvBlocksPerSequence(limits)} * std::min(limits.max_slots, kDefaultFullSequences);
  return static_cast<int>(std::min<int64_t>(blocks, INT32_MAX));
}

ModelSizes MeasureModel(const ModelFile& model, KvType kv_type) {
  const ModelParams& p = model.params();
  ModelSizes sizes;
  for (int layer = 0; layer < p.layers; ++layer) {
    sizes.layers.push_back(model.UnitBytes({Unit::Kind::kLayer, layer}));
  }
  sizes.embedding = model.UnitBytes({Unit::Kind::kEmbedding});
  sizes.embedding_row = sizes.embedding / static_cast<uint64_t>(p.vocab_size);
  sizes.head = model.UnitBytes({Unit::Kind::kHead});
  for (const Unit& unit : StageUnits(p, 0, p.layers)) {
    if (unit.kind != Unit::Kind::kLayer) continue;
    uint64_t largest = 0, second = 0;
    for (const UnitTensor& entry : model.UnitTensors(unit)) {
      second = std::max(second, std::min(largest, entry.tensor->bytes));
      largest = std::max(largest, entry.tensor->bytes);
    }
    sizes.load_buffers = std::max(sizes.load_buffers, Add(largest, second));
  }
  sizes.kv_position = KvPositionBytes(kv_type, p.kv_heads, p.key_length, p.value_length);
  const uint64_t key_and_value = static_cast<uint64_t>(p.key_length) + p.value_length;
  // Residual, normed input, its quantised form and the layer's output; queries, attention output,
  // new keys and values; gate, up and their product.
  const uint64_t values = 4 * static_cast<uint64_t>(p.d_model) +
                          (static_cast<uint64_t>(p.heads) + p.kv_heads) * key_and_value +
                          3 * static_cast<uint64_t>(p.ffn_length);
  sizes.workspace_row = values * sizeof(float);
  sizes.logits_row = static_cast<uint64_t>(p.vocab_size) * sizeof(float);
  return sizes;
}

uint64_t StageBytes(const ModelSizes& sizes, const PlanLimits& limits, int kv_blocks, int first,
                    int last) {
  const bool has_head = last == static_cast<int>(sizes.layers.size());
  const uint64_t kv = Mul(Mul(BlockBytes(sizes), kv_blocks), last - first);
  return Add(Add(WeightBytes(sizes, first, last), kv), WorkspaceBytes(sizes, limits, has_head));
}

absl::StatusOr<Plan> MakePlan(const ModelSizes& sizes, const std::vector<WorkerCapacity>& workers,
                              const PlanLimits& asked) {
  if (absl::Status status = CheckArguments(sizes, workers, asked); !status.ok()) return status;
  PlanLimits limits = asked;
  if (limits.max_step_tokens == 0) limits.max_step_tokens = DefaultStepTokens(workers);
  absl::StatusOr<Split> split = SplitLayers(sizes, workers, limits);
  if (!split.ok()) return split.status();
  const Problem problem(sizes, workers, limits, split->kv_blocks);
  Plan plan;
  plan.kv_blocks = split->kv_blocks;
  plan.max_step_tokens = limits.max_step_tokens;
  for (size_t w = 0; w < workers.size(); ++w) {
    const int worker = static_cast<int>(w);
    const int first = split->bounds[w], last = split->bounds[w + 1];
    plan.stages.push_back({.worker = workers[w].worker,
                           .first_layer = first,
                           .last_layer = last,
                           .weight_bytes = WeightBytes(sizes, first, last),
                           .kv_bytes = Mul(Mul(BlockBytes(sizes), plan.kv_blocks), last - first),
                           .streamed_bytes = problem.StreamedBytes(worker, first, last),
                           .seconds_per_token = problem.Seconds(worker, first, last)});
  }
  return plan;
}

absl::StatusOr<Plan> MakePlan(const ModelFile& model, const std::vector<WorkerCapacity>& workers,
                              const PlanLimits& limits) {
  return MakePlan(MeasureModel(model, limits.kv.type), workers, limits);
}

std::string FormatPlan(const ModelFile& model, const Plan& plan) {
  constexpr double kMiB = 1 << 20;
  size_t width = 6;
  for (const PlanStage& stage : plan.stages) width = std::max(width, stage.worker.size());
  std::string table =
      fmt::format("{:>5}  {:<{}}  {:>9}  {:>11}  {:>9}  {:>8}  {}\n", "stage", "worker", width,
                  "layers", "weights MiB", "KV MiB", "ms/token", "holds");
  double sum = 0, slowest = 0;
  for (size_t i = 0; i < plan.stages.size(); ++i) {
    const PlanStage& stage = plan.stages[i];
    std::string holds = i == 0 ? "embedding, layers" : "layers";
    if (i + 1 == plan.stages.size()) holds += ", head";
    if (stage.streamed_bytes > 0) {
      holds += fmt::format("; streams {:.2f} MiB per step", stage.streamed_bytes / kMiB);
    }
    table += fmt::format(
        "{:>5}  {:<{}}  {:>9}  {:>11.2f}  {:>9.2f}  {:>8.3f}  {}\n", i, stage.worker, width,
        fmt::format("{}..{}", stage.first_layer, stage.last_layer - 1), stage.weight_bytes / kMiB,
        stage.kv_bytes / kMiB, stage.seconds_per_token * 1e3, holds);
    sum += stage.seconds_per_token;
    slowest = std::max(slowest, stage.seconds_per_token);
  }
  return table + fmt::format(
                     "{} layers over {} stages; slowest stage {:.3f} ms/token, "
                     "all stages {:.3f} ms/token (predicted from bandwidths)\n"
                     "{} KV blocks of {} positions for all sequences together\n",
                     model.params().layers, plan.stages.size(), slowest * 1e3, sum * 1e3,
                     plan.kv_blocks, kKvBlockPositions);
}

}  // namespace stagecoach
