// The truth that every backend is compared with: float64 arithmetic on decoded weights, KV in
// float64, simple loops, one thread. Slow on purpose. Only the residual stream is rounded, to
// float32 after each layer, as the numerics contract of Backend demands of every stage split.
#ifndef STAGECOACH_KERNELS_REFERENCE_REFERENCE_BACKEND_H_
#define STAGECOACH_KERNELS_REFERENCE_REFERENCE_BACKEND_H_

#include <memory>

#include "kernels/backend.h"

namespace stagecoach {

std::unique_ptr<Backend> MakeReferenceBackend();

}  // namespace stagecoach

#endif  // STAGECOACH_KERNELS_REFERENCE_REFERENCE_BACKEND_H_
