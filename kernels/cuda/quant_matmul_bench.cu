// Checks and measures the products on this device.
//
//   quant_matmul_bench [check] [shapes] [models]      all three if none is named
//
// Weights rotate through more memory than the second-level cache holds, so that every product
// streams them from device memory. Times are of CUDA graphs, the median of replays.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "kernels/cuda/device_array.h"
#include "kernels/cuda/quant_matmul.h"
#include "kernels/cuda/quant_matmul_check.h"
#include "model/type_mix.h"

namespace stagecoach::cuda {
namespace {

constexpr size_t kPoolBytes = size_t{6} << 30;
constexpr size_t kRotatedBytes = size_t{320} << 20;  // several times the second-level cache
constexpr int kRows[] = {1, 2, 4, 8, 16, 32, 64, 512, 2048};
constexpr int kMostRows = 2048;
constexpr int kMostColumns = 14336;
constexpr int kMostOutputs = 128256;

__global__ void FillKernel(uint32_t* words, size_t count) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    uint32_t hash = static_cast<uint32_t>(i) * 0x9e3779b9u;
    hash = (hash ^ (hash >> 15)) * 0x85ebca6bu;
    words[i] = (hash ^ (hash >> 13)) & 0xbfffbfffu;  // halves stay finite
  }
}

// Device memory that all measurements share.
struct Bench {
  DeviceArray<uint8_t> pool{kPoolBytes};
  DeviceArray<uint8_t> activations{ActivationBytes(kMostRows, kMostColumns)};
  DeviceArray<uint8_t> gated{ActivationBytes(kMostRows, kMostColumns)};
  DeviceArray<float> x{size_t{kMostRows} * kMostColumns * 2};
  DeviceArray<float> y{size_t{64} * kMostOutputs > size_t{kMostRows} * 2 * kMostColumns
                           ? size_t{64} * kMostOutputs
                           : size_t{kMostRows} * 2 * kMostColumns};
  DeviceArray<uint8_t> scratch_memory{kMatmulScratchBytes};
  cudaStream_t stream = nullptr;
  double copy_bytes_per_second = 0;
  size_t next = 0;  // in the pool

  MatmulScratch scratch() const { return {scratch_memory.get()}; }
  // The next matrix of this shape in the pool, from its beginning again when it ends.
  PackedMatrix Take(TensorType type, int n, int k) {
    const size_t bytes = PackedBytes(type, n, k);
    if (next + bytes > pool.size()) next = 0;
    const PackedMatrix matrix = {type, n, k, pool.get() + next};
    next += (bytes + 127) / 128 * 128;
    return matrix;
  }
  Activations Converted(TensorType type, int rows, int k) const {
    return LayOutActivations(activations.get(), FormFor(type), rows, k);
  }
};

// The median of several runs of what `launch` launches.
double MedianSeconds(cudaStream_t stream, const std::function<void()>& launch) {
  constexpr int kWarmUp = 2, kRuns = 9;
  cudaEvent_t begin, end;
  CheckDevice(cudaEventCreate(&begin));
  CheckDevice(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < kWarmUp + kRuns; ++i) {
    CheckDevice(cudaEventRecord(begin, stream));
    launch();
    CheckDevice(cudaEventRecord(end, stream));
    CheckDevice(cudaStreamSynchronize(stream));
    float ms = 0;
    CheckDevice(cudaEventElapsedTime(&ms, begin, end));
    if (i >= kWarmUp) times.push_back(ms);
  }
  CheckDevice(cudaEventDestroy(begin));
  CheckDevice(cudaEventDestroy(end));
  std::nth_element(times.begin(), times.begin() + kRuns / 2, times.end());
  return times[kRuns / 2] * 1e-3;
}

// Seconds of one replay of what `record` launches.
double Measure(Bench& bench, const std::function<void()>& record) {
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  CheckDevice(cudaStreamBeginCapture(bench.stream, cudaStreamCaptureModeThreadLocal));
  record();
  CheckDevice(cudaStreamEndCapture(bench.stream, &graph));
  CheckDevice(cudaGraphInstantiate(&replay, graph, 0));
  const double seconds =
      MedianSeconds(bench.stream, [&] { CheckDevice(cudaGraphLaunch(replay, bench.stream)); });
  CheckDevice(cudaGraphExecDestroy(replay));
  CheckDevice(cudaGraphDestroy(graph));
  return seconds;
}

void Prepare(Bench& bench) {
  cudaDeviceProp properties;
  CheckDevice(cudaGetDeviceProperties(&properties, 0));
  CheckDevice(cudaStreamCreate(&bench.stream));
  CheckDevice(cudaMemset(bench.scratch_memory.get(), 0, kMatmulScratchBytes));
  FillKernel<<<1024, 256, 0, bench.stream>>>(reinterpret_cast<uint32_t*>(bench.pool.get()),
                                             bench.pool.size() / 4);
  FillKernel<<<1024, 256, 0, bench.stream>>>(reinterpret_cast<uint32_t*>(bench.activations.get()),
                                             bench.activations.size() / 4);
  FillKernel<<<1024, 256, 0, bench.stream>>>(reinterpret_cast<uint32_t*>(bench.x.get()),
                                             bench.x.size());
  CheckDevice(cudaGetLastError());
  const size_t half = bench.pool.size() / 2;
  const double seconds = MedianSeconds(bench.stream, [&] {
    CheckDevice(cudaMemcpyAsync(bench.pool.get(), bench.pool.get() + half, half,
                                cudaMemcpyDeviceToDevice, bench.stream));
  });
  bench.copy_bytes_per_second = 2.0 * static_cast<double>(half) / seconds;
  std::printf("%s, %d multiprocessors; copy %.2f TB/s (read + write)\n", properties.name,
              properties.multiProcessorCount, bench.copy_bytes_per_second * 1e-12);
}

void MeasureShape(Bench& bench, TensorType type, int n, int k) {
  const double bytes = static_cast<double>(PackedBytes(type, n, k));
  const int launches = std::clamp(static_cast<int>(kRotatedBytes / bytes) + 1, 4, 64);
  std::printf("%-5s %6d x %5d", std::string(GetTensorTypeInfo(type).name).c_str(), n, k);
  for (const int rows : kRows) {
    if (rows > 64 && n > 2 * kMostColumns) continue;
    const Activations x = bench.Converted(type, rows, k);
    const double seconds =
        Measure(bench,
                [&] {
                  for (int i = 0; i < launches; ++i) {
                    const MatmulTerm term = {bench.Take(type, n, k), bench.y.get(), n};
                    CheckDevice(LaunchMatmul({&term, 1}, x, bench.stream, bench.scratch()));
                  }
                }) /
        launches;
    if (rows <= 64) {
      std::printf(" | %6.2f %4.2f %3.0f%%", seconds * 1e6, bytes / seconds * 1e-12,
                  100 * bytes / seconds / bench.copy_bytes_per_second);
    } else {
      std::printf(" | %7.1f %4.0fT", seconds * 1e6, 2.0 * n * k * rows / seconds * 1e-12);
    }
  }
  std::printf("\n");
  std::fflush(stdout);
}

void MeasureShapes(Bench& bench) {
  std::printf("us, TB/s of packed weights, share of the copy; TFLOP/s beyond 64 rows. rows:");
  for (const int rows : kRows) std::printf(" %d", rows);
  std::printf("\n");
  constexpr int kShapes[][2] = {{1024, 4096},  {4096, 4096},  {6144, 4096},  {28672, 4096},
                                {4096, 11008}, {4096, 14336}, {128256, 4096}};
  for (const TensorType type : {TensorType::kQ4_K, TensorType::kQ6_K}) {
    for (const auto& [n, k] : kShapes) MeasureShape(bench, type, n, k);
  }
  for (const TensorType type :
       {TensorType::kQ8_0, TensorType::kQ5_K, TensorType::kQ4_0, TensorType::kQ4_1,
        TensorType::kQ5_0, TensorType::kQ5_1, TensorType::kQ2_K, TensorType::kQ3_K}) {
    MeasureShape(bench, type, 4096, 4096);
    MeasureShape(bench, type, 28672, 4096);
  }
}

struct ModelShape {
  const char* name;
  int layers, width, kv_width, hidden, vocab;
};

struct LayerWeights {
  PackedMatrix q, k, v, output, gate, up, down;
};

// The products of one layer and, if `whole`, what makes the activations before each. next: the
// layer behind it, or null.
void RecordLayer(Bench& bench, const ModelShape& shape, const LayerWeights& w, int rows,
                 bool whole) {
  const Activations x = bench.Converted(TensorType::kQ4_K, rows, shape.width);
  const Activations hidden = bench.Converted(TensorType::kQ4_K, rows, shape.hidden);
  float* residual = bench.x.get();
  float* y = bench.y.get();
  // As in a layer, but for one row and two: normed, and gate and up fused where that can be done.
  const auto project = [&](std::span<const MatmulTerm> terms, const Fusion& fusion) {
    if (whole) CheckDevice(LaunchRmsNorm(residual, residual, 1e-5f, x, bench.stream));
    CheckDevice(LaunchMatmul(terms, x, bench.stream, bench.scratch(), fusion));
  };
  const int qkv = shape.width + 2 * shape.kv_width;
  const MatmulTerm qkv_terms[] = {
      {w.q, y, qkv}, {w.k, y + shape.width, qkv}, {w.v, y + shape.width + shape.kv_width, qkv}};
  project(qkv_terms, {});
  const MatmulTerm output = {w.output, residual, shape.width, nullptr, true};
  CheckDevice(LaunchMatmul({&output, 1}, x, bench.stream, bench.scratch()));
  MatmulTerm gate_up[] = {{w.gate, y, 2 * shape.hidden},
                          {w.up, y + shape.hidden, 2 * shape.hidden}};
  Fusion gate;
  if (whole && CanPairRows(w.gate, w.up)) {
    for (MatmulTerm& term : gate_up) term.weights.paired = true;  // what they hold is anything
    gate.gated = LayOutActivations(bench.gated.get(), ActivationForm::kHalf, rows, shape.hidden);
  }
  project(gate_up, gate);
  const bool separate = whole && gate.gated.halves == nullptr;
  if (separate) {
    CheckDevice(LaunchSwiGlu(y, y + shape.hidden, 2 * shape.hidden, hidden, bench.stream));
  }
  const MatmulTerm down = {w.down, residual, shape.width, nullptr, true};
  CheckDevice(LaunchMatmul({&down, 1}, hidden, bench.stream, bench.scratch()));
}

// All products of one pass through a Q4_K_M file of this shape.
void MeasureModel(Bench& bench, const ModelShape& shape) {
  bench.next = 0;
  double bytes = 0;
  const auto take = [&](TensorType type, int n, int k) {
    bytes += static_cast<double>(PackedBytes(type, n, k));
    return bench.Take(type, n, k);
  };
  const TypeMix mix = *FindTypeMix("q4_k_m");
  std::vector<LayerWeights> layers;
  for (int i = 0; i < shape.layers; ++i) {
    const TensorType type = mix.base, v_and_down = mix.VAndDown(i, shape.layers);
    LayerWeights w;
    w.q = take(type, shape.width, shape.width);
    w.k = take(type, shape.kv_width, shape.width);
    w.v = take(v_and_down, shape.kv_width, shape.width);
    w.output = take(type, shape.width, shape.width);
    w.gate = take(type, shape.hidden, shape.width);
    w.up = take(type, shape.hidden, shape.width);
    w.down = take(v_and_down, shape.width, shape.hidden);
    layers.push_back(w);
  }
  const PackedMatrix head = take(mix.output, shape.vocab, shape.width);
  std::printf("%s, %.2f GB packed: a pass of all products; and with norms and SwiGLU\n", shape.name,
              bytes * 1e-9);
  for (const int rows : kRows) {
    double seconds[2];
    for (const bool whole : {false, true}) {
      seconds[whole] = Measure(bench, [&] {
        for (const LayerWeights& w : layers) RecordLayer(bench, shape, w, rows, whole);
        const int head_rows = std::min(rows, 64);
        const Activations x = bench.Converted(TensorType::kQ6_K, head_rows, shape.width);
        const MatmulTerm term = {head, bench.y.get(), shape.vocab};
        CheckDevice(LaunchMatmul({&term, 1}, x, bench.stream, bench.scratch()));
      });
    }
    const double rate = bytes / seconds[0];
    std::printf("  rows %4d: %8.3f ms %5.2f TB/s %3.0f%%  %9.0f rows/s;  %8.3f ms %9.0f rows/s\n",
                rows, seconds[0] * 1e3, rate * 1e-12, 100 * rate / bench.copy_bytes_per_second,
                rows / seconds[0], seconds[1] * 1e3, rows / seconds[1]);
    std::fflush(stdout);
  }
}

int Main(int argc, char** argv) {
  const auto wanted = [&](const char* what) {
    for (int i = 1; i < argc; ++i) {
      if (std::strcmp(argv[i], what) == 0) return true;
    }
    return argc == 1;
  };
  bool ok = true;
  if (wanted("check")) {
    ok = RunAllMatmulChecks();
    std::printf(ok ? "all checks passed\n" : "CHECKS FAILED\n");
  }
  if (!wanted("shapes") && !wanted("models")) return ok ? 0 : 1;
  Bench bench;
  Prepare(bench);
  if (wanted("models")) {
    MeasureModel(bench, {"Llama-2-7B Q4_K_M", 32, 4096, 4096, 11008, 32000});
    MeasureModel(bench, {"Llama-3-8B Q4_K_M", 32, 4096, 1024, 14336, 128256});
  }
  if (wanted("shapes")) MeasureShapes(bench);
  return ok ? 0 : 1;
}

}  // namespace
}  // namespace stagecoach::cuda

int main(int argc, char** argv) { return stagecoach::cuda::Main(argc, argv); }
