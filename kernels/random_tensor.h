// Reproducible random activations, tensors and units, for conformance cases and measurements.
#ifndef STAGECOACH_KERNELS_RANDOM_TENSOR_H_
#define STAGECOACH_KERNELS_RANDOM_TENSOR_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace stagecoach {

// The same numbers from the same seed everywhere (splitmix64).
class RandomSource {
 public:
  explicit RandomSource(uint64_t seed) : state_(seed) {}
  uint64_t Next();
  double Uniform();   // [0, 1)
  double Gaussian();  // nearly: a bell from -3.5 to 3.5, mean 0, standard deviation 1

 private:
  uint64_t state_;
};

// `count` values of Gaussian().
std::vector<float> RandomFloats(RandomSource& random, size_t count, double stddev = 1);

struct RandomTensor {
  TensorInfo info;
  std::vector<std::byte> raw;
};

// Every bit of every block is random, except that the scales are finite and chosen so that the
// decoded values have about the given standard deviation and, per block, a mean near 0.
// columns: whole blocks.
RandomTensor MakeRandomMatrix(RandomSource& random, const std::string& name, TensorType type,
                              uint64_t rows, uint64_t columns, double stddev);

// F32, one dimension.
RandomTensor MakeRandomVector(RandomSource& random, const std::string& name, uint64_t size,
                              double mean, double stddev);

struct RandomUnit {
  Unit unit;
  std::vector<TensorRole> roles;  // [tensors.size()]
  std::vector<RandomTensor> tensors;
};

// All tensors of one unit of a model: matrices of `type` with standard deviation
// 1 / sqrt(columns), norms around 1, biases if asked for.
RandomUnit MakeRandomUnit(RandomSource& random, const ModelParams& params, const Unit& unit,
                          TensorType type, bool biases);

// in_parts: as many as can be, each in memory of the backend that is overwritten once it is let go.
absl::StatusOr<std::unique_ptr<UnitWeights>> BuildUnit(Backend& backend, const ModelParams& params,
                                                       const RandomUnit& unit,
                                                       bool in_parts = false);

}  // namespace stagecoach

#endif  // STAGECOACH_KERNELS_RANDOM_TENSOR_H_
