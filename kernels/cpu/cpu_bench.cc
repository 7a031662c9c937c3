// Speed of the CPU backend: each weight type's matmul in GB/s of packed weights, and whole models
// in tokens per second, next to the read bandwidth of the cores measured in the same run.
//
//   cpu_bench [--threads N] [--isa NAME] [--types Q4_K,Q6_K] [--model FILE.gguf]...
#include <time.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <functional>
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

// Prompt of 128 tokens (logits of the last only) and decode of 64 after it, one sequence.
absl::Status BenchModel(Backend& backend, const std::string& path, double bandwidth) {
  constexpr int kPrompt = 128, kDecode = 64;
  STAGECOACH_ASSIGN_OR_RETURN(const auto model, ModelFile::Open(path));
  const ModelParams& params = model->params();
  std::vector<std::unique_ptr<UnitWeights>> units;
  uint64_t bytes = 0;
  const double load_start = Seconds();
  for (const Unit& unit : StageUnits(params, 0, params.layers)) {
    STAGECOACH_ASSIGN_OR_RETURN(auto weights, LoadUnit(backend, *model, unit));
    if (unit.kind != Unit::Kind::kEmbedding) bytes += weights->bytes();
    units.push_back(std::move(weights));
  }
  fmt::print("{}: {:.1f} MB read per token, loaded in {:.2f} s\n", path, 1e-6 * bytes,
             Seconds() - load_start);
  std::vector<int32_t> blocks;
  for (int i = 0; i * kKvBlockPositions < kPrompt + kDecode; ++i) blocks.push_back(i);
  STAGECOACH_ASSIGN_OR_RETURN(
      const auto kv, backend.NewKvCache({params.layers, params.kv_heads, params.key_length,
                                         params.value_length, static_cast<int>(blocks.size())}));
  STAGECOACH_ASSIGN_OR_RETURN(const auto workspace, backend.NewWorkspace(params, kPrompt));
  std::vector<float> logits(params.vocab_size);
  const auto step = [&](int start, int count) -> absl::Status {
    const std::vector<int32_t> tokens(count, 5);
    const BatchSequence sequences[] = {{0, count, start, blocks}};
    STAGECOACH_RETURN_IF_ERROR(backend.Embed(*workspace, *units.front(), tokens));
    for (int layer = 0; layer < params.layers; ++layer) {
      STAGECOACH_RETURN_IF_ERROR(
          backend.RunLayer(*workspace, *units[layer + 1], *kv, layer, {sequences, count}));
    }
    const int32_t last[] = {count - 1};
    return backend.Head(*workspace, *units.back(), last, logits);
  };
  double prompt = 1e9, decode = 1e9;
  for (int repeat = 0; repeat < 5; ++repeat) {
    double from = Seconds();
    STAGECOACH_RETURN_IF_ERROR(step(0, kPrompt));
    prompt = std::min(prompt, Seconds() - from);
    for (int i = 0; i < kDecode; ++i) {
      from = Seconds();
      STAGECOACH_RETURN_IF_ERROR(step(kPrompt + i, 1));
      decode = std::min(decode, Seconds() - from);
    }
  }
  fmt::print(
      "  prompt {:.1f} tok/s   decode {:.1f} tok/s, {:.2f} GB/s ({:.0f} % of the bandwidth)\n",
      kPrompt / prompt, 1 / decode, 1e-9 * bytes / decode, 100.0 * bytes / decode / bandwidth);
  return absl::OkStatus();
}

absl::Status Run(const CpuOptions& options, const std::vector<std::string>& types,
                 const std::vector<std::string>& models) {
  const std::unique_ptr<Backend> backend = MakeCpuBackend(options);
  g_thread_time = options.threads == 1;
  const double bandwidth = MeasureReadBandwidth(options.threads, 64u << 20, 50);
  fmt::print("{}; reads {:.1f} GB/s\n", backend->info().description, bandwidth / 1e9);
  for (const std::string& model : models) {
    STAGECOACH_RETURN_IF_ERROR(BenchModel(*backend, model, bandwidth));
  }
  const CpuKernels* kernels = options.isa == "portable" ? nullptr : Avx2Kernels();
  if (kernels == nullptr) kernels = &PortableKernels();
  ThreadPool pool(options.threads);
  const LayerOps ops(kernels, &pool);
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
  CLI::App app("Speed of the CPU backend");
  app.add_option("--threads", options.threads)->capture_default_str();
  app.add_option("--isa", options.isa, "auto, portable or avx2")->capture_default_str();
  app.add_option("--types", types, "Weight types; default: all if no model is given")
      ->delimiter(',');
  app.add_option("--model", models, "GGUF files to run");
  CLI11_PARSE(app, argc, argv);
  const absl::Status status = stagecoach::cpu::Run(options, types, models);
  if (!status.ok()) {
    fmt::print(stderr, "{}\n", std::string(status.message()));
    return 1;
  }
  return 0;
}
