// Random weights in any tensor type, made fast, without quantising floats.
#ifndef STAGECOACH_MODEL_RANDOM_BLOCKS_H_
#define STAGECOACH_MODEL_RANDOM_BLOCKS_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "model/tensor_type.h"

namespace stagecoach {

// xorshift128+ (Vigna 2014), seeded by splitmix64. Fast and reproducible; not for sampling.
class FastRandom {
 public:
  explicit FastRandom(uint64_t seed);
  uint64_t Next();
  float Uniform(float low, float high);  // [low, high)

 private:
  uint64_t state_[2];
};

// `blocks` consecutive blocks of `type`: finite, of mean 0 and about the given standard deviation.
std::vector<std::byte> MakeRandomBlocks(TensorType type, size_t blocks, float deviation,
                                        FastRandom& random);

}  // namespace stagecoach

#endif  // STAGECOACH_MODEL_RANDOM_BLOCKS_H_
