// How fast this machine's cores read memory: the ceiling of decoding.
#ifndef STAGECOACH_KERNELS_CPU_READ_BANDWIDTH_H_
#define STAGECOACH_KERNELS_CPU_READ_BANDWIDTH_H_

#include <cstdint>

namespace stagecoach {

// Bytes per second that `threads` threads together read from a buffer of `bytes` (far beyond the
// caches), the best of `passes` passes. Allocates and touches the buffer.
double MeasureReadBandwidth(int threads, uint64_t bytes = 256u << 20, int passes = 5);

}  // namespace stagecoach

#endif  // STAGECOACH_KERNELS_CPU_READ_BANDWIDTH_H_
