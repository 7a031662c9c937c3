// Speed of whole models of random weights on one GPU: decode steps of several sequences and
// prompts, next to the read bandwidth measured in the same run. A step ends with the best token of
// each sequence on the host, or ("layers") with the residual stream there.
//
//   cuda_bench [--shape llama3-8b] [--type Q4_K|Q4_K_M] [--rows 1,8,32] [--prior 128]
//              [--prompts 512,2048]
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/random_tensor.h"
#include "model/status_macros.h"
#include "model/type_mix.h"

namespace stagecoach {
namespace {

struct BenchFlags {
  int device = 0;
  std::string shape = "llama3-8b";
  std::string type = "Q4_K";
  std::vector<int> rows = {1, 2, 4, 8, 16, 32, 64};
  int prior = 128;
  std::vector<int> prompts = {512, 2048};
  double seconds = 0.5;
  bool no_graphs = false;
};

const std::map<std::string, ModelParams>& Shapes() {
  const auto make = [](int layers, int d_model, int heads, int kv_heads, int ffn, int vocab) {
    ModelParams params;
    params.architecture = "llama";
    params.layers = layers;
    params.d_model = d_model;
    params.heads = heads;
    params.kv_heads = kv_heads;
    params.key_length = params.value_length = params.rope_dims = d_model / heads;
    params.ffn_length = ffn;
    params.vocab_size = vocab;
    params.context_length = 8192;
    params.norm_epsilon = 1e-5f;
    return params;
  };
  static const auto& shapes = *new std::map<std::string, ModelParams>{
      {"tinyllama-1.1b", make(22, 2048, 32, 4, 5632, 32000)},
      {"llama2-7b", make(32, 4096, 32, 32, 11008, 32000)},
      {"llama3-8b", make(32, 4096, 32, 8, 14336, 128256)},
      {"llama2-70b", make(80, 8192, 64, 8, 28672, 32000)},
  };
  return shapes;
}

// `rows` rows of each of some sequences, which have `prior` positions already. It ends with the
// best logit of each sequence's last row, or with the residual stream.
struct Step {
  int sequences = 1;
  int rows = 1;
  int prior = 0;
  bool head = true;
  int first_sequence = 0;
};

// A model and as many sequences as the widest step has rows.
class Bench {
 public:
  static absl::StatusOr<std::unique_ptr<Bench>> Open(const BenchFlags& flags, const TypeMix& mix);

  absl::Status Run(const Step& step);
  // The two parts of Run. Steps with a head may be enqueued one behind the other.
  absl::Status Enqueue(const Step& step);
  absl::Status Await(const Step& step);
  absl::StatusOr<double> MedianSeconds(const Step& step);

  Backend& backend() { return *backend_; }
  uint64_t weight_bytes() const { return weight_bytes_; }  // that a step reads
  uint64_t KvBytesPerPosition() const {
    return KvBytes({.layers = params_.layers,
                    .kv_heads = params_.kv_heads,
                    .key_length = params_.key_length,
                    .value_length = params_.value_length,
                    .blocks = 1}) /
           kKvBlockPositions;
  }

 private:
  absl::Status Build(const TypeMix& mix);

  ModelParams params_;
  double seconds_ = 0;
  int blocks_per_sequence_ = 0;
  uint64_t weight_bytes_ = 0;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<UnitWeights> embedding_, head_;
  std::vector<std::unique_ptr<UnitWeights>> layers_;
  std::unique_ptr<KvCache> kv_;
  std::unique_ptr<Workspace> workspace_;
  std::vector<float> residual_;
  std::vector<int32_t> last_rows_;  // of each sequence, in the latest step
  std::vector<TokenDraw> draws_;    // of the best token
  std::vector<int32_t> tokens_;
  std::vector<uint8_t> finite_;
};

absl::StatusOr<std::unique_ptr<Bench>> Bench::Open(const BenchFlags& flags, const TypeMix& mix) {
  auto bench = std::make_unique<Bench>();
  bench->params_ = Shapes().at(flags.shape);
  bench->seconds_ = flags.seconds;
  STAGECOACH_ASSIGN_OR_RETURN(
      bench->backend_, MakeCudaBackend({.device = flags.device, .graphs = !flags.no_graphs}));
  STAGECOACH_RETURN_IF_ERROR(bench->Build(mix));
  const int most_rows = *std::ranges::max_element(flags.rows);
  const int longest = std::max(flags.prior + 1, *std::ranges::max_element(flags.prompts));
  bench->blocks_per_sequence_ = (longest + kKvBlockPositions - 1) / kKvBlockPositions;
  const ModelParams& params = bench->params_;
  STAGECOACH_ASSIGN_OR_RETURN(
      bench->kv_, bench->backend_->NewKvCache({.layers = params.layers,
                                               .kv_heads = params.kv_heads,
                                               .key_length = params.key_length,
                                               .value_length = params.value_length,
                                               .blocks = most_rows * bench->blocks_per_sequence_}));
  const int workspace_rows = std::max(most_rows, longest);
  STAGECOACH_ASSIGN_OR_RETURN(bench->workspace_,
                              bench->backend_->NewWorkspace(params, workspace_rows));
  bench->residual_.resize(static_cast<size_t>(workspace_rows) * params.d_model);
  bench->tokens_.resize(most_rows);
  bench->finite_.resize(workspace_rows);
  for (int i = 0; i < most_rows; ++i) {  // no sequence attends to memory that nothing wrote
    STAGECOACH_RETURN_IF_ERROR(
        bench->Run({.rows = i == 0 ? longest : flags.prior, .head = false, .first_sequence = i}));
  }
  return bench;
}

// Layers of the same types differ in place, not in value.
absl::Status Bench::Build(const TypeMix& mix) {
  RandomSource random(1);
  const auto make = [&](Unit unit, TensorType type) {
    return MakeRandomUnit(random, params_, unit, type, false);
  };
  STAGECOACH_ASSIGN_OR_RETURN(
      embedding_, BuildUnit(*backend_, params_, make({Unit::Kind::kEmbedding}, mix.base)));
  STAGECOACH_ASSIGN_OR_RETURN(head_,
                              BuildUnit(*backend_, params_, make({Unit::Kind::kHead}, mix.output)));
  const RandomUnit layer = make({Unit::Kind::kLayer}, mix.base);
  RandomUnit more = layer;
  if (mix.more != mix.base) {
    const RandomUnit other = make({Unit::Kind::kLayer}, mix.more);
    for (size_t i = 0; i < other.roles.size(); ++i) {
      if (other.roles[i] == TensorRole::kAttnV || other.roles[i] == TensorRole::kFfnDown) {
        more.tensors[i] = other.tensors[i];
      }
    }
  }
  for (int i = 0; i < params_.layers; ++i) {
    const bool is_base = mix.VAndDown(i, params_.layers) == mix.base;
    STAGECOACH_ASSIGN_OR_RETURN(layers_.emplace_back(),
                                BuildUnit(*backend_, params_, is_base ? layer : more));
    weight_bytes_ += layers_.back()->bytes();
  }
  weight_bytes_ += head_->bytes();
  return absl::OkStatus();
}

absl::Status Bench::Enqueue(const Step& step) {
  std::vector<int32_t> blocks(static_cast<size_t>(step.sequences) * blocks_per_sequence_);
  std::iota(blocks.begin(), blocks.end(), step.first_sequence * blocks_per_sequence_);
  std::vector<BatchSequence> sequences;
  std::vector<int32_t> tokens;
  last_rows_.clear();
  for (int i = 0; i < step.sequences; ++i) {
    const auto own_blocks = std::span<const int32_t>(blocks).subspan(
        static_cast<size_t>(i) * blocks_per_sequence_, blocks_per_sequence_);
    sequences.push_back({.first_row = i * step.rows,
                         .row_count = step.rows,
                         .start_position = step.prior,
                         .blocks = own_blocks});
    for (int r = 0; r < step.rows; ++r) tokens.push_back((i * 101 + r * 37) % params_.vocab_size);
    last_rows_.push_back((i + 1) * step.rows - 1);
  }
  const StepBatch batch = {.sequences = sequences, .rows = static_cast<int>(tokens.size())};
  STAGECOACH_RETURN_IF_ERROR(backend_->Embed(*workspace_, *embedding_, tokens));
  for (size_t i = 0; i < layers_.size(); ++i) {
    STAGECOACH_RETURN_IF_ERROR(
        backend_->RunLayer(*workspace_, *layers_[i], *kv_, static_cast<int>(i), batch));
  }
  if (!step.head) return absl::OkStatus();
  draws_.assign(last_rows_.size(), {.temperature = 0});
  return backend_->EnqueuePicks(*workspace_, *head_, last_rows_, draws_);
}

absl::Status Bench::Await(const Step& step) {
  const size_t rows = static_cast<size_t>(step.sequences) * step.rows;
  if (!step.head) {
    return backend_->GetResidual(*workspace_, std::span(residual_).first(rows * params_.d_model));
  }
  return backend_->AwaitEnd(*workspace_, std::span(tokens_).first(step.sequences),
                            std::span(finite_).first(rows));
}

absl::Status Bench::Run(const Step& step) {
  STAGECOACH_RETURN_IF_ERROR(Enqueue(step));
  return Await(step);
}

// Steps with a head lie one behind the other, as those of a worker do: what counts is how far apart
// they end.
absl::StatusOr<double> Bench::MedianSeconds(const Step& step) {
  using Clock = std::chrono::steady_clock;
  constexpr int kWarmUp = 3;  // the third of a shape is the first that runs as a graph
  for (int i = 0; i < kWarmUp; ++i) STAGECOACH_RETURN_IF_ERROR(Run(step));
  std::vector<double> seconds;
  if (step.head) STAGECOACH_RETURN_IF_ERROR(Enqueue(step));
  const auto start = Clock::now();
  for (auto before = start; std::chrono::duration<double>(before - start).count() < seconds_;) {
    STAGECOACH_RETURN_IF_ERROR(Enqueue(step));
    STAGECOACH_RETURN_IF_ERROR(Await(step));
    const auto after = Clock::now();
    seconds.push_back(std::chrono::duration<double>(after - before).count());
    before = after;
  }
  if (step.head) STAGECOACH_RETURN_IF_ERROR(Await(step));
  const auto middle = seconds.begin() + static_cast<ptrdiff_t>(seconds.size() / 2);
  std::nth_element(seconds.begin(), middle, seconds.end());
  return *middle;
}

absl::Status RunBench(const BenchFlags& flags) {
  const std::optional<TypeMix> mix = FindTypeMix(flags.type);
  if (!mix) return absl::InvalidArgumentError("there is no type or mix " + flags.type);
  STAGECOACH_ASSIGN_OR_RETURN(const std::unique_ptr<Bench> bench, Bench::Open(flags, *mix));
  STAGECOACH_ASSIGN_OR_RETURN(const double bandwidth, MeasureCudaReadBandwidth(bench->backend()));
  fmt::print("{} {} on {}: {:.2f} GB of weights per step, reads {:.2f} TB/s\n", flags.shape,
             flags.type, bench->backend().info().description, 1e-9 * bench->weight_bytes(),
             1e-12 * bandwidth);
  fmt::print("{:>28} {:>10} {:>10} {:>12} {:>8} {:>8}\n", "step", "ms", "layers ms", "tok/s",
             "TB/s", "of read");
  for (const int rows : flags.rows) {
    STAGECOACH_ASSIGN_OR_RETURN(const double all,
                                bench->MedianSeconds({.sequences = rows, .prior = flags.prior}));
    STAGECOACH_ASSIGN_OR_RETURN(
        const double layers,
        bench->MedianSeconds({.sequences = rows, .prior = flags.prior, .head = false}));
    const double bytes = static_cast<double>(
        bench->weight_bytes() + rows * (flags.prior + 1) * bench->KvBytesPerPosition());
    fmt::print("{:>28} {:>10.3f} {:>10.3f} {:>12.0f} {:>8.2f} {:>7.0f}%\n",
               fmt::format("decode {} x 1 after {}", rows, flags.prior), 1e3 * all, 1e3 * layers,
               rows / all, 1e-12 * bytes / all, 100 * bytes / all / bandwidth);
  }
  for (const int rows : flags.prompts) {
    STAGECOACH_ASSIGN_OR_RETURN(const double all, bench->MedianSeconds({.rows = rows}));
    fmt::print("{:>28} {:>10.3f} {:>10} {:>12.0f}\n", fmt::format("prompt of {}", rows), 1e3 * all,
               "", rows / all);
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace stagecoach

int main(int argc, char** argv) {
  CLI::App app("Speed of the CUDA backend on models of random weights");
  stagecoach::BenchFlags flags;
  std::vector<std::string> shapes;
  for (const auto& [name, params] : stagecoach::Shapes()) shapes.push_back(name);
  app.add_option("--device", flags.device, "GPU")->capture_default_str();
  app.add_option("--shape", flags.shape, "Model")
      ->check(CLI::IsMember(shapes))
      ->capture_default_str();
  app.add_option("--type", flags.type, "Type of all matrices, or a mix, as synth has them")
      ->capture_default_str();
  app.add_option("--rows", flags.rows, "Sequences of decode steps")
      ->delimiter(',')
      ->check(CLI::Range(1, 4096));
  app.add_option("--prior", flags.prior, "Positions of each sequence before a decode step")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--prompts", flags.prompts, "Rows of prompts")
      ->delimiter(',')
      ->check(CLI::Range(1, 65535));
  app.add_option("--seconds", flags.seconds, "Per measurement")->capture_default_str();
  app.add_flag("--no-graphs", flags.no_graphs, "Launch every kernel by itself");
  CLI11_PARSE(app, argc, argv);
  const absl::Status status = stagecoach::RunBench(flags);
  if (status.ok()) return 0;
  fmt::print(stderr, "cuda_bench: {}\n", std::string(status.message()));
  return 2;
}
