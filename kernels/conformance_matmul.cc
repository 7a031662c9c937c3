#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "fmt/format.h"
#include "kernels/conformance_case.h"
#include "kernels/random_tensor.h"
#include "model/status_macros.h"

namespace stagecoach {
namespace {

constexpr int kRowCounts[] = {1, 2, 3, 7, 8, 9, 16, 33};
constexpr int kMostRows = 33;
constexpr int kBatches[] = {2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33};

struct Shape {
  int n;
  int k;
};

// Outputs that fill no tile of 8 or 16, one block, an odd number of blocks, and long rows.
std::vector<Shape> ShapesOf(const TensorTypeInfo& type) {
  const int block = type.block_elements == 256 ? 256 : 32;
  return {{5, block}, {17, 3 * block}, {1, 1024}, {64, 512}, {9, 43 * 256}, {40, 4096}};
}

struct Inputs {
  RandomTensor weight;
  std::vector<float> x;  // [kMostRows][k]
};

Inputs MakeInputs(TensorType type, const Shape& shape) {
  RandomSource random(static_cast<uint64_t>(type) * 1000003 + shape.n * 8191 + shape.k);
  Inputs inputs;
  inputs.weight =
      MakeRandomMatrix(random, "weight", type, shape.n, shape.k, 1 / std::sqrt(shape.k));
  inputs.x = RandomFloats(random, static_cast<size_t>(kMostRows) * shape.k);
  return inputs;
}

// Rows [first, first + rows) of the product.
absl::StatusOr<std::vector<float>> Multiply(Backend& backend, const Inputs& inputs,
                                            const Shape& shape, int first, int rows) {
  const auto x =
      std::span(inputs.x).subspan(static_cast<size_t>(first) * shape.k, size_t(rows) * shape.k);
  // A row that the backend forgets to write must show.
  std::vector<float> y(static_cast<size_t>(rows) * shape.n,
                       std::numeric_limits<float>::quiet_NaN());
  STAGECOACH_RETURN_IF_ERROR(backend.MatMul(inputs.weight.info, inputs.weight.raw, x, rows, y));
  return y;
}

// The first rows of the product, for each batch size, computed one row at a time...
ConformanceRun RowsAlone(TensorType type, Shape shape) {
  return [=](Backend& backend) -> absl::StatusOr<std::vector<float>> {
    const Inputs inputs = MakeInputs(type, shape);
    std::vector<float> alone;
    for (int row = 0; row < kMostRows; ++row) {
      STAGECOACH_ASSIGN_OR_RETURN(const std::vector<float> y,
                                  Multiply(backend, inputs, shape, row, 1));
      alone.insert(alone.end(), y.begin(), y.end());
    }
    std::vector<float> all;
    for (const int rows : kBatches) {
      all.insert(all.end(), alone.begin(), alone.begin() + static_cast<ptrdiff_t>(rows) * shape.n);
    }
    return all;
  };
}

// ... or in batches of that size.
ConformanceRun RowsTogether(TensorType type, Shape shape) {
  return [=](Backend& backend) -> absl::StatusOr<std::vector<float>> {
    const Inputs inputs = MakeInputs(type, shape);
    std::vector<float> all;
    for (const int rows : kBatches) {
      STAGECOACH_ASSIGN_OR_RETURN(const std::vector<float> y,
                                  Multiply(backend, inputs, shape, 0, rows));
      all.insert(all.end(), y.begin(), y.end());
    }
    return all;
  };
}

// Rows of which the fifth is NaN, or is not; the others are returned.
ConformanceRun BesideNan(TensorType type, Shape shape, int rows, bool nan) {
  return [=](Backend& backend) -> absl::StatusOr<std::vector<float>> {
    Inputs inputs = MakeInputs(type, shape);
    if (nan) {
      std::fill_n(inputs.x.begin() + 4 * shape.k, shape.k, std::numeric_limits<float>::quiet_NaN());
    }
    STAGECOACH_ASSIGN_OR_RETURN(std::vector<float> y, Multiply(backend, inputs, shape, 0, rows));
    y.erase(y.begin() + 4 * shape.n, y.begin() + 5 * shape.n);
    return y;
  };
}

}  // namespace

double MatMulTolerance(TensorType type) {
  return GetTensorTypeInfo(type).block_elements == 1 ? 1e-4 : 1.2e-2;
}

std::vector<ConformanceCase> MatMulCases() {
  std::vector<ConformanceCase> cases;
  for (const TensorTypeInfo& info : AllTensorTypes()) {
    const TensorType type = info.type;
    for (const Shape& shape : ShapesOf(info)) {
      const std::string prefix = fmt::format("MatMul/{}/n={},k={}/", info.name, shape.n, shape.k);
      for (const int rows : kRowCounts) {
        // Weights and activations are such that results are around 1. The fewer they are, the
        // farther their RMS error may lie from its expectation.
        cases.push_back({.name = prefix + fmt::format("rows={}", rows),
                         .run =
                             [=](Backend& backend) {
                               return Multiply(backend, MakeInputs(type, shape), shape, 0, rows);
                             },
                         .tolerance = MatMulTolerance(type) * (1 + 2 / std::sqrt(shape.n * rows)),
                         .typical = 1});
      }
      cases.push_back({.name = prefix + "row alone as in any batch",
                       .run = RowsTogether(type, shape),
                       .same_bits_as = RowsAlone(type, shape)});
      for (const int rows : {9, kMostRows}) {
        cases.push_back({.name = prefix + fmt::format("{} rows beside a NaN row", rows - 1),
                         .run = BesideNan(type, shape, rows, true),
                         .same_bits_as = BesideNan(type, shape, rows, false)});
      }
    }
  }
  return cases;
}

}  // namespace stagecoach
