#include <algorithm>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "fmt/format.h"
#include "kernels/conformance_case.h"
#include "kernels/random_tensor.h"
#include "model/status_macros.h"

namespace stagecoach {
namespace {

// Float32 in and out: little but the rounding of the result itself is allowed.
constexpr double kTolerance = 2e-6;

std::vector<float> Unwritten(size_t count) {
  return std::vector<float>(count, std::numeric_limits<float>::quiet_NaN());
}

// --- RmsNorm

struct NormCase {
  int columns;
  int rows;
  float epsilon;
  double stddev;
};
constexpr NormCase kNormCases[] = {
    {1, 1, 1e-5f, 1},      {31, 3, 1e-5f, 1},      {64, 33, 1e-5f, 1}, {100, 2, 1e-6f, 1e-3},
    {2048, 7, 1e-5f, 100}, {4096, 1, 1e-5f, 1e-4}, {11008, 2, 0.5f, 1}};

ConformanceRun RunNorm(NormCase test, bool one_row_at_a_time) {
  return [=](Backend& backend) -> absl::StatusOr<std::vector<float>> {
    RandomSource random(test.columns);
    const std::vector<float> weight = RandomFloats(random, test.columns);
    std::vector<float> x =
        RandomFloats(random, static_cast<size_t>(test.rows) * test.columns, test.stddev);
    if (test.rows > 2) std::fill_n(x.begin() + test.columns, test.columns, 0.0f);  // a zero row
    std::vector<float> y = Unwritten(x.size());
    const int step = one_row_at_a_time ? 1 : test.rows;
    for (int row = 0; row < test.rows; row += step) {
      const size_t first = static_cast<size_t>(row) * test.columns;
      const size_t count = static_cast<size_t>(step) * test.columns;
      STAGECOACH_RETURN_IF_ERROR(backend.RmsNorm(std::span(x).subspan(first, count), step, weight,
                                                 test.epsilon, std::span(y).subspan(first, count)));
    }
    return y;
  };
}

void AddNormCases(std::vector<ConformanceCase>& cases) {
  for (const NormCase& test : kNormCases) {
    const std::string name =
        fmt::format("RmsNorm/columns={},rows={},epsilon={}", test.columns, test.rows, test.epsilon);
    cases.push_back({.name = name, .run = RunNorm(test, false), .tolerance = kTolerance});
    cases.push_back({.name = name + "/row alone",
                     .run = RunNorm(test, false),
                     .same_bits_as = RunNorm(test, true)});
  }
}

// --- Rope

struct RopeCase {
  const char* name;
  int heads;
  int head_dim;
  int rope_dims;
  float base;
  float scale;
  bool factors;
};
constexpr RopeCase kRopeCases[] = {
    {"plain", 4, 64, 64, 10000, 1, false},
    {"one head", 1, 128, 128, 10000, 1, false},
    {"high base", 8, 128, 128, 500000, 1, false},
    {"linear scaling", 2, 64, 64, 10000, 0.25f, false},
    {"frequency factors", 3, 128, 128, 500000, 1, true},
    {"part of the head", 2, 80, 32, 10000, 1, false},
    {"two dims", 2, 64, 2, 10000, 1, false},
};
constexpr int32_t kPositions[] = {0, 1, 2, 31, 32, 100, 4095, 8191, 32767, 131071};

ConformanceRun RunRope(RopeCase test) {
  return [=](Backend& backend) -> absl::StatusOr<std::vector<float>> {
    RandomSource random(test.head_dim + test.rope_dims);
    ModelParams params;
    params.heads = test.heads;
    params.kv_heads = test.heads;
    params.key_length = test.head_dim;
    params.value_length = test.head_dim;
    params.rope_dims = test.rope_dims;
    params.rope_freq_base = test.base;
    params.rope_freq_scale = test.scale;
    for (int i = 0; test.factors && i < test.rope_dims / 2; ++i) {
      params.rope_freq_factors.push_back(static_cast<float>(1 + 7 * random.Uniform()));
    }
    std::vector<float> x = RandomFloats(random, std::size(kPositions) * test.heads * test.head_dim);
    STAGECOACH_RETURN_IF_ERROR(backend.Rope(params, x, test.heads, test.head_dim, kPositions));
    return x;
  };
}

// --- SwiGlu

ConformanceRun RunSwiGlu(size_t count, double gate_stddev) {
  return [=](Backend& backend) -> absl::StatusOr<std::vector<float>> {
    RandomSource random(count);
    std::vector<float> gate = RandomFloats(random, count, gate_stddev);
    // Where exp overflows or silu leaves its bend.
    constexpr float kEdges[] = {0, -0.0f, 1e-20f, 30, -30, 87, -87, 89, -89, 1000, -1000};
    for (size_t i = 0; count > 100 && i < std::size(kEdges); ++i) gate[i * 7] = kEdges[i];
    const std::vector<float> up = RandomFloats(random, count);
    std::vector<float> out = Unwritten(count);
    STAGECOACH_RETURN_IF_ERROR(backend.SwiGlu(gate, up, out));
    return out;
  };
}

}  // namespace

std::vector<ConformanceCase> ElementwiseCases() {
  std::vector<ConformanceCase> cases;
  AddNormCases(cases);
  for (const RopeCase& test : kRopeCases) {
    cases.push_back(
        {.name = fmt::format("Rope/{}", test.name), .run = RunRope(test), .tolerance = kTolerance});
  }
  for (const size_t count : {1, 7, 8, 31, 512, 5632}) {
    for (const double stddev : {1.0, 10.0}) {
      cases.push_back({.name = fmt::format("SwiGlu/count={},gate stddev={}", count, stddev),
                       .run = RunSwiGlu(count, stddev),
                       .tolerance = kTolerance});
    }
  }
  return cases;
}

}  // namespace stagecoach
