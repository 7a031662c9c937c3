// How fast this machine's cores multiply: the ceiling of prompts.
#ifndef STAGECOACH_KERNELS_CPU_MULTIPLY_PEAK_H_
#define STAGECOACH_KERNELS_CPU_MULTIPLY_PEAK_H_

namespace stagecoach {

// Multiplications and additions per second of `threads` threads together, in registers, by the
// instructions that the AVX2 kernels use; 0 on a machine without AVX2.
struct MultiplyPeaks {
  double int8 = 0;     // bytes, summed to int16
  double float32 = 0;  // a multiplication, then an addition
};
MultiplyPeaks MeasureMultiplyPeaks(int threads);

}  // namespace stagecoach

#endif  // STAGECOACH_KERNELS_CPU_MULTIPLY_PEAK_H_
