// Speed of the CPU backend: each weight type's matmul in GB/s of packed weights, and whole models
// in tokens per second, next to the read bandwidth of the cores measured in the same run.
//
//   cpu_bench [--threads N] [--isa NAME] [--types Q4_K,Q6_K] [--model FILE.gguf]...
//             [--kv-type TYPE] [--sequences 1,64]
#include <time.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include "kernels/cpu/aligned_buffer.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cpu/cpu_weights.h"
#include "kernels/cpu/layer_ops.h"
#include "kernels/cpu/read_bandwidth.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/model_runner.h"
#include "model/random_blocks.h"
#include "model/status_macros.h"

namespace stagecoach::cpu {
namespace {

// With one thread, that thread's own time: what others make it wait for the core is left out.
bool g_thread_time = false;

double Seconds() {
  timespec now;
  clock_gettime(g_thread_time ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// The best of several runs: others use the machine too.
double BestSeconds(double budget, const std::function<void()>& run) {
  double best = 1e9;
  for (const double start = Seconds(); Seconds() - start < budget;) {
    const double from = Seconds();
    run();
    best = std::min(best, Seconds() - from);
  }
  return best;
}

absl::Status BenchType(const LayerOps& ops, TensorType type, double bandwidth) {
  constexpr int kColumns = 2048;
  constexpr int kMaxRows = 128;
  // Enough outputs that the weights do not stay in the last-level cache.
  const TensorTypeInfo& info = GetTensorTypeInfo(type);
  const int outputs =
      static_cast<int>((96u << 20) / (kColumns / info.block_elements * info.block_bytes)) /
      kPanelRows * kPanelRows;
  FastRandom random(1);
  const size_t blocks = static_cast<size_t>(outputs) * kColumns / info.block_elements;
  const std::vector<std::byte> raw = MakeRandomBlocks(type, blocks, 0.02f, random);
  STAGECOACH_ASSIGN_OR_RETURN(const PackedMatrix matrix,
                              PackedMatrix::Pack(type, outputs, kColumns, raw));
  std::vector<float> x(kMaxRows * kColumns), y(static_cast<size_t>(kMaxRows) * outputs);
  for (float& value : x) value = random.Uniform(-1, 1);
  STAGECOACH_ASSIGN_OR_RETURN(const QuantBuffer quants, QuantBuffer::Create(kMaxRows, kColumns));
  ops.Quantize(x.data(), kMaxRows, kColumns, quants);
  std::string line = fmt::format("{:6}", info.name);
  for (const int rows : {1, 2, 4, 8, 16, 32, kMaxRows}) {
    const Projection projection[] = {{&matrix.view(), nullptr, y.data(), false}};
    const ActivationView view = quants.View(x.data(), rows, kColumns);
    const double seconds = BestSeconds(0.4, [&] { ops.Project(view, projection); });
    const double gigabytes = static_cast<double>(matrix.bytes()) / seconds / 1e9;
    const double macs = static_cast<double>(outputs) * kColumns * rows / seconds / 1e9;
    line += rows == 1 ? fmt::format("  {:5.2f} GB/s ({:3.0f} %)", gigabytes,
                                    100e9 * gigabytes / bandwidth)
                      : fmt::format("  {:3}: {:5.1f} GMAC/s", rows, macs);
  }
  fmt::print("{}\n", line);
  std::fflush(stdout);
  return absl::OkStatus();
}

// A model with all its weights in memory, and KV for many sequences in blocks dealt out in turn.
class BenchedModel {
 public:
  static constexpr int kMaxSequences = 64, kMaxRows = 128, kPositions = 192;

  static absl::StatusOr<std::unique_ptr<BenchedModel>> Load(Backend& backend,
                                                            const std::string& path, KvType type) {
    auto bench = std::make_unique<BenchedModel>(backend);
    STAGECOACH_ASSIGN_OR_RETURN(bench->model_, ModelFile::Open(path));
    const ModelParams& params = bench->model_->params();
    for (const Unit& unit : StageUnits(params, 0, params.layers)) {
      STAGECOACH_ASSIGN_OR_RETURN(auto weights, LoadUnit(backend, *bench->model_, unit));
      if (unit.kind != Unit::Kind::kEmbedding) bench->bytes_ += weights->bytes();
      bench->units_.push_back(std::move(weights));
    }
    constexpr int kBlocks = kPositions / kKvBlockPositions;
    bench->blocks_.resize(kMaxSequences);
    for (int i = 0; i < kMaxSequences * kBlocks; ++i) {
      bench->blocks_[i % kMaxSequences].push_back(i);
    }
    STAGECOACH_ASSIGN_OR_RETURN(
        bench->kv_, backend.NewKvCache({params.layers, params.kv_heads, params.key_length,
                                        params.value_length, kMaxSequences * kBlocks, type}));
    STAGECOACH_ASSIGN_OR_RETURN(bench->workspace_, backend.NewWorkspace(params, kMaxRows));
    bench->logits_.resize(static_cast<size_t>(kMaxSequences) * params.vocab_size);
    return bench;
  }
  explicit BenchedModel(Backend& backend) : backend_(backend) {}

  uint64_t bytes() const { return bytes_; }  // of weights that a step reads

  // `count` rows from position `start` on of each of `sequences` sequences; logits of the last one
  // of each. Returns the seconds that it took.
  absl::StatusOr<double> Step(int sequences, int start, int count) {
    const double from = Seconds();
    const std::vector<int32_t> tokens(static_cast<size_t>(sequences) * count, 5);
    std::vector<BatchSequence> batch;
    std::vector<int32_t> last;
    for (int i = 0; i < sequences; ++i) {
      batch.push_back({i * count, count, start, blocks_[i]});
      last.push_back((i + 1) * count - 1);
    }
    const int layers = model_->params().layers;
    STAGECOACH_RETURN_IF_ERROR(backend_.Embed(*workspace_, *units_.front(), tokens));
    for (int layer = 0; layer < layers; ++layer) {
      STAGECOACH_RETURN_IF_ERROR(backend_.RunLayer(*workspace_, *units_[layer + 1], *kv_, layer,
                                                   {batch, sequences * count}));
    }
    const std::span<float> logits(logits_.data(), last.size() * model_->params().vocab_size);
    STAGECOACH_RETURN_IF_ERROR(backend_.Head(*workspace_, *units_.back(), last, logits));
    return Seconds() - from;
  }

 private:
  Backend& backend_;
  std::shared_ptr<const ModelFile> model_;
  std::vector<std::unique_ptr<UnitWeights>> units_;
  uint64_t bytes_ = 0;
  std::vector<std::vector<int32_t>> blocks_;  // [kMaxSequences][blocks]
  std::unique_ptr<KvCache> kv_;
  std::unique_ptr<Workspace> workspace_;
  std::vector<float> logits_;
};

// Prompt of 128 tokens (logits of the last only) and decode of up to 64 after it; then decode of
// many sequences together, each after 64 tokens of its own.
absl::Status BenchModel(Backend& backend, const std::string& path, KvType type,
                        const std::vector<int>& many, double bandwidth) {
  constexpr int kPrompt = 128, kDecode = 64, kShort = 64;
  const double load_start = Seconds();
  STAGECOACH_ASSIGN_OR_RETURN(const auto bench, BenchedModel::Load(backend, path, type));
  fmt::print("{}: {:.1f} MB read per step, loaded in {:.2f} s\n", path, 1e-6 * bench->bytes(),
             Seconds() - load_start);
  double prompt = 1e9, decode = 1e9;
  for (int repeat = 0; repeat < 5; ++repeat) {
    STAGECOACH_ASSIGN_OR_RETURN(const double first, bench->Step(1, 0, kPrompt));
    prompt = std::min(prompt, first);
    for (int i = 0; i < kDecode; ++i) {
      STAGECOACH_ASSIGN_OR_RETURN(const double next, bench->Step(1, kPrompt + i, 1));
      decode = std::min(decode, next);
    }
  }
  fmt::print(
      "  prompt {:.1f} tok/s   decode {:.1f} tok/s, {:.2f} GB/s ({:.0f} % of the bandwidth)\n",
      kPrompt / prompt, 1 / decode, 1e-9 * bench->bytes() / decode,
      100.0 * bench->bytes() / decode / bandwidth);
  std::string line = "  decode of many, tok/s:";
  for (const int sequences : many) {
    double best = 1e9;
    for (const double start = Seconds(); Seconds() - start < 0.6;) {
      STAGECOACH_ASSIGN_OR_RETURN(const double step, bench->Step(sequences, kShort, 1));
      best = std::min(best, step);
    }
    line += fmt::format("  {}: {:.0f}", sequences, sequences / best);
  }
  fmt::print("{}\n", line);
  std::fflush(stdout);
  return absl::OkStatus();
}

absl::Status Run(const CpuOptions& options, const std::vector<std::string>& types,
                 const std::vector<std::string>& models, KvType kv_type,
                 const std::vector<int>& many) {
  const std::unique_ptr<Backend> backend = MakeCpuBackend(options);
  g_thread_time = options.threads == 1;
  const double bandwidth = MeasureReadBandwidth(options.threads, 64u << 20, 50);
  fmt::print("{}; reads {:.1f} GB/s\n", backend->info().description, bandwidth / 1e9);
  for (const std::string& model : models) {
    STAGECOACH_RETURN_IF_ERROR(BenchModel(*backend, model, kv_type, many, bandwidth));
  }
  ThreadPool pool(options.threads);
  const LayerOps ops(&KernelsFor(options.isa), &pool);
  for (const TensorTypeInfo& info : AllTensorTypes()) {
    const bool wanted = types.empty()
                            ? models.empty()
                            : std::find(types.begin(), types.end(), info.name) != types.end();
    if (wanted) STAGECOACH_RETURN_IF_ERROR(BenchType(ops, info.type, bandwidth));
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace stagecoach::cpu

int main(int argc, char** argv) {
  stagecoach::CpuOptions options{.threads = 1};
  std::vector<std::string> types, models;
  auto kv_type = stagecoach::KvType::kF16;
  const std::map<std::string, stagecoach::KvType> kv_types = {{"f16", stagecoach::KvType::kF16},
                                                              {"f32", stagecoach::KvType::kF32},
                                                              {"q8_0", stagecoach::KvType::kQ8_0}};
  CLI::App app("Speed of the CPU backend");
  app.add_option("--threads", options.threads)->capture_default_str();
  app.add_option("--isa", options.isa, "auto, portable, avx2 or avx512")->capture_default_str();
  app.add_option("--types", types, "Weight types; default: all if no model is given")
      ->delimiter(',');
  app.add_option("--model", models, "GGUF files to run");
  app.add_option("--kv-type", kv_type, "f16, f32 or q8_0")->transform(CLI::Transformer(kv_types));
  std::vector<int> many = {1, 2, 4, 8, 16, 32, 64};
  app.add_option("--sequences", many, "Decode of so many together")
      ->delimiter(',')
      ->check(CLI::Range(1, stagecoach::cpu::BenchedModel::kMaxSequences));
  CLI11_PARSE(app, argc, argv);
  const absl::Status status = stagecoach::cpu::Run(options, types, models, kv_type, many);
  if (!status.ok()) {
    fmt::print(stderr, "{}\n", std::string(status.message()));
    return 1;
  }
  return 0;
}
