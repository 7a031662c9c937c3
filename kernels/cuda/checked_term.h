// Random weights on the device, and what is known of them, for checks of products.
#ifndef STAGECOACH_KERNELS_CUDA_CHECKED_TERM_H_
#define STAGECOACH_KERNELS_CUDA_CHECKED_TERM_H_

#include <cstdint>
#include <random>
#include <vector>

#include "kernels/cuda/device_array.h"
#include "kernels/cuda/quant_matmul.h"
#include "model/tensor_type.h"

namespace stagecoach::cuda {

// Random blocks with sane scales, and what they stand for.
struct RandomWeights {
  std::vector<uint8_t> raw;
  std::vector<double> values;   // [n][k]
  std::vector<double> decoded;  // the same as the device's products take them
};

// What a product is added to.
enum class AddedTo { kNothing, kBias, kResult, kBoth };

// One matrix on the device with its result.
struct CheckedTerm {
  RandomWeights weights;
  DeviceArray<uint8_t> packed;
  DeviceArray<float> bias;
  std::vector<float> host_bias, start;  // start: what y holds before, [rows][n]
  int n = 0;
  AddedTo added_to = AddedTo::kNothing;
  bool accumulates() const { return added_to == AddedTo::kResult || added_to == AddedTo::kBoth; }
};

// n x k weights, and what their y holds before, for most_rows rows: NaN, or (kResult, kBoth)
// values. Device errors end the process here and in what follows.
CheckedTerm MakeTerm(std::mt19937& random, TensorType type, int n, int k, int most_rows,
                     AddedTo added_to);

// Of a normal distribution around 0.
std::vector<float> RandomValues(std::mt19937& random, size_t count, float stddev);

// Columns that are not a whole number of superblocks, where the type allows that; 5 of them else.
inline int RaggedColumns(const TensorTypeInfo& type) {
  return type.block_elements == 32 ? 1312 : 1280;
}

// What activations on the device stand for: [rows][k].
std::vector<double> ReadActivations(const Activations& x);

double RelativeRms(const std::vector<double>& actual, const std::vector<double>& expected);

// Memory for products as after many, whose count of arrivals is about to wrap.
class ScratchArray {
 public:
  ScratchArray();
  MatmulScratch of() const { return {memory_.get()}; }

 private:
  DeviceArray<uint8_t> memory_{kMatmulScratchBytes};
};

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_CHECKED_TERM_H_
